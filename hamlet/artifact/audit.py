"""An even-handed audit of the reported tables: percentages, identical rows, two-decimal multiples, and
chance.

Anchors: Brown and Heathers, The GRIM Test, Social Psychological and Personality Science, 2017 (what printed
digits allow); Clopper and Pearson, Biometrika, 1934 (Monte Carlo error of a probability). It states what the
digits are and how often figures of stated kinds would be so. It says nothing about how the report's figures
came about.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from hamlet.artifact.paper import Paper, reported

BASE = "HAMLET_ResNet18"
NULLS = {
    "uniform": "each cell anywhere within 10% of the reported value, all printed values equally likely",
    "row factor": "each row one scale between 0.8 and 1 (accuracy) or 0.35 and 1 (efficiency) times the base row, "
    "and 1% of noise in each cell",
    "query sampling": "accuracies as means over 5,000 queries (hits for P@k, AP of standard deviation 0.25); "
    "times with 1% of noise, memory and parameters anywhere within 1%",
    "two-decimal truth": "the true ratios are exactly the nearest two-decimal ones, measured with a noise of 0.1%",
}


def units(table: str) -> tuple[pd.DataFrame, dict[str, int]]:
    """Reported cells as whole numbers of their last printed digit (0.3450 -> 3450), and units in one for a
    column.
    """
    printed = reported(table)
    scale = {c: 10 ** len(printed[c].iloc[0].partition(".")[2]) for c in printed}
    return printed.apply(lambda column: column.str.replace(".", "", regex=False).astype(np.int64)), scale


def nearest_multiple(cell: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, hit): the whole k that brings k/100 * base nearest to cell, and whether it rounds to cell (a half
    may go either way). Both in units of the last printed digit, so the test is exact whole-number arithmetic.
    """
    k = np.floor_divide(200 * cell + base, 2 * base)
    return k, np.abs(k * base - 100 * cell) <= 50


