"""The benchmarks' peers measure the same thing; the committed tables come from what is stored and keep their word."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranking, differences, tables = load("ranking"), load("library_differences"), load("tables")


@pytest.mark.parametrize("queries", [0, 12])
@pytest.mark.parametrize("peer", [p for p in ranking.PACKAGES if p != "OML"])
def test_peers_agree_where_there_are_no_ties(peer, queries):
    data = ranking.problem(150, queries, 16, 5)
    assert ranking.RUN[peer](*data, 1) == pytest.approx(ranking.run_hamlet(*data, 1), abs=2e-6)


@pytest.mark.parametrize("case", differences.CASES, ids=lambda case: case[0])
def test_hamlet_gives_the_hand_results(case):
    name, metric, scores, relevant, expected, _ = case
    assert math.isclose(differences.hamlet(name, metric, scores, relevant), expected, abs_tol=1e-12)


def test_an_absent_or_failing_library_is_named_in_the_table():
    def absent(*_):
        raise ImportError

    def failing(*_):
        raise RuntimeError("broken")

    assert differences.answer(absent, *differences.CASES[0][:4]) == "not installed"
    assert differences.answer(failing, *differences.CASES[0][:4]) == "RuntimeError: broken"


def test_a_measurement_is_stored_and_becomes_a_table(tmp_path, monkeypatch):
    """The whole road at a small size; a peer that fails says why in its row."""
    stored = tmp_path / "results" / "benchmarks" / "ranking"
    words = ["ranking.py", "--sizes", "300", "--peers", "OML", "--name", "small", "--output", str(stored)]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setenv("PYTHONPATH", "")
    ranking.main()
    record = json.loads((stored / "small.json").read_text())
    assert [m["method"] for m in record["measured"]] == ["product", "hamlet", "OML"]
    assert record["measured"][1]["mAP"] > 0.1 and record["provenance"]["versions"]["numpy"]
    assert tables.remake(tmp_path / "results", tmp_path / "tables") == ["ranking_small"]
    table = pd.read_csv(tmp_path / "tables" / "benchmarks" / "ranking_small.csv")
    assert table["CPU / product"][0] == 1 and table["mAP less hamlet's"][1] == 0


COMMITTED = ROOT / "tables" / "benchmarks"


def test_the_committed_tables_come_back_byte_for_byte(tmp_path):
    shutil.copytree(ROOT / "results" / "benchmarks", tmp_path / "results" / "benchmarks")
    made = tables.remake(tmp_path / "results", tmp_path / "tables")
    assert {f"{name}{end}" for name in made for end in (".csv", ".md", ".tex")} == {
        path.name for path in COMMITTED.iterdir()
    }
    for path in (tmp_path / "tables" / "benchmarks").iterdir():
        assert path.read_bytes() == (COMMITTED / path.name).read_bytes(), path.name


def test_committed_figures_keep_the_promised_cost():
    """At most 5 times the product and 100 MB at 10,000 leave-one-out; every library five times dearer at least."""
    rows = pd.read_csv(COMMITTED / "ranking_libraries.csv").set_index("method")
    assert rows.loc["hamlet", "CPU / product"] <= 5 and rows.loc["hamlet", "extra MB"] <= 100
    others = rows["CPU / product"].drop(["product", "hamlet"]).dropna()
    assert {"pytorch-metric-learning", "OML"} <= {*others.index}
    assert others.min() >= 5 * rows.loc["hamlet", "CPU / product"]


def test_committed_threads_share_the_work_and_add_little():
    rows = pd.read_csv(COMMITTED / "ranking_threads.csv").query("method == 'hamlet'").set_index("threads")
    assert rows["CPU s"].max() <= 1.3 * rows["CPU s"][1]


def test_a_look_is_written_under_its_own_columns(tmp_path):
    looks, path = load("looks"), tmp_path / "looks.csv"
    path.write_text("run,fold,mAP,HAP\nfirst,0,0.7923,0.7596\nsecond,1,0.7037,\n")
    looks.record(path, {"run": "third", "mAP": 0.5, "epochs": 6, "fold": 1})
    assert path.read_text().splitlines() == [
        "run,fold,mAP,HAP,epochs",
        "first,0,0.7923,0.7596,",
        "second,1,0.7037,,",
        "third,1,0.5,,6",
    ]
    looks.record(tmp_path / "new.csv", {"run": "only"})
    assert (tmp_path / "new.csv").read_text() == "run\nonly\n"
