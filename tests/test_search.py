import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hamlet import search
from hamlet.search import Index


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


@pytest.mark.parametrize("moment", ["items", "data", "manifest"])
def test_interrupted_save_leaves_the_old_index(moment, tmp_path, monkeypatch):
    index = made("flat", unit_rows(10))
    index.save(tmp_path / "index")
    index.add(unit_rows(5, seed=1), names(5))

    def stop(*a, **k):
        raise KeyboardInterrupt

    target = {
        "items": (pd.DataFrame, "to_parquet"),
        "data": (search.faiss, "write_index"),
        "manifest": (json, "dumps"),
    }
    monkeypatch.setattr(*target[moment], stop)
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path / "index")
    monkeypatch.undo()
    assert len(Index.load(tmp_path / "index")) == 10
    index.save(tmp_path / "index")  # and the next save succeeds, leaving one version of each file
    assert len(Index.load(tmp_path / "index")) == 15
    assert len(list((tmp_path / "index").iterdir())) == 3


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


def test_ones_own_photos_from_the_command_line(tmp_path, capsys):
    from PIL import Image

    from hamlet.models import create_model, save_model

    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{i}.PNG"
        )
    weights = str(tmp_path / "model.safetensors")
    save_model(create_model("gem", backbone="resnet18"), weights)
    search.main(["build", weights, str(tmp_path / "photos"), str(tmp_path / "index"), "--image-size", "64"])
    search.main(
        [
            "query",
            str(tmp_path / "index"),
            weights,
            str(tmp_path / "photos" / "2.PNG"),
            "-k",
            "2",
            "--image-size",
            "64",
        ]
    )
    first = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["1"])
    assert first.endswith("2.PNG")
    with pytest.raises(SystemExit, match="no image below"):
        search.main(["build", weights, str(tmp_path / "index"), str(tmp_path / "other")])
