"""Index: exact and approximate kinds, adding all or nothing, removing, saving, loading beside a writer."""

import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from hamlet import paths
from hamlet.errors import HamletError
from hamlet.search import KINDS, Index, choose_kind
from hamlet.search.index import FILE


def unit_rows(n: int, d: int = 32, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def names(n: int, word: str = "photo") -> list[str]:
    return [f"photos/{word}{i:04d} ü.jpg" for i in range(n)]


def made(kind: str, rows: np.ndarray, **options) -> Index:
    index = Index(kind, rows.shape[1], **options)
    index.add(rows, names(len(rows)))
    return index


def neighbours(query: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(query @ rows.T), axis=1, kind="stable")[:, :k]


def test_flat_agrees_with_the_full_product():
    rows = unit_rows(400)
    found = made("flat", rows).query(rows[5:9], 10)
    best = neighbours(rows[5:9], rows, 10)
    assert found["id"].to_numpy().reshape(4, 10).tolist() == best.tolist()
    assert found["path"].tolist() == [names(400)[i] for i in best.ravel()]
    expected = np.take_along_axis(rows[5:9] @ rows.T, best, 1).ravel()
    np.testing.assert_allclose(found["score"], expected, rtol=1e-5)
    assert (
        found["rank"].tolist() == [*range(1, 11)] * 4
        and found["query"].tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    )


@pytest.mark.parametrize(("kind", "floor"), [("hnsw", 0.95), ("ivfpq", 0.3)])
def test_approximate_kinds_find_most_of_the_true_neighbours(kind, floor):
    rows = unit_rows(2000)
    found = made(kind, rows).query(rows[:50], 10)["id"].to_numpy().reshape(50, 10)
    truth = neighbours(rows[:50], rows, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]) > floor


def test_more_effort_finds_more():
    rows, asked = unit_rows(3000), unit_rows(200, seed=1)
    truth = neighbours(asked, rows, 1)[:, 0]
    right = [(made("hnsw", rows, effort=n).query(asked, 1)["id"] == truth).mean() for n in (1, 256)]
    assert right[0] + 0.1 < right[1] > 0.95


