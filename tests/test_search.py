import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from hamlet.search import Index
from hamlet.search import index as search
from hamlet.search import photos as command


def unit_rows(n: int, d: int = 32, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sparse_rows(n: int, seed: int = 0) -> sp.csr_matrix:
    return sp.random(n, 200, density=0.05, format="csr", random_state=seed, dtype=np.float32)


def names(n: int) -> list[str]:
    return [f"photos/{i:04d} ü.jpg" for i in range(n)]


def made(kind: str, rows, model: str = "m1") -> Index:
    options = {"sub_quantisers": 8, "probes": 64} if kind == "ivfpq" else {}
    index = Index(kind, rows.shape[1], model, **options)
    index.add(rows, names(rows.shape[0]))
    return index


def best(query, rows, k: int) -> np.ndarray:
    scores = (query @ rows.T).toarray() if sp.issparse(rows) else query @ rows.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(("kind", "rows"), [("flat", unit_rows(400)), ("sparse", sparse_rows(400))])
def test_exact_kinds_agree_with_the_full_product(kind, rows):
    index, query = made(kind, rows), rows[5:9]
    found = index.query(query, 10)
    assert found["id"].to_numpy().reshape(4, 10).tolist() == best(query, rows, 10).tolist()
    assert found["path"].tolist() == [names(400)[i] for i in found["id"]]
    product = (query @ rows.T).toarray() if kind == "sparse" else query @ rows.T
    expected = np.take_along_axis(product, best(query, rows, 10), 1).ravel()
    np.testing.assert_allclose(found["score"], expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "floor"), [("hnsw", 0.95), ("ivfpq", 0.3)])
def test_approximate_kinds_find_most_of_the_true_neighbours(kind, floor):
    rows = unit_rows(2000)
    found = made(kind, rows).query(rows[:50], 10)["id"].to_numpy().reshape(50, 10)
    truth = best(rows[:50], rows, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]) > floor


@pytest.mark.parametrize("kind", search.KINDS)
def test_remove_add_save_and_load(kind, tmp_path):
    rows = sparse_rows(300) if kind == "sparse" else unit_rows(300)
    index = made(kind, rows)
    assert index.query(rows[7:8], 1)["id"].tolist() == [7]
    assert index.remove([7, 8]) == 2
    assert 7 not in index.query(rows[7:8], 20)["id"].tolist()
    assert index.add(rows[7:8], ["again.jpg"]).tolist() == [300]  # an id is never used twice
    index.save(tmp_path / "index")
    again = Index.load(tmp_path / "index", "m1")
    assert len(again) == 299
    pd.testing.assert_frame_equal(again.query(rows[:6], 5), index.query(rows[:6], 5))
    assert again.query(rows[7:8], 1)["path"].tolist() == ["again.jpg"]
    assert again.add(rows[:1], ["new.jpg"]).tolist() == [301]


@pytest.mark.parametrize("form", [sp.csr_array, sp.csc_matrix, sp.coo_array])
def test_any_sparse_form_answers_as_csr_matrix(form):
    rows = sparse_rows(300)
    expected = made("sparse", rows).query(rows[:6], 5)
    pd.testing.assert_frame_equal(made("sparse", form(rows)).query(form(rows[:6]), 5), expected)


def test_unknown_id_removes_nothing():
    index = made("flat", unit_rows(10))
    with pytest.raises(KeyError, match="id 99"):
        index.remove([1, 99])
    assert len(index) == 10


