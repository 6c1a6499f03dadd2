"""The benchmarks' peers measure the same thing; the committed tables come from what is stored and keep their word."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch

from hamlet.models import create_model

ROOT = Path(__file__).resolve().parents[1]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranking, differences = load("benchmarks/ranking.py"), load("benchmarks/library_differences.py")


@pytest.mark.parametrize("queries", [0, 12])
@pytest.mark.parametrize("peer", [p for p in ranking.PEERS if p != "OML"])
def test_peers_agree_where_there_are_no_ties(peer, queries):
    data = ranking.problem(150, queries, 16, 5)
    assert ranking.RUN[peer](*data) == pytest.approx(ranking.run_hamlet(*data), abs=2e-6)


@pytest.mark.parametrize("case", differences.CASES, ids=lambda case: case["case"])
def test_hamlet_gives_the_hand_results(case):
    right = float(Fraction(case["by hand"]))
    assert differences.answer(ranking.run_hamlet, case) == pytest.approx(right, abs=1e-6)
    assert math.isclose(ranking.run_hamlet(*differences.embedded(case)), right, abs_tol=1e-12)


def test_the_stored_answers_are_those_of_today():
    stored = json.loads((ROOT / "results" / "benchmarks" / "library_differences.json").read_text())["cases"]
    for case, answers in zip(differences.CASES, stored, strict=True):
        for name in ("hamlet", "scikit-learn", "torchmetrics", "pytrec_eval", "faiss, sorted results"):
            assert differences.answer(differences.LIBRARIES[name], case) == answers["answers"][name], case


def test_an_absent_or_failing_library_is_named_in_the_table():
    def absent(*_):
        raise ImportError

    def failing(*_):
        raise RuntimeError("broken")

    assert differences.answer(absent, differences.CASES[0]) == "not installed"
    assert differences.answer(failing, differences.CASES[0]) == "RuntimeError: broken"


def test_a_measurement_is_stored_and_becomes_a_table(tmp_path):
    """The whole road at a small size; a peer that fails says why in its row."""
    command = [sys.executable, "benchmarks/ranking.py", "--sizes", "300", "--peers", "OML", "--name", "small"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"HAMLET_OUTPUT": str(tmp_path)}, check=True)
    record = json.loads((tmp_path / "results" / "benchmarks" / "ranking" / "small.json").read_text())
    assert [m["method"] for m in record["measured"]] == ["product", "hamlet", "OML"]
    assert record["measured"][1]["mAP"] > 0.1 and record["provenance"]["versions"]["numpy"]
    assert record["measured"][2].get("mAP") or "Error" in record["measured"][2]["note"]
    table = pd.read_csv(tmp_path / "tables" / "benchmarks" / "ranking_small.csv")
    assert table["CPU / product"][0] == 1 and table["mAP less hamlet's"][1] == 0


COMMITTED = ROOT / "tables" / "benchmarks"


def test_the_committed_tables_come_back_byte_for_byte(tmp_path):
    shutil.copytree(ROOT / "results" / "benchmarks", tmp_path / "results" / "benchmarks")
    made = ranking.remake(tmp_path) + differences.remake(tmp_path)
    assert {path.name for path in made} == {path.name for path in COMMITTED.iterdir()}
    for path in made:
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
    looks, path = load("workflow/looks.py"), tmp_path / "looks.csv"
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


def test_parts_of_a_network_are_taken_out_and_put_back():
    inside, images = load("workflow/inside.py"), torch.rand(4, 3, 64, 64)
    net = create_model("hamlet", backbone="test_resnet", layer_scale=1.0).eval()
    with torch.no_grad():
        net.to_c5.weight.normal_()
        before = net(images)
        for part in inside.PARTS:
            with inside.without(net, part):
                assert not torch.allclose(net(images), before, atol=1e-4), part
            assert torch.equal(net(images), before), part
    found = inside.sizes(net, images)
    assert 0 < found["gate_entropy"] <= 1 and 0 < found["kept"] <= 1 and found["update"] > 0.1
    assert -1 <= found["level_cosine"] <= 1
    assert "gate_entropy" not in inside.sizes(create_model("hamlet", backbone="test_resnet", gate=False).eval(), images)
