"""A verdict on every claim of the report, and paired comparisons of every configuration, from the results
folder.

The rule stands in the header of ``data/paper/claims.yaml`` and was fixed before the results; this module
applies it. Inputs: ``result.json`` and ``per_query.parquet`` of each run, ``efficiency/result.json``; read
here directly, so that a table can be followed back to files. A missing run is a reason in the table, never a
number.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hamlet import paths
from hamlet import statistics as st
from hamlet.paper import Paper, tolerance

ALPHA = 0.05
PER_QUERY = ("AP", "P@1", "P@5", "P@10")


@dataclass
class Measured:
    """Paired results of one data set: ``values[run]`` (seeds, queries, 4) in PER_QUERY's order, ``labels``
    (queries,).
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    efficiency: dict[str, dict] = field(default_factory=dict)

    def mean_over_seeds(self, run: str, column: str = "AP") -> np.ndarray:
        return self.values[run][:, :, PER_QUERY.index(column)].mean(axis=0)


def load_measured(profile: str, dataset: str, protocol: str = "default") -> Measured:
    """Read every finished run. ValueError if a file changed since its run or the queries differ."""
    folder, measured = paths.results_dir(profile, dataset), Measured()
    by_run: dict[str, list[np.ndarray]] = {}
    reference: pd.DataFrame | None = None
    for record in sorted(folder.glob("*/seed*/result.json")):
        frame = _per_query(record, protocol)
        keys = frame[["query", "path", "label"]]
        reference = keys if reference is None else reference
        if not keys.equals(reference):
            raise ValueError(
                f"{record.parent}: its queries differ from those of the other runs; run it again"
            )
        by_run.setdefault(record.parent.parent.name, []).append(frame[list(PER_QUERY)].to_numpy(np.float64))
    measured.values = {run: np.stack(seeds) for run, seeds in by_run.items()}
    measured.labels = None if reference is None else reference["label"].to_numpy()
    efficiency = folder / "efficiency" / "result.json"
    if efficiency.is_file():
        measured.efficiency = json.loads(efficiency.read_text())["models"]
    return measured


def _per_query(record: Path, protocol: str) -> pd.DataFrame:
    path = record.with_name("per_query.parquet")
    expected = json.loads(record.read_text())["files"][path.name]
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{path}: its sha256 differs from the one in {record.name}; run it again")
    frame = pd.read_parquet(path)
    frame = frame[frame["protocol"] == protocol].sort_values("query", ignore_index=True)
    if frame.empty or not np.isfinite(frame[list(PER_QUERY)]).all(axis=None):
        raise ValueError(f"{path}: protocol {protocol!r} is absent or holds values that are not finite")
    return frame


class Replicates:
    """Point estimates and replicates of any table cell, drawn once so that all claims share their queries."""

    def __init__(
        self, paper: Paper, measured: Measured, resamples: int = 10_000, seed: int = 0, by_class: bool = False
    ):
        self.paper, self.measured, self.resamples, self.seed = paper, measured, resamples, seed
        self.runs = sorted(measured.values)
        clusters = measured.labels if by_class else None
        self.accuracy = {
            # the same seed for each metric: its draws of queries and seeds agree with those of the others
            column: st.bootstrap_means(
                [measured.values[r][:, :, i] for r in self.runs], clusters, resamples, seed
            )
            for i, column in enumerate(PER_QUERY)
            if self.runs
        }

    def missing(self, formula: str) -> list[str]:
        """What a formula needs and the results folder does not hold."""
        lacking = []
        for metric, model in self.paper.cells(formula):
            run, accurate = self.paper.models[model]["run"], self.paper.metrics[metric]["table"] == "accuracy"
            if run not in (self.measured.values if accurate else self.measured.efficiency):
                lacking.append(run if accurate else f"efficiency of {run}")
        return list(dict.fromkeys(lacking))

    def point(self, metric: str, model: str) -> float:
        run, column = self.paper.models[model]["run"], self.paper.metrics[metric]["measured"]
        if column in PER_QUERY:
            return float(self.measured.values[run][:, :, PER_QUERY.index(column)].mean())
        return float(self.measured.efficiency[run][column])

    def draws(self, metric: str, model: str) -> np.ndarray:
        """(resamples,): accuracy by nested bootstrap; latency so that quartiles and median are the measured
        ones.

        The spread of single calls stands for the uncertainty of their median: wider than the latter's own,
        which would count calls on a shared machine as independent. Memory and parameters are single values.
        """
        run, column = self.paper.models[model]["run"], self.paper.metrics[metric]["measured"]
        if column in PER_QUERY:
            return self.accuracy[column][:, self.runs.index(run)]
        cell = self.measured.efficiency[run]
        middle, low, high = (float(cell.get(column + end, cell[column])) for end in ("", "_q25", "_q75"))
        key = int.from_bytes(hashlib.sha256(f"{run} {column}".encode()).digest()[:4], "big")
        z = np.random.default_rng([self.seed, key]).standard_normal(self.resamples) / stats.norm.ppf(0.75)
        return middle * np.exp(np.where(z < 0, np.log(middle / low), np.log(high / middle)) * z)