def test_wrong_model_damage_and_strangers_are_refused(tmp_path):
    made("flat", unit_rows(10)).save(tmp_path / "index")
    with pytest.raises(ValueError, match="was made by the model m1"):
        Index.load(tmp_path / "index", "another")
    data = next((tmp_path / "index").glob("index-*.bin"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        Index.load(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="no index"):
        Index.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        made("flat", unit_rows(10)).save(tmp_path / "other")


@pytest.mark.parametrize("saved_before", [True, False])
@pytest.mark.parametrize("moment", ["items", "data", "manifest"])
def test_interrupted_save_leaves_the_old_index_and_a_way_on(moment, saved_before, tmp_path, monkeypatch):
    folder, index = tmp_path / "index", made("flat", unit_rows(10))
    if saved_before:
        index.save(folder)
    index.add(unit_rows(5, seed=1), names(5))

    def stop(source, target, **k):
        if moment != "manifest":  # there all files are whole, and the new manifest is not in place
            Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    target = {
        "items": (pd.DataFrame, "to_parquet"),
        "data": (search.faiss, "write_index"),
        "manifest": (Path, "replace"),
    }
    monkeypatch.setattr(*target[moment], stop)
    with pytest.raises(KeyboardInterrupt):
        index.save(folder)
    monkeypatch.undo()
    version, left = 2 if saved_before else 1, {p.name for p in folder.iterdir()}
    assert f"items-{version}.parquet" in left
    assert (f"index-{version}.bin" in left) == (moment != "items")
    assert any(name.startswith(".manifest") for name in left) == (moment == "manifest")
    if saved_before:
        assert len(Index.load(folder)) == 10
    else:
        with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
            Index.load(folder)
    index.save(folder)  # and the next save succeeds, leaving one version of each file
    assert len(Index.load(folder)) == 15
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "name", ["items-mine.parquet", "index-1.bin.txt", ".manifest.json.old", "items-1.csv"]
)
def test_only_the_index_own_files_may_lie_in_a_folder_without_manifest(name, tmp_path):
    (tmp_path / "items-1.parquet").write_bytes(b"half")
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        made("flat", unit_rows(10)).save(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_beside_a_saved_index_stays(tmp_path):
    index = made("flat", unit_rows(10))
    index.save(tmp_path)
    (tmp_path / "items-mine.parquet").write_text("mine")
    index.save(tmp_path)
    assert (tmp_path / "items-mine.parquet").read_text() == "mine"


def test_the_disk_holds_the_data_before_the_manifest_names_it(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def synced(handle):
        inode = os.fstat(handle).st_ino
        events.extend(p.name for p in (tmp_path, *tmp_path.iterdir()) if p.stat().st_ino == inode)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda *a: (events.append("renamed"), replace(*a)))
    made("flat", unit_rows(10)).save(tmp_path)
    partial = f".manifest.json.{os.getpid()}"
    assert events == ["items-1.parquet", "index-1.bin", partial, tmp_path.name, "renamed", tmp_path.name]


@pytest.mark.parametrize("content", ["", '{"version": 1', "[]", "{}", "null", "\x80"])
def test_a_damaged_manifest_is_named(content, tmp_path):
    made("flat", unit_rows(10)).save(tmp_path)
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    for use in (Index.load, made("flat", unit_rows(10)).save):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged.*build the index again"):
            use(tmp_path)


def test_a_manifest_without_a_field_is_damaged_and_one_without_image_size_is_older(tmp_path):
    path = tmp_path / "manifest.json"
    made("flat", unit_rows(10)).save(tmp_path)
    manifest = json.loads(path.read_text())
    for name in search.FIELDS:
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != name}))
        with pytest.raises(ValueError, match=f"damaged.*{name}"):
            Index.load(tmp_path)
        path.write_text(json.dumps(manifest | {name: None}))
        with pytest.raises(ValueError, match=f"damaged.*{name} is None"):
            Index.load(tmp_path)
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "image_size"}))
    assert Index.load(tmp_path).image_size is None


def test_image_size_is_kept_and_another_refused(tmp_path):
    index = Index("flat", 32, "m1", image_size=80)
    index.add(unit_rows(3), names(3))
    index.save(tmp_path / "sized")
    assert json.loads((tmp_path / "sized" / "manifest.json").read_text())["image_size"] == 80
    assert Index.load(tmp_path / "sized", "m1", 80).image_size == 80
    assert Index.load(tmp_path / "sized").image_size == 80
    with pytest.raises(ValueError, match="holds images at 80 px, queries come at 224; use 80"):
        Index.load(tmp_path / "sized", "m1", 224)
    made("flat", unit_rows(3)).save(tmp_path / "unsized")
    assert json.loads((tmp_path / "unsized" / "manifest.json").read_text())["image_size"] is None
    assert Index.load(tmp_path / "unsized", image_size=224).image_size is None


