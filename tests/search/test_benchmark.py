"""benchmarks/search.py measures every kind and setting, and remakes its table and figure from what is stored."""

import importlib.util
import json
import shutil

import pytest

from hamlet import paths


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("search_benchmark", paths.ROOT / "benchmarks" / "search.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_every_setting_is_measured(benchmark, kind):
    rows = benchmark.measure(400, 20, kind)
    assert [row["value"] for row in rows] == benchmark.SETTINGS[kind][1]
    recall = [row["recall@10"] for row in rows]
    assert recall == sorted(recall) and recall[-1] >= {"flat": 1, "hnsw": 0.99, "ivfpq": 0.8}[kind]
    assert all(
        row[c] > 0 for row in rows for c in ("queries_per_second", "faiss_queries_per_second", "bytes_per_image")
    )


def test_table_and_figure_come_back_byte_for_byte(benchmark, tmp_path):
    shutil.copytree(paths.ROOT / "results" / "search", tmp_path / "results" / "search")
    made = {path.name: path.read_bytes() for path in benchmark.remake(tmp_path)}
    assert {path.name: path.read_bytes() for path in benchmark.remake(tmp_path)} == made
    for name, content in made.items():
        folder = "figures" if name.startswith("recall_speed.") else "tables"
        assert (paths.ROOT / folder / "search" / name).read_bytes() == content, name


def test_stored_measurements_say_what_they_are():
    for path in (paths.ROOT / "results" / "search").glob("*.json"):
        for row in json.loads(path.read_text()):
            assert str(row["size"]) == path.stem and row["faiss_queries_per_second"] > 0