def verdict(claim: dict, interval: st.Interval, p_holm: float) -> str:
    """The rule of claims.yaml for one claim whose formula was measured. interval: of the value or smallest
    margin.
    """
    if not p_holm < ALPHA:
        return "not reproduced"
    if interval.high < 0:
        return "contradicted"
    if interval.low <= 0:
        return "not reproduced"
    if claim["kind"] != "quantitative":
        return "reproduced"
    target, slack = float(claim["reported"]), tolerance(claim)
    return (
        "reproduced"
        if interval.low <= target + slack and interval.high >= target - slack
        else "direction only"
    )


def _measure(formula: str, source: Replicates) -> tuple[st.Interval, float]:
    """Interval of the value (the decisive atom's margin for a statement) and the two-sided p of the whole."""
    points = source.paper.evaluate(formula, source.point)
    draws = source.paper.evaluate(formula, source.draws)
    sides = np.array([st.bootstrap_p_values(d) for d in draws])
    # all atoms must hold: the weakest supports the claim; one that surely fails refutes it (Bonferroni)
    support, against = sides[:, 0].max(), min(1.0, sides[:, 1].min() * len(sides))
    worst = int(np.argmin(points)) if support <= against else int(np.argmin(sides[:, 1]))
    return st.percentile_interval(points[worst], draws[worst]), min(1.0, 2 * min(support, against))


def claims_table(
    profile: str, dataset: str, *, resamples: int = 10_000, seed: int = 0, by_class: bool = False
) -> pd.DataFrame:
    """One row for each claim, in the report's order: arithmetic, measured value, interval, p, verdict,
    reason.

    ``value`` is in the claim's unit; for a statement it is the margin in per cent of the atom that decides it
    (the closest rival). ``by_class=True`` resamples whole classes of queries: the interval for classes not
    seen here.
    """
    paper = Paper()
    source = Replicates(paper, load_measured(profile, dataset), resamples, seed, by_class)
    rows = []
    for claim in paper.claims:
        arithmetic, recomputed = paper.arithmetic(claim)
        row = {key: claim.get(key, "") for key in ("id", "section", "kind", "english", "reported", "unit")}
        row |= {"arithmetic": arithmetic, "recomputed": np.nan if recomputed is None else float(recomputed)}
        row |= {
            "value": np.nan,
            "low": np.nan,
            "high": np.nan,
            "p": np.nan,
            "reason": claim.get("not_testable", ""),
        }
        if "formula" in claim:
            lacking = source.missing(claim["formula"])
            if lacking:
                row["reason"] = row["reason"] or f"missing: {', '.join(lacking)}"
            else:
                interval, p = _measure(claim["formula"], source)
                row |= dict(zip(("value", "low", "high"), interval, strict=True))
                row["p"] = np.nan if row["reason"] else p
        rows.append(row | {"japanese": claim["japanese"], "formula": claim.get("formula", "")})
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p") + 1, "p_holm", st.holm(table["p"]))
    verdicts = [
        "not testable here"
        if row["reason"]
        else verdict(claim, st.Interval(row["value"], row["low"], row["high"]), row["p_holm"])
        for claim, row in zip(paper.claims, table.to_dict("records"), strict=True)
    ]
    table.insert(table.columns.get_loc("p_holm") + 1, "verdict", verdicts)
    return table


def _pairs(paper: Paper) -> list[tuple[str, str]]:
    """Every configuration against HAMLET_ResNet18, then HAMLET_MobileNetV3 against its own controls."""
    mobile = ("HAMLET_MobileNetV3_no_text", "GeM_MobileNetV3", "MLP_MobileNetV3")
    first = [("HAMLET_ResNet18", model) for model in paper.models if model != "HAMLET_ResNet18"]
    return first + [("HAMLET_MobileNetV3", model) for model in mobile]