def test_bad_input_is_named():
    index = made("flat", unit_rows(10))
    with pytest.raises(ValueError, match="flat, ivfpq, hnsw, sparse"):
        Index("lsh")
    with pytest.raises(ValueError, match=r"\(N, 32\)"):
        index.query(unit_rows(2, 16))
    with pytest.raises(ValueError, match="NaN"):
        index.query(np.full((1, 32), np.nan))
    with pytest.raises(ValueError, match="one path each"):
        index.add(unit_rows(3), ["a"])
    with pytest.raises(TypeError, match="dense"):
        index.query(sparse_rows(1))
    with pytest.raises(ValueError, match="256"):
        Index("ivfpq", 32, sub_quantisers=8).add(unit_rows(20), names(20))


def test_empty_index_and_k_beyond_its_size(tmp_path):
    index = Index("flat", 32)
    assert index.query(unit_rows(2), 5).empty
    index.save(tmp_path / "index")
    assert Index.load(tmp_path / "index").query(unit_rows(2), 5).empty
    assert len(made("flat", unit_rows(3)).query(unit_rows(2), 10)) == 6


BAD_OPTIONS = [
    *[(n, value) for n in ("dimension", "clusters", "sub_quantisers", "probes", "effort") for value in (0, -1, 1.5)],
    *[("links", value) for value in (-1, 0, 1, 16.0, "32", None)],
    ("image_size", 0), ("image_size", 80.5), ("probes", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_options_that_faiss_would_not_survive_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least [12], got {value!r}"):
        Index(kind, **{"dimension": 64, name: value})


def test_numpy_integers_are_options_and_are_stored(tmp_path):
    index = Index("hnsw", np.int64(32), links=np.int32(2), image_size=np.int64(64))
    index.add(unit_rows(50), names(50))
    index.save(tmp_path)
    assert Index.load(tmp_path).options["links"] == 2


def test_more_clusters_than_vectors_are_refused():
    with pytest.raises(ValueError, match="400 or more, got 300"):
        Index("ivfpq", 32, sub_quantisers=8, clusters=400).add(unit_rows(300), names(300))


@pytest.mark.parametrize("ids", [[1.7], [1.0], ["1"], [True], [None], [1, 2.5], np.array([np.nan])])
def test_remove_takes_whole_numbers_alone(ids):
    index = made("flat", unit_rows(10))
    with pytest.raises(TypeError, match="ids must be whole numbers"):
        index.remove(ids)
    assert len(index) == 10
    assert index.remove([]) == 0
    assert index.remove(np.array([1, 1, 2], np.uint8)) == 2


@pytest.mark.parametrize("kind", search.KINDS)
def test_complex_descriptors_and_words_are_refused(kind):
    rows = sparse_rows(300) if kind == "sparse" else unit_rows(300)
    index = made(kind, rows)
    for use in (lambda r: index.add(r, names(2)), index.query):
        with pytest.raises(TypeError, match="complex64, expected real numbers"):
            use(rows[:2].astype(np.complex64))
    if kind != "sparse":
        with pytest.raises(TypeError, match="expected real numbers"):
            index.query(rows[:2].astype(str))
    assert len(index) == 300


@pytest.mark.parametrize("k", [0, -3, 2.5])
def test_k_is_a_positive_whole_number(k):
    with pytest.raises(ValueError, match=f"k must be a whole number of at least 1, got {k}"):
        made("flat", unit_rows(10)).query(unit_rows(1), k)


# -- on a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch) -> list:
    """Every copy to the cards that was made, real where there is a card, of the CPU's memory elsewhere."""
    made_so_far, real = [], search.faiss.index_cpu_to_all_gpus
    present = search.faiss.get_num_gpus() > 0

    def copy(index, options):
        made_so_far.append(real(index, options) if present else search.faiss.clone_index(index))
        return made_so_far[-1]

    monkeypatch.setattr(search.faiss, "index_cpu_to_all_gpus", copy, raising=False)
    if not present:
        monkeypatch.setattr(search.faiss, "get_num_gpus", lambda: 1)
        monkeypatch.setattr(search.faiss, "GpuMultipleClonerOptions", SimpleNamespace, raising=False)
        monkeypatch.setattr(search.faiss, "GpuParameterSpace", search.faiss.ParameterSpace, raising=False)
    return made_so_far


@pytest.mark.parametrize("kind", ["flat", "ivfpq"])
def test_the_copy_on_the_cards_is_made_once_after_each_change(kind, copies):
    rows = unit_rows(600)
    index = made(kind, rows)
    assert copies == []
    for _ in range(3):
        assert 7 in index.query(rows[7:8], 5)["id"].tolist()
    assert len(copies) == 1
    index.remove([7])
    assert 7 not in index.query(rows[7:8], 5)["id"].tolist()
    index.query(rows[:1], 5)
    assert len(copies) == 2
    again = index.add(rows[7:8], ["again.jpg"])
    assert again[0] in index.query(rows[7:8], 5)["id"].tolist()
    assert len(copies) == 3
    index.query(rows[:1], 600)
    index.options["probes"] = 1  # a setting is no change of the content
    assert (len(index.query(rows[:1], 600)) == 600) == (kind == "flat")
    assert len(copies) == 3


def test_what_a_card_does_not_take_is_searched_on_the_cpu(monkeypatch, copies):
    def refuse(index, options):
        copies.append(index)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(search.faiss, "index_cpu_to_all_gpus", refuse)
    rows = unit_rows(300)
    index = made("ivfpq", rows)
    with pytest.warns(UserWarning, match="GPU refused: out of memory"):
        assert 3 in index.query(rows[3:4], 5)["id"].tolist()
    index.query(rows[3:4], 5)
    assert len(copies) == 1  # not tried again before the index changes
    large = made("flat", unit_rows(search.GPU_LIMIT + 1))
    assert len(large.query(rows[:1], search.GPU_LIMIT + 1)) == search.GPU_LIMIT + 1
    assert len(copies) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not search.faiss.get_num_gpus(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("kind", "floor"), [("flat", 0.999), ("ivfpq", 0.9)])
def test_gpu_and_cpu_find_the_same_images(kind, floor, copies, tmp_path, monkeypatch):
    rows = unit_rows(4000, 512)
    index = Index(
        kind, 512
    )  # ivfpq: 64 sub-quantisers, the default, whose tables fit in half precision alone
    index.add(rows, names(4000))
    on_gpu = index.query(rows[:100], 10)
    assert len(copies) == 1
    held = search.faiss.downcast_index(getattr(copies[0], "index", copies[0]))
    assert type(held).__name__.startswith(("GpuIndex", "IndexReplicas"))
    index.save(tmp_path)
    monkeypatch.setattr(search.faiss, "get_num_gpus", lambda: 0)
    on_cpu = Index.load(tmp_path).query(rows[:100], 10)
    pairs = zip(*(f["id"].to_numpy().reshape(100, 10) for f in (on_gpu, on_cpu)), strict=True)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in pairs]) > floor
    np.testing.assert_allclose(on_gpu["score"], on_cpu["score"], atol=1e-5 if kind == "flat" else 0.01)