def multiples(table: str, base: str = BASE) -> pd.DataFrame:
    """One row for each cell outside the base row: printed value, ratio, nearest multiple, product, hit, and
    ``chance``: the share of all printed values within 10% that would be hits."""
    numbers, scale = units(table)
    rows = []
    for model in numbers.index.drop(base):
        for metric in numbers:
            cell, origin = int(numbers.at[model, metric]), int(numbers.at[base, metric])
            k, hit = nearest_multiple(np.int64(cell), np.int64(origin))
            window = np.arange(-(-9 * cell // 10), 11 * cell // 10 + 1)
            rows.append(
                {
                    "model": model,
                    "metric": metric,
                    "printed": reported(table).at[model, metric],
                    "ratio": cell / origin,
                    "multiple": int(k) / 100,
                    "product": int(k) * origin / 100 / scale[metric],
                    "hit": bool(hit),
                    "offset": (100 * cell - int(k) * origin) / origin,
                    "chance": float(nearest_multiple(window, np.int64(origin))[1].mean()),
                }
            )
    return pd.DataFrame(rows)


def control_bases() -> pd.DataFrame:
    """Hits with every row of both tables taken as the base in turn: the same search where nothing is
    expected.
    """
    rows = []
    for table in ("accuracy", "efficiency"):
        for base in reported(table).index:
            cells = multiples(table, base)
            row = {"table": table, "base": base, "cells": len(cells), "hits": int(cells["hit"].sum())}
            rows.append(row | {"expected by chance": cells["chance"].sum()})
    return pd.DataFrame(rows)


def identical_rows(table: str) -> list[tuple[str, ...]]:
    """Groups of configurations whose printed cells agree in every column."""
    grouped = reported(table).groupby(list(reported(table).columns), sort=False).groups.values()
    return [tuple(group) for group in grouped if len(group) > 1]


def percentages() -> pd.DataFrame:
    """Every percentage of the text, recomputed from the printed tables, with the values that rounding allows."""
    paper, rows = Paper(), []
    for claim in (c for c in paper.claims if c.get("unit") == "%"):
        word, value = paper.arithmetic(claim)
        span = paper.evaluate(claim["formula"], paper.reported_span)[0]
        row = {"id": claim["id"], "statement": claim["english"], "reported": claim["reported"] + "%"}
        row |= {"recomputed": value, "lowest": span.low, "highest": span.high, "arithmetic": word}
        rows.append(row | {"note": claim.get("note", "")})
    return pd.DataFrame(rows)


def _distinct(table: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows (R, C), base row (C,), whole units in one (C,)): identical rows counted once, base row left out."""
    numbers, scale = units(table)
    rows = numbers.drop(index=BASE).drop_duplicates().to_numpy(np.float64)
    return rows, numbers.loc[BASE].to_numpy(np.int64), np.array([scale[c] for c in numbers])


def simulate(table: str, null: str, simulations: int = 200_000, seed: int = 0) -> np.ndarray:
    """Hits in simulated tables, int64 (simulations,), out of the distinct reported cells outside the base
    row.

    ``null`` is a key of NULLS. The base row stands as printed and each simulated cell is rounded to the
    printed decimals; identical reported rows count once, since a repeated row would repeat its hits.
    """
    if null not in NULLS:
        raise ValueError(f"unknown null model {null!r}; choose one of {list(NULLS)}")
    rows, base, scale = _distinct(table)
    rng, hits = np.random.default_rng([seed, list(NULLS).index(null)]), []
    for start in range(0, simulations, 50_000):
        size = (min(50_000, simulations - start), *rows.shape)
        cells = np.rint(_draw(table, null, rows, base, scale, size, rng)).astype(np.int64)
        hits.append(nearest_multiple(cells, base)[1].sum(axis=(1, 2)))
    return np.concatenate(hits)


def _draw(table, null, rows, base, scale, size, rng) -> np.ndarray:
    if null == "uniform":
        return rows * rng.uniform(0.9, 1.1, size)
    if null == "row factor":
        factor = rng.uniform(0.8 if table == "accuracy" else 0.35, 1, (*size[:2], 1))
        return base * factor * (1 + 0.01 * rng.standard_normal(size))
    if null == "two-decimal truth":
        truth = nearest_multiple(rows.astype(np.int64), base)[0] / 100 * base
        return truth * (1 + 0.001 * rng.standard_normal(size))
    if table == "efficiency":
        noise = np.array([1.0, 0.0, 0.0]) * 0.01 * rng.standard_normal(size)
        return rows * (1 + noise + np.array([0.0, 1.0, 1.0]) * rng.uniform(-0.01, 0.01, size))
    value = rows / scale
    draws = np.empty(size)
    draws[..., 0] = value[:, 0] + 0.25 / np.sqrt(5_000) * rng.standard_normal(size[:2])
    for column, k in ((1, 1), (2, 5), (3, 10)):
        draws[..., column] = rng.binomial(5_000 * k, value[:, column], size[:2]) / (5_000 * k)
    return draws * scale


def chance_of_multiples(simulations: int = 200_000, seed: int = 0) -> pd.DataFrame:
    """For each table and null model: mean and largest number of hits, how many simulated tables reach the
    reported number, and the upper end of the 95% Clopper-Pearson interval of that probability.

    ``log10 if independent`` is the number of cells times the logarithm of the mean hit rate: an extrapolation
    beyond what a simulation can reach, and an upper bound for independent cells (geometric below arithmetic
    mean).
    """
    rows = []
    for table in ("accuracy", "efficiency"):
        cells = multiples(table).drop_duplicates(["metric", "printed"])
        for null in NULLS:
            hits = simulate(table, null, simulations, seed)
            reach = int((hits >= len(cells)).sum())
            row = {"table": table, "null model": null, "cells": len(cells), "hits": int(cells["hit"].sum())}
            row |= {"mean hits": hits.mean(), "standard error": hits.std() / np.sqrt(len(hits))}
            row |= {"most hits": int(hits.max()), "tables that reach it": reach, "simulations": len(hits)}
            row |= {"probability at most": _upper(reach, len(hits))}
            rows.append(row | {"log10 if independent": len(cells) * np.log10(hits.mean() / len(cells))})
    return pd.DataFrame(rows)


def _upper(hits: int, simulations: int) -> float:
    return stats.binomtest(hits, simulations).proportion_ci(method="exact").high


def chance_of_identical_rows(simulations: int = 1_000_000, seed: int = 0) -> pd.DataFrame:
    """How often two different configurations print the same four accuracies, by kind of closeness.

    Two rows with true values up to ``gap`` apart (relative, uniform, one gap for the row), each cell's
    difference measured with relative noise ``noise``. gap 0 and noise 0.1% favours equality far beyond real
    query samples: equal truth and a difference known to a thousandth.
    """
    row = units("accuracy")[0].loc["MACE_ResNet18"].to_numpy(np.float64)
    rng, rows = np.random.default_rng(seed), []
    for gap, noise in ((0.0, 0.001), (0.0, 0.005), (0.02, 0.001), (0.1, 0.005)):
        same = 0
        for start in range(0, simulations, 100_000):
            size = min(100_000, simulations - start)
            shift = gap * rng.uniform(-1, 1, (size, 1)) + noise * rng.standard_normal((size, 4))
            same += int((np.rint(row * (1 + shift)) == row).all(axis=1).sum())
        upper = _upper(same, simulations)
        rows.append({"true gap up to": gap, "noise": noise, "identical": same, "simulations": simulations})
        rows[-1] |= {"share": same / simulations, "probability at most": upper, "two pairs at most": upper**2}
    return pd.DataFrame(rows)


def figure_data(simulations: int = 200_000, seed: int = 0) -> pd.DataFrame:
    """Tidy frame behind the figure. panel "cells": x the distance to the nearest multiple in steps of 0.01 of
    the base cell, one row for each cell and base; panel "chance": x a number of hits, y its share of tables.
    """
    parts = []
    for table in ("accuracy", "efficiency"):
        for base in reported(table).index:
            cells = multiples(table, base)
            part = pd.DataFrame({"series": base, "x": cells["offset"], "y": np.nan, "hit": cells["hit"]})
            parts.append(part.assign(panel="cells", table=table))
        for null in NULLS:
            share = np.bincount(simulate(table, null, simulations, seed)) / simulations
            part = pd.DataFrame({"series": null, "x": np.arange(len(share)), "y": share, "hit": False})
            parts.append(part.assign(panel="chance", table=table))
    return pd.concat(parts, ignore_index=True)[["table", "panel", "series", "x", "y", "hit"]]


def figure(data: pd.DataFrame) -> Figure:
    """Left: where each cell lies between two-decimal multiples, for each row taken as base. Right: hits in
    simulated tables beside the reported number. Shape, fill and dashes carry the reading, so it survives
    greyscale.
    """
    from hamlet.artifact.figures import STYLE

    with plt.rc_context(STYLE):
        drawing, axes = plt.subplots(2, 2, figsize=(9.5, 6.6), layout="constrained")
    plt.close(drawing)
    for (left, right), (table, part) in zip(axes, data.groupby("table"), strict=True):
        _draw_cells(left, table, part[part["panel"] == "cells"])
        _draw_chance(right, table, part[part["panel"] == "chance"])
    return drawing


def _draw_cells(ax: plt.Axes, table: str, part: pd.DataFrame) -> None:
    bases = list(reported(table).index)
    for y, base in enumerate(bases):
        cells = part[part["series"] == base]
        for hit, style in ((False, {"facecolors": "white"}), (True, {"facecolors": "black"})):
            shown = cells[cells["hit"] == hit]
            ax.scatter(shown["x"], np.full(len(shown), y), s=26, edgecolors="black", linewidths=0.8, **style)
        ax.text(0.56, y, f"{int(cells['hit'].sum())} of {len(cells)}", va="center", fontsize=8)
    ax.set(yticks=range(len(bases)), yticklabels=bases, xlim=(-0.55, 0.55), ylim=(len(bases) - 0.5, -0.5))
    ax.set_xlabel("distance to the nearest multiple, in steps of 0.01 of the base cell")
    ax.set_title(f"Reported {table}: each row as base (filled: rounds to the cell)", fontsize=9, loc="left")


def _draw_chance(ax: plt.Axes, table: str, part: pd.DataFrame) -> None:
    count = len(multiples(table).drop_duplicates(["metric", "printed"]))
    dashes = ("-", "--", ":", "-.")
    colours = ("#000000", "#0072B2", "#D55E00", "#009E73")
    for marker, line, colour, null in zip("osD^", dashes, colours, NULLS, strict=True):
        shown = part[(part["series"] == null) & (part["y"] > 0)]
        ax.plot(shown["x"], shown["y"], line, marker=marker, ms=4, lw=1.2, color=colour, label=null)
    ax.axvline(count, color="black", lw=2)
    offset = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "top"}
    ax.annotate(f"reported: {count} of {count}", (count, 1), **offset)
    ax.set(
        yscale="log", xlim=(-0.5, count + 0.8), ylim=(None, 2), xlabel="cells that are two-decimal multiples"
    )
    ax.set_xticks(range(0, count + 1, 2))
    ax.set_ylabel("share of simulated tables")
    ax.set_title(f"Simulated {table} (identical rows counted once)", fontsize=9, loc="left")
    ax.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(0.93, 0.88))