def test_a_pair_that_just_reaches_the_threshold_is_a_pair():
    rows = np.eye(32, dtype=np.float32)[[0, 0, 1]]
    assert made("flat", rows).duplicates(1.0) == [[0, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_remove_add_save_and_load(kind, tmp_path):
    rows = unit_rows(300)
    index = made(kind, rows, probes=300)
    assert index.query(rows[7], 1)["id"].tolist() == [7]
    assert index.remove([names(300)[7], Path(names(300)[8])]) == 2
    assert not {7, 8} & set(index.query(rows[7], 20)["id"])
    assert index.remove(names(300)[9]) == 1 and len(index) == 297
    assert index.add(rows[7:8], ["again.jpg"]) == [300]  # an id is never used twice
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index")
    pd.testing.assert_frame_equal(again.query(rows[:6], 5), index.query(rows[:6], 5))
    assert again.query(rows[7], 1)["path"].tolist() == ["again.jpg"]
    assert again.add(rows[:1], ["new.jpg"]) == [301] and len(again) == 299


def test_a_name_that_no_file_can_bear_leaves_nothing_behind(tmp_path):
    rows, index = unit_rows(5), made("flat", unit_rows(3, seed=1))
    for bad in ("\ud800.jpg", "a\0b.jpg", "", 7, None):
        with pytest.raises(HamletError, match="cannot be the path"):
            index.add(rows, [*names(4, "new"), bad])
    assert len(index) == 3 and index.store.ntotal == 3
    assert index.add(rows, names(5, "new")) == [3, 4, 5, 6, 7]
    index.save(tmp_path)
    found = Index.load(tmp_path).query(rows, 8)
    assert (found.groupby("query")["id"].nunique() == 8).all()


def test_path_objects_and_names_in_any_bytes_are_saved(tmp_path):
    index, odd = Index("flat", 32), os.fsdecode(b"odd-\xff.jpg")
    index.add(unit_rows(2), [Path("a/b.jpg"), odd])
    index.save(tmp_path)
    assert set(Index.load(tmp_path).items) == {"a/b.jpg", odd}


def test_a_path_is_in_an_index_once():
    rows, index = unit_rows(4), made("flat", unit_rows(3))
    for twice in ([*names(1), "x"], ["x", "x"], [Path(names(1)[0]), "x"]):
        with pytest.raises(HamletError, match="twice"):
            index.add(rows[:2], twice)
    assert len(index) == 3 == index.store.ntotal


def test_unknown_path_removes_nothing():
    index = made("flat", unit_rows(10))
    with pytest.raises(HamletError, match=r"gone\.jpg is not in this index of 10 photos"):
        index.remove([names(1)[0], "gone.jpg"])
    assert len(index) == 10 == index.store.ntotal


BAD = {
    "shape": (lambda i: i.add(unit_rows(2, 31), names(2, "n")), r"expected real descriptors \(N, 32\)"),
    "lengths": (lambda i: i.add(unit_rows(2), names(3, "n")), "2 descriptors for 3 paths"),
    "nan": (lambda i: i.add(np.full((1, 32), np.nan), ["n"]), "NaN or infinity"),
    "complex": (lambda i: i.add(np.ones((1, 32), complex), ["n"]), "real descriptors"),
    "words": (lambda i: i.query(np.array([["x"] * 32])), "real descriptors"),
    "k": (lambda i: i.query(unit_rows(1), 0), "k: expected a whole number"),
    "k2": (lambda i: i.query(unit_rows(1), 2.5), "k: expected a whole number"),
    "kind": (lambda i: Index("tree"), "valid: flat, hnsw, ivfpq"),
    "other kind": (lambda i: i.update(root=".", kind="tree"), "unknown kind .* valid: flat, hnsw, ivfpq"),
    "dimension": (lambda i: Index("flat", -1), "dimension: expected"),
    "effort": (lambda i: Index("hnsw", 8, effort=0), "effort: expected"),
    "probes": (lambda i: Index("ivfpq", 8, probes=True), "probes: expected"),
    "few": (lambda i: made("ivfpq", unit_rows(20)), "256 descriptors or more, got 20"),
    "no index": (lambda i: Index.load("nowhere"), "no index at nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    act, message = BAD[case]
    with pytest.raises(HamletError, match=message):
        act(made("flat", unit_rows(5)))


def test_an_empty_index_answers_nothing_and_k_may_exceed_the_size(tmp_path):
    index = Index("flat", 32)
    assert index.query(unit_rows(2), 3).empty
    index.save(tmp_path)
    assert len(Index.load(tmp_path)) == 0
    assert len(made("flat", unit_rows(4)).query(unit_rows(1), 50)) == 4


def test_the_largest_effort_costs_no_memory():
    """2**31 - 1 candidates took 15 GB."""
    rows = unit_rows(2000)
    index = made("hnsw", rows, effort=2**31 - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert index.query(rows[:20], 1)["id"].tolist() == [*range(20)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize(("count", "kind"), [(10_000, "flat"), (100_000, "hnsw"), (1_000_000, "ivfpq")])
def test_kind_by_size_and_why(count, kind):
    found, why = choose_kind(count, 1280)
    assert found == kind and f"{count:,} descriptors of 1280 values" in why


def test_an_index_grows_into_the_kind_that_was_asked_for_and_keeps_its_answers():
    rows = unit_rows(600)
    index = made("flat", rows)
    index.remove(names(1)[0])
    for kind in ("hnsw", "ivfpq"):
        index.grow(len(index), kind)
        assert index.kind == kind and index.about["why"] == "asked for"
        assert index.query(rows[5], 1)["path"].tolist() == [names(6)[5]]
    index.grow(len(index))
    assert index.kind == "ivfpq"  # never simpler again by itself


def test_a_graph_that_is_mostly_dead_is_made_anew():
    index = made("hnsw", unit_rows(100))
    index.remove(names(60))
    index.grow(40)
    assert index.store.ntotal == len(index) == 40
    assert set(index.query(unit_rows(100)[:1], 40)["path"]) == set(names(100)[60:])


@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_are_grouped(kind):
    rows = unit_rows(300, seed=3)
    rows[100:103] = rows[7] + 1e-4
    rows[200] = rows[50]
    index = made(kind, rows, probes=300)
    index.remove(names(300)[102])
    groups = index.duplicates(0.99)
    assert [7, 100, 101] in groups and [50, 200] in groups and len(groups) == 2


# -- on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other"])
def test_damage_is_named(damage, tmp_path):
    made("flat", unit_rows(10)).save(tmp_path)
    file = tmp_path / FILE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    changed = {"cut": content[:-10], "flipped": content, "empty": b"", "text": b"x" * 99}
    file.write_bytes(changed.get(damage, b""))
    if damage == "other":
        save_file({"rows": np.zeros(3)}, file)
    with pytest.raises(HamletError, match=rf"{FILE} is damaged .*delete it and index the photos again"):
        Index.load(tmp_path)


def test_a_save_that_is_cut_off_leaves_the_old_index(tmp_path, monkeypatch):
    index = made("flat", unit_rows(10))
    index.save(tmp_path)
    index.add(unit_rows(5, seed=1), names(5, "new"))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
    before = index.version
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path)
    monkeypatch.undo()
    assert len(Index.load(tmp_path)) == 10 and index.version == before
    index.save(tmp_path)
    assert len(Index.load(tmp_path)) == 15
    assert {p.name for p in tmp_path.iterdir()} == {FILE, ".lock"}


def test_others_may_read_an_index_that_umask_lets_them_read(tmp_path):
    made("flat", unit_rows(3)).save(tmp_path)
    (tmp_path / "plain").touch()
    assert (tmp_path / FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_another_process_saved_is_not_overwritten(tmp_path):
    made("flat", unit_rows(10)).save(tmp_path)
    one, two = Index.load(tmp_path), Index.load(tmp_path)
    one.add(unit_rows(1), ["one.jpg"])
    one.save(tmp_path)
    two.add(unit_rows(1), ["two.jpg"])
    with pytest.raises(HamletError, match="was changed since this index was read"):
        two.save(tmp_path)
    with pytest.raises(HamletError, match="was changed since"):
        made("flat", unit_rows(2)).save(tmp_path)  # nor by an index that never came from there
    assert "one.jpg" in Index.load(tmp_path).items
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HamletError, match="is a file"):
        two.save(tmp_path / "file")


def save_often(folder: Path, times: int) -> None:
    index = Index.load(folder)
    for i in range(times):
        index.add(unit_rows(50, seed=i), names(50, f"round{i}-"))
        index.save(folder)


def test_loading_while_another_process_saves_always_works(tmp_path):
    """18 of 63 loads failed."""
    made("flat", unit_rows(500)).save(tmp_path)
    writer = multiprocessing.get_context("fork").Process(target=save_often, args=(tmp_path, 40))
    writer.start()
    sizes = []
    while writer.is_alive() or not sizes:
        sizes.append(len(Index.load(tmp_path)))
    writer.join()
    assert writer.exitcode == 0
    assert all(size % 50 == 0 for size in sizes) and sizes == sorted(sizes) and len(Index.load(tmp_path)) == 2500


def test_importing_search_does_not_import_the_models():
    code = "import hamlet.search, sys; sys.exit('hamlet.models' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT).returncode == 0


def test_an_index_file_holds_no_code(tmp_path):
    made("flat", unit_rows(3)).save(tmp_path)
    assert {name: blob.dtype for name, blob in load_file(tmp_path / FILE).items()} == {
        "about": np.uint8,
        "store": np.uint8,
    }