# -- command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    from hamlet.models import create_model, save_model

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_model(create_model("gem", backbone="resnet18"), path)
    return str(path)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Five photos in "photos" below the current folder."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.PNG")
    return tmp_path / "photos"


def ranked(capsys) -> list[list[str]]:
    """The rows of the table that ``query`` printed."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return lines[[line[:1] for line in lines].index(["rank"]) + 1 :]


def test_ones_own_photos_from_the_command_line(weights, photos, capsys):
    command.main(["build", weights, "photos", "my-index", "--image-size", "64"])
    assert "5 images indexed in my-index, 0 left out" in capsys.readouterr().out
    query = ["query", "my-index", weights, "photos/2.PNG", "-k", "2"]
    for size in (["--image-size", "64"], []):  # the size is the index' own
        command.main([*query, *size])
        first, second = ranked(capsys)
        assert (first[0], first[2], second[0]) == ("1", "photos/2.PNG", "2")
        assert float(first[1]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(SystemExit, match=r"my-index holds images at 64 px, queries come at 80; use 64"):
        command.main([*query, "--image-size", "80"])


def test_an_index_without_image_size_asks_for_it(weights, photos, capsys):
    index = Index("flat", 512, search.model_hash(weights))
    index.add(unit_rows(3, 512), names(3))
    index.save("api")
    with pytest.raises(SystemExit, match="api does not say at what size its images were described; give"):
        command.main(["query", "api", weights, "photos/2.PNG"])
    command.main(["query", "api", weights, "photos/2.PNG", "--image-size", "64"])
    assert len(ranked(capsys)) == 3


def test_broken_photos_are_left_out_and_named(weights, photos, capsys):
    command.main(["build", weights, "photos", "whole", "--image-size", "64"])
    (photos / "a.jpg").write_text("a shopping list")
    (photos / "3b.png").write_bytes((photos / "3.PNG").read_bytes()[:2000])
    (photos / "lost.jpg").symlink_to(photos / "nowhere.jpg")
    (photos / "album.jpg").mkdir()  # no file
    if sys.platform == "linux":
        os.rename(photos / "2.PNG", os.fsencode(photos) + b"/2 \xfc.PNG")  # a name from an older system
    command.main(["build", weights, "photos", "my-index", "--image-size", "64"])
    out = capsys.readouterr().out
    assert "5 images indexed in my-index, 3 left out" in out
    reasons = {"a.jpg": "UnidentifiedImageError", "3b.png": "OSError", "lost.jpg": "FileNotFoundError"}
    for name, reason in reasons.items():
        assert f"left out: photos/{name} ({reason}: " in out
    a, b = (Index.load(folder) for folder in ("whole", "my-index"))
    third = "2 \ufffd" if sys.platform == "linux" else "2"
    assert b.items["path"].tolist() == [f"photos/{i}.PNG" for i in (0, 1, third, 3, 4)]
    rows = unit_rows(1, 512)
    pd.testing.assert_frame_equal(*(x.query(rows, 5).drop(columns="path") for x in (a, b)))


def test_photos_are_decoded_in_chunks(weights, photos, monkeypatch):
    from hamlet import evaluation

    command.main(["build", weights, "photos", "whole", "--image-size", "64"])
    counts, embed = [], evaluation.embed
    monkeypatch.setattr(command, "CHUNK", 2)
    monkeypatch.setattr(evaluation, "embed", lambda m, x, s: (counts.append(len(x)), embed(m, x, s))[1])
    command.main(["build", weights, "photos", "parts", "--image-size", "64"])
    assert counts == [2, 2, 1]
    a, b = (Index.load(folder) for folder in ("whole", "parts"))
    found = [index.query(unit_rows(1, 512), 5) for index in (a, b)]
    assert found[0]["path"].tolist() == found[1]["path"].tolist()
    np.testing.assert_allclose(found[0]["score"], found[1]["score"], atol=1e-6)


@pytest.mark.parametrize("method", ["gem", "sparse"])
def test_a_stopped_build_goes_on(method, photos, monkeypatch, capsys):
    from hamlet.models import create_model, save_model

    save_model(create_model(method, backbone="resnet18"), "weights.safetensors")
    (photos / "4b.jpg").write_text("a shopping list")
    build = ["build", "weights.safetensors", "photos", "whole", "--image-size", "64"]
    command.main(build)
    described, describe = [], command._describe

    def watched(model, files, *rest):
        if len(described) == 2 and build[3] == "parts":
            raise KeyboardInterrupt
        described.append([f.name for f in files])
        return describe(model, files, *rest)

    monkeypatch.setattr(command, "PART", 2)
    monkeypatch.setattr(command, "_describe", watched)
    build[3] = "parts"
    with pytest.raises(SystemExit, match="the same command goes on from here"):
        command.main(build)
    (photos / "2.PNG").write_bytes(
        (photos / "2.PNG").read_bytes() + b" "
    )  # the second part is another one now
    (Path("parts") / ".described" / ".2.77.partial.safetensors").write_bytes(b"torn")
    described.append([])
    command.main(build)
    assert [*described] == [
        ["0.PNG", "1.PNG"],
        ["2.PNG", "3.PNG"],
        [],
        ["2.PNG", "3.PNG"],
        ["4.PNG", "4b.jpg"],
    ]
    assert "5 images indexed in parts, 1 left out" in capsys.readouterr().out
    assert sorted(p.name for p in Path("parts").iterdir()) == sorted(p.name for p in Path("whole").iterdir())
    a, b = (Index.load(folder) for folder in ("whole", "parts"))
    pd.testing.assert_frame_equal(a.items, b.items)
    assert a.kind == ("sparse" if method == "sparse" else "flat")
    rows = unit_rows(1, a.dimension)
    found = [x.query(sp.csr_matrix(rows) if method == "sparse" else rows, 5) for x in (a, b)]
    pd.testing.assert_frame_equal(*found, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "other model"])
def test_what_a_stopped_build_stored_is_not_trusted_blindly(damage, weights, photos, monkeypatch):
    from hamlet.models import create_model, save_model

    monkeypatch.setattr(command, "PART", 2)
    made = command.Index.save
    monkeypatch.setattr(command.Index, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    build = ["build", weights, "photos", "my-index", "--image-size", "64"]
    with pytest.raises(SystemExit):
        command.main(build)
    monkeypatch.setattr(command.Index, "save", made)
    if damage == "cut":
        part = Path("my-index/.described/1.safetensors")
        part.write_bytes(part.read_bytes()[:-100])
    else:
        torch.manual_seed(1)
        save_model(create_model("gem", backbone="resnet18"), "other.safetensors")
        build[1] = "other.safetensors"
    command.main(build)
    command.main([*build[:3], "whole", *build[4:]])
    found = [Index.load(folder).query(unit_rows(1, 512), 5) for folder in ("my-index", "whole")]
    pd.testing.assert_frame_equal(*found)


def test_sparse_models_from_the_command_line(photos, capsys):
    from hamlet.models import create_model, save_model

    save_model(create_model("sparse", backbone="resnet18"), "sparse.safetensors")
    with pytest.raises(SystemExit, match="--kind hnsw does not fit a sparse model; give sparse"):
        command.main(["build", "sparse.safetensors", "photos", "my-index", "--kind", "hnsw"])
    command.main(["build", "sparse.safetensors", "photos", "my-index", "--image-size", "64"])
    command.main(["query", "my-index", "sparse.safetensors", "photos/4.PNG", "-k", "1"])
    assert ranked(capsys)[0][2] == "photos/4.PNG"


BUILD = "build WEIGHTS photos my-index --image-size 64"
MISTAKES = {
    "query old WEIGHTS words/a.jpg": r"none of 1 .*\(words/a\.jpg: UnidentifiedImageError.*give photos that open",
    "query old WEIGHTS missing.jpg": r"no image at missing\.jpg; expected the path of a photo",
    "query old missing.safetensors photos/1.PNG": r"no weights at missing\.safetensors; expected a file",
    "query old words/a.jpg photos/1.PNG": r"old was made by the model .*; use that model or build",
    "query old WEIGHTS photos/1.PNG -k 0": "-k must be a whole number of at least 1, got 0",
    "query old WEIGHTS photos/1.PNG -k two": "argument -k: invalid int value: 'two'",
    "query old WEIGHTS photos/1.PNG --image-size 0": "--image-size must be a whole number of at least 64, got 0",
    "query photos WEIGHTS photos/1.PNG": r"no index at photos: manifest\.json is missing; build one first",
    "query torn WEIGHTS photos/1.PNG": r"torn/manifest\.json is damaged.*delete torn and build",
    "build WEIGHTS words my-index": r"none of 1 image\(s\) decodes \(words/a\.jpg: Unidentified.*give photos",
    "build WEIGHTS nowhere my-index": r"no image below nowhere; expected files ending in \.bmp",
    "build missing.safetensors photos my-index": r"no weights at missing\.safetensors",
    "build words/a.jpg photos my-index": r"words/a\.jpg is not a readable safetensors file",
    f"{BUILD} --kind sparse": "--kind sparse does not fit a gem model; give flat, ivfpq, hnsw",
    f"{BUILD} --kind ivfpq": "256 or more, got 5; use flat",
    f"{BUILD} --kind lsh": "invalid choice: 'lsh'",
    "build WEIGHTS photos my-index --image-size 0": "--image-size must be a whole number of at least 64, got 0",
    "build WEIGHTS photos my-index --image-size -64": "--image-size must be .*got -64",
    "build WEIGHTS photos words": r"words holds other files \(a\.jpg\); choose an empty folder",
    "build WEIGHTS photos words/a.jpg": r"words/a\.jpg is a file; choose an empty folder",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items())
def test_mistakes_end_with_one_line(words, message, weights, photos, capsys):
    Path("words").mkdir()
    Path("words/a.jpg").write_text("a shopping list")
    Index("flat", 512, search.model_hash(weights), image_size=64).save("old")
    Path("torn").mkdir()
    Path("torn/manifest.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        command.main(words.replace("WEIGHTS", weights).split())
    said = capsys.readouterr().err.splitlines()[-1] if stopped.value.code == 2 else stopped.value.code
    assert isinstance(said, str)  # Python prints it and exits with 1
    assert "\n" not in said
    assert said.startswith("python -m hamlet.search")
    assert re.search(message, said), said
