"""The benchmark's peers measure the same thing, and the table of differences holds its hand results."""

import importlib.util
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranking, differences = load("ranking"), load("library_differences")


@pytest.mark.parametrize("queries", [0, 12])
@pytest.mark.parametrize("peer", [p for p in ranking.RUN if p not in ("hamlet", "product")])
def test_peers_agree_where_there_are_no_ties(peer, queries):
    pytest.importorskip(ranking.PEERS[peer])
    data = ranking.problem(150, queries, 16, 5)
    assert ranking.RUN[peer](*data, 1) == pytest.approx(ranking.run_hamlet(*data, 1), abs=2e-6)


@pytest.mark.parametrize("peer", ["hamlet", "product", "pytorch-metric-learning", "OML", "torchmetrics"])
def test_what_runs_on_a_card_takes_tensors(peer):
    """The code of ``--device cuda``, on tensors that lie in ordinary memory."""
    pytest.importorskip(ranking.PEERS[peer])
    data = ranking.problem(150, 12, 16, 5)
    value = ranking.RUN[peer](*map(torch.from_numpy, data), 1)
    assert value == pytest.approx(ranking.RUN[peer](*data, 1), abs=1e-6, nan_ok=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is there")
def test_without_a_card_the_option_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ranking.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        ranking.main()
    assert "torch finds no NVIDIA GPU" in capsys.readouterr().err


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


TABLES = FOLDER.parent / "tables" / "benchmarks"


def committed(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / f"{name}.csv", dtype=str).set_index("method")


@pytest.mark.parametrize(
    ("name", "ratio", "megabytes"),
    [("ranking", 2.5, 50), ("ranking_60000", 2.5, 1000), ("ranking_1000000", 4, 1000)],
)
def test_committed_figures_keep_the_promised_cost(name, ratio, megabytes):
    ours = committed(name).loc["hamlet"]
    assert float(ours["CPU / matrix product"]) <= ratio and float(ours["extra MB"]) < megabytes


@pytest.mark.parametrize("name", ["ranking", "ranking_oml"])
def test_committed_figures_are_ten_times_below_the_best_library(name):
    ratios = committed(name)["CPU / matrix product"].dropna().astype(float)
    assert ratios.drop(["product", "hamlet"]).min() >= 10 * ratios["hamlet"]


def test_committed_growth_is_close_to_linear():
    """Eight times the gallery, with the classes or with the positives held fixed."""
    growth = pd.read_csv(TABLES / "ranking_growth.csv", dtype=str)
    size, positives = (growth[c].str.replace(",", "").astype(int) for c in ("gallery", "positives a query"))
    cost = growth["ns a pair"].astype(float)
    for rows in (positives == size // 100, positives == 100):
        assert sorted(size[rows]) == [10000, 20000, 40000, 80000]
        assert cost[rows].max() / cost[rows].min() < 1.3  # 8 with quadratic growth