def _compare(a: np.ndarray, b: np.ndarray, draws: list[np.ndarray], permutations: int, seed: int) -> dict:
    """One row: a, b (seeds, queries) average precisions; draws: replicates of the difference, by query and
    class.
    """
    first, second = a.mean(axis=0), b.mean(axis=0)
    effects = st.effect_sizes(first, second)
    nested, classes = (st.percentile_interval(effects["mean_difference"], d) for d in draws)
    row = {"mAP_first": a.mean(), "mAP_second": b.mean(), "difference": nested.estimate}
    row |= {"low": nested.low, "high": nested.high, "low_classes": classes.low, "high_classes": classes.high}
    row |= {"p": st.randomisation_test(first, second, permutations=permutations, seed=seed)}
    row |= {"d_z": effects["d_z"], "rank_biserial": effects["rank_biserial"]}
    row |= {"improvement": st.probability_of_improvement([a.mean(axis=1)], [b.mean(axis=1)]).estimate}
    return row | {"seeds": f"{len(a)}/{len(b)}", "queries": a.shape[1], "reason": ""}


def comparisons(profile: str, dataset: str, *, resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Paired comparisons in mAP: difference with its nested and class-wise intervals, randomisation p, Holm,
    effects.

    ``p`` is over queries, on the means over seeds; ``p_holm`` corrects over all rows. ``improvement`` is the
    probability that a run of ``first`` beats one of ``second``, over the seeds at hand.
    """
    paper, measured = Paper(), load_measured(profile, dataset)
    runs = sorted(measured.values)
    values = [measured.values[run][:, :, 0] for run in runs]
    # one draw for all pairs: its cost does not grow with their number
    draws = [
        st.bootstrap_means(values, c, resamples, seed) if runs else None for c in (None, measured.labels)
    ]
    rows = []
    for names in _pairs(paper):
        pair = [paper.models[name]["run"] for name in names]
        row = dict(zip(("first", "second"), (paper.models[name]["label"] for name in names), strict=True))
        if lacking := [run for run in pair if run not in measured.values]:
            rows.append(row | {"p": np.nan, "reason": f"missing: {', '.join(lacking)}"})
            continue
        one, two = (runs.index(run) for run in pair)
        differences = [d[:, one] - d[:, two] for d in draws]
        rows.append(row | _compare(values[one], values[two], differences, resamples, seed))
    order = (
        "first second mAP_first mAP_second difference low high low_classes high_classes p d_z rank_biserial"
    )
    table = pd.DataFrame(rows).reindex(columns=[*order.split(), "improvement", "seeds", "queries", "reason"])
    table.insert(table.columns.get_loc("p") + 1, "p_holm", st.holm(table["p"]))
    return table


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """A claims or comparisons table as strings for ``hamlet.report.write_table``: rounded, intervals in
    brackets.

    The Japanese text and the formulas stay in data/paper/claims.yaml, under the same id.
    """

    def span(row: pd.Series, low: str, high: str, decimals: int) -> str:
        return "" if np.isnan(row[low]) else f"[{row[low]:.{decimals}f}, {row[high]:.{decimals}f}]"

    def number(column: str, decimals: int) -> pd.Series:
        return table[column].map(lambda value: "" if pd.isna(value) else f"{value:.{decimals}f}")

    if "verdict" in table:
        fine = table["unit"].eq("") & table["kind"].eq("quantitative")  # accuracies, not per cent
        columns = {
            "Claim": table["id"],
            "Statement": table["english"],
            "Reported": table["reported"] + table["unit"],
        }
        columns |= {
            "Arithmetic": table["arithmetic"],
            "Measured": number("value", 1).mask(fine, number("value", 4)),
        }
        spans = [
            span(row, "low", "high", 4 if f else 1)
            for f, (_, row) in zip(fine, table.iterrows(), strict=True)
        ]
        columns |= {"95% interval": spans, "p (Holm)": number("p_holm", 4), "Verdict": table["verdict"]}
        return pd.DataFrame(columns | {"Why not": table["reason"]})
    columns = {
        "First": table["first"],
        "Second": table["second"],
        "Difference in mAP": number("difference", 4),
    }
    for title, low, high in (
        ("95%, seeds x queries", "low", "high"),
        ("95%, classes", "low_classes", "high_classes"),
    ):
        columns[title] = [span(row, low, high, 4) for _, row in table.iterrows()]
    columns |= {"p": number("p", 4), "p (Holm)": number("p_holm", 4), "d_z": number("d_z", 2)}
    columns |= {"Rank-biserial": number("rank_biserial", 2), "P(improvement)": number("improvement", 2)}
    return pd.DataFrame(
        columns
        | {
            "Seeds": table["seeds"].astype(object).where(table["seeds"].notna(), ""),
            "Why empty": table["reason"],
        }
    )
