"""The audit of the reported tables by hand-computed cases, and its simulations against exact probabilities."""

import numpy as np
import pytest

from hamlet.artifact import audit


def test_nearest_multiple_by_hand():
    # 0.93 * 0.4120 = 0.38316 -> 0.3832; 0.85 * 0.3450 = 0.29325 rounds either way; 0.3833 is no multiple
    cells, base = np.array([3832, 2933, 2932, 3833]), np.array([4120, 3450, 3450, 4120])
    k, hit = audit.nearest_multiple(cells, base)
    assert k.tolist() == [93, 85, 85, 93] and hit.tolist() == [True, True, True, False]


def test_nearest_multiple_agrees_with_a_search_over_all_multiples():
    g = np.random.default_rng(0)
    for cell, base in zip(g.integers(100, 9999, 300), g.integers(500, 9999, 300), strict=True):
        products = np.arange(0, 3000) * int(base)
        best = np.abs(products - 100 * int(cell)).min()
        k, hit = audit.nearest_multiple(np.int64(cell), np.int64(base))
        assert abs(int(k) * int(base) - 100 * int(cell)) == best and bool(hit) == (best <= 50)


def test_the_reported_tables():
    assert audit.identical_rows("accuracy") == [
        ("HAMLET_MobileNetV3", "MACE_ResNet18"),
        ("SPARSE_MobileNetV3", "DSCF_ResNet18"),
    ]
    assert audit.identical_rows("efficiency") == []
    assert audit.multiples("accuracy")["hit"].sum() == len(audit.multiples("accuracy")) == 24
    assert audit.multiples("efficiency")["hit"].sum() == len(audit.multiples("efficiency")) == 18
    first = audit.multiples("efficiency").iloc[1]
    assert (first["printed"], first["multiple"]) == ("70.68", 0.55) and first["product"] == pytest.approx(
        70.675
    )
    control = audit.control_bases().query("base != 'HAMLET_ResNet18'")
    assert control["hits"].max() == 4 and len(control) == 12


def test_the_pattern_of_the_multiples():
    wide = audit.multiples("accuracy").pivot(index="model", columns="metric", values="multiple")
    offsets = wide.sub(wide["mAP"], axis=0)[["mAP", "P@1", "P@5", "P@10"]].to_numpy()
    assert offsets == pytest.approx(np.tile([0, 0.01, -0.01, -0.02], (6, 1)))


def test_percentages_hold_sixteen_and_one_is_truncated():
    found = audit.percentages().set_index("id")
    assert len(found) == 16 and (found["lowest"] < found["recomputed"]).all()
    assert found.index[found["arithmetic"] != "holds"].tolist() == ["S4.2-9"]


def test_simulated_hits_have_their_exact_rate():
    """A cell uniform over its window hits with the share of printable values that are hits, up to its ends."""
    for table in ("accuracy", "efficiency"):
        cells = audit.multiples(table).drop_duplicates(["metric", "printed"])
        hits = audit.simulate(table, "uniform", 40_000)
        assert hits.mean() == pytest.approx(cells["chance"].sum(), abs=0.03)
        assert hits.var() == pytest.approx((cells["chance"] * (1 - cells["chance"])).sum(), rel=0.05)


def test_the_simulation_would_see_the_pattern(monkeypatch):
    """Two-decimal truth without noise reaches every cell: a simulation that cannot hit proves nothing."""
    monkeypatch.setattr(
        audit, "_draw", lambda t, n, rows, base, scale, size, rng: np.broadcast_to(rows, size)
    )
    for table, cells in (("accuracy", 16), ("efficiency", 18)):
        assert (audit.simulate(table, "two-decimal truth", 10) == cells).all()


def test_chance_tables_and_figure():
    chance = audit.chance_of_multiples(2000)
    assert (chance["hits"] == chance["cells"]).all() and (chance["tables that reach it"] == 0).all()
    assert chance["probability at most"].unique() == pytest.approx([1 - 0.025 ** (1 / 2000)])
    assert audit.chance_of_multiples(2000).equals(chance)
    alike = audit.chance_of_identical_rows(20_000)
    assert 0 < alike["share"].max() < 0.001 and (alike["share"] < alike["probability at most"]).all()
    with pytest.raises(ValueError, match="unknown null model 'none'"):
        audit.simulate("accuracy", "none")
    data = audit.figure_data(2000)
    shares = data[data["panel"] == "chance"].groupby(["table", "series"])["y"].sum()
    assert shares.to_numpy() == pytest.approx(1)
    assert len(audit.figure(data).axes) == 4
