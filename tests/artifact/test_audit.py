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
    assert (first["printed"], first["multiple"]) == ("70.68", 0.55) and first["product"] == pytest.approx(70.675)
    by_base = audit.figure_data().groupby("base")["hit"].sum()
    assert by_base.pop("HAMLET_ResNet18") == 42 and by_base.max() == 5 and len(by_base) == 6


def test_the_pattern_of_the_multiples():
    wide = audit.multiples("accuracy").pivot(index="model", columns="metric", values="multiple")
    offsets = wide.sub(wide["mAP"], axis=0)[["mAP", "P@1", "P@5", "P@10"]].to_numpy()
    assert offsets == pytest.approx(np.tile([0, 0.01, -0.01, -0.02], (6, 1)))


def test_percentages_hold_sixteen_and_one_is_truncated():
    found = audit.percentages().set_index("id")
    assert len(found) == 16 and (found["lowest"] < found["recomputed"]).all()
    assert found.index[found["arithmetic"] != "holds"].tolist() == ["S4.2-9"]


def test_simulated_hits_have_their_exact_rate():
    """A cell anywhere within 10% hits with the share of printable values there that are hits."""
    for row in audit.chance(40_000).itertuples():
        numbers = audit.units(row.table)[0]
        cells, base, expected = numbers.drop(index=audit.BASE).drop_duplicates(), numbers.loc[audit.BASE], 0.0
        for metric in cells:
            for cell in cells[metric]:
                window = np.arange(-(-9 * cell // 10), 11 * cell // 10 + 1)
                expected += audit.nearest_multiple(window, base[metric])[1].mean()
        assert row[4] == pytest.approx(expected, abs=0.03)


def test_chance_counts_and_repeats():
    chance = audit.chance(2000)
    assert chance["cells"].tolist() == [16, 18]
    assert (chance["hits reported"] == chance["cells"]).all() and (chance["tables that reach it"] == 0).all()
    assert chance["probability at most"].unique() == pytest.approx([1 - 0.025 ** (1 / 2000)])
    assert audit.chance(2000).equals(chance)


def test_a_table_that_has_as_many_hits_reaches_the_reported_one(monkeypatch):
    monkeypatch.setattr(audit, "nearest_multiple", lambda cell, _: (cell, np.ones(cell.shape, bool)))
    chance = audit.chance(50)
    assert (chance["tables that reach it"] == 50).all() and (chance["probability at most"] == 1).all()


def test_the_figure_can_be_read_without_its_notebook():
    figure = audit.figure(audit.figure_data(), 1.1)
    assert "By chance about 1.1 would be" in figure.get_suptitle() and "42" in figure.get_suptitle()
    assert "HAMLET_ResNet18 42 of 42" in figure.get_label()
    assert len(figure.axes[0].texts) == 7
