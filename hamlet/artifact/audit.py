"""An even-handed audit of the reported tables: percentages, identical rows, two-decimal multiples, and chance.

Anchors: Brown and Heathers, The GRIM Test, Social Psychological and Personality Science, 2017 (what printed digits
allow); Clopper and Pearson, Biometrika, 1934 (Monte Carlo error of a probability). It states what the digits are and
how often figures of one stated kind would be so. It says nothing about how the report's figures came about.
"""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from hamlet.artifact.figures import new_figure
from hamlet.artifact.paper import Paper, reported

BASE = "HAMLET_ResNet18"
TABLES = ("accuracy", "efficiency")


def units(table: str) -> tuple[pd.DataFrame, dict[str, int]]:
    """Reported cells as whole numbers of their last printed digit (0.3450 -> 3450), and units in one by column."""
    printed = reported(table)
    scale = {c: 10 ** len(printed[c].iloc[0].partition(".")[2]) for c in printed}
    return printed.apply(lambda column: column.str.replace(".", "", regex=False).astype(np.int64)), scale


def nearest_multiple(cell: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k, hit): the whole k that brings k/100 * base nearest to cell, and whether it rounds to cell (a half may go
    either way). Both in units of the last printed digit, so the test is exact whole-number arithmetic."""
    k = np.floor_divide(200 * cell + base, 2 * base)
    return k, np.abs(k * base - 100 * cell) <= 50


def multiples(table: str, base: str = BASE) -> pd.DataFrame:
    """One row for each cell outside the base row: printed value, ratio, nearest multiple, product, hit, and offset:
    the distance to the multiple in hundredths of the base cell, from -0.5 to 0.5."""
    numbers, scale = units(table)
    cell = numbers.drop(index=base).stack()
    metric = cell.index.get_level_values(1)
    origin, one = metric.map(numbers.loc[base]), metric.map(scale)
    k, hit = nearest_multiple(cell, origin)
    rows = {"printed": reported(table).stack()[cell.index], "ratio": cell / origin, "multiple": k / 100}
    rows |= {"product": k * origin / 100 / one, "hit": hit, "offset": (100 * cell - k * origin) / origin}
    found = pd.DataFrame(rows).rename_axis(["model", "metric"]).reset_index()
    return found.assign(table=table)[["table", *found]]


def identical_rows(table: str) -> list[tuple[str, ...]]:
    """Groups of configurations whose printed cells agree in every column."""
    grouped = reported(table).groupby(list(reported(table).columns), sort=False).groups.values()
    return [tuple(group) for group in grouped if len(group) > 1]


def percentages() -> pd.DataFrame:
    """Every percentage of the text, recomputed from the printed tables, with the values that rounding allows."""
    paper, rows = Paper(), []
    for claim in (c for c in paper.claims if c.get("unit") == "%"):
        word, *values = paper.arithmetic(claim)
        rows.append([claim["id"], claim["english"], claim["reported"] + "%", *values, word, claim.get("note", "")])
    columns = "id statement reported recomputed lowest highest arithmetic note"
    return pd.DataFrame(rows, columns=columns.split())


def chance(simulations: int = 200_000, seed: int = 0) -> pd.DataFrame:
    """How many cells would be two-decimal multiples by chance: each cell anywhere within 10% of the reported value, the
    base row as printed, identical rows counted once. "probability at most" is the upper end of the 95% Clopper-Pearson
    interval for a table with as many hits as the reported one."""
    rows = []
    for table in TABLES:
        numbers = units(table)[0]
        cells = numbers.drop(index=BASE).drop_duplicates().to_numpy(np.float64)
        base, rng = numbers.loc[BASE].to_numpy(), np.random.default_rng(seed)
        drawn = np.rint(cells * rng.uniform(0.9, 1.1, (simulations, *cells.shape))).astype(np.int64)
        hits = nearest_multiple(drawn, base)[1].sum(axis=(1, 2))
        found = int(nearest_multiple(cells.astype(np.int64), base)[1].sum())
        reach = int((hits >= found).sum())
        row = {"table": table, "cells": cells.size, "hits reported": found, "mean hits by chance": hits.mean()}
        row |= {"most hits": int(hits.max()), "simulations": simulations, "tables that reach it": reach}
        upper = stats.binomtest(reach, simulations).proportion_ci(method="exact").high
        rows.append(row | {"probability at most": upper})
    return pd.DataFrame(rows)


def figure_data() -> pd.DataFrame:
    """`multiples` of both tables with every row as base in turn: base, table, model, metric, offset, hit."""
    parts = [multiples(t, base).assign(base=base) for t in TABLES for base in reported(t).index]
    return pd.concat(parts, ignore_index=True)[["base", "table", "model", "metric", "offset", "hit"]]


def figure(data: pd.DataFrame, expected: float) -> Figure:
    """Where each reported cell lies between two-decimal multiples, for each row taken as base. expected: hits by
    chance among the 42 cells of one base."""
    bases = list(dict.fromkeys(data["base"]))
    counts = data.groupby("base")["hit"].agg(["sum", "count"]).loc[bases]
    title = (
        f"Divide the other rows of the report's Tables 1 and 2 by one row: all {counts['count'].iloc[0]} ratios to "
        f"{BASE}\nare two-decimal numbers (such as 0.92), to rounding. By chance about {expected:.1f} would be"
    )
    told = ", ".join(f"{base} {row['sum']} of {row['count']}" for base, row in counts.iterrows())
    drawing, axes = new_figure(1, 1, (10, 4.6), title, f"Ratios that are two-decimal, by base row: {told}.")
    axis = axes[0, 0]
    for place, base in enumerate(bases):
        cells = data[data["base"] == base]
        for hit, part in cells.groupby("hit"):
            y = place + np.where(part["table"] == "accuracy", -0.13, 0.13)
            axis.scatter(part["offset"], y, 24, "black" if hit else "white", edgecolors="black", linewidths=0.8)
        axis.text(0.56, place, f"{int(cells['hit'].sum())} of {len(cells)}", va="center")
    axis.set_yticks(range(len(bases)), [f"divided by\n{base}" for base in bases])
    axis.set(xlim=(-0.55, 0.55), ylim=(len(bases) - 0.5, -0.5))
    axis.set_xlabel(
        "distance of a ratio to the nearest two-decimal number, in steps of 0.01; each dot is one cell\n"
        "filled: within rounding of the printed digits; open: not. Upper dots of a line: Table 1, lower: Table 2"
    )
    drawing.suptitle(f"{title}.", fontsize=11)
    return drawing
