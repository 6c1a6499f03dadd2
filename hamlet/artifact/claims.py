"""A verdict on every claim of the report, and paired comparisons of every configuration, from the results
folder.

The rule and its history stand in the header of ``data/paper/claims.yaml``; this module applies it. Its inputs
are what ``hamlet.artifact.results`` loads and verifies, and the per-query values of each run. A missing run is a reason
in the table, never a number.
"""

import contextlib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from hamlet import statistics as st
from hamlet.artifact import results as report
from hamlet.artifact.paper import Paper, atoms, tolerance

ALPHA = 0.05
PER_QUERY = ("AP", "P@1", "P@5", "P@10")
ONCE = "memory was measured once"  # no uncertainty is known


@dataclass
class Measured:
    """Paired results of one data set: ``values[run]`` (seeds, queries, 4) in PER_QUERY's order, ``labels``
    (queries,).
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray | None = None
    efficiency: dict[str, dict] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        """The most seeds of any run; below two, no interval has a part for the seeds."""
        return max(map(len, self.values.values()), default=0)


def load_measured(profile: str, dataset: str, protocol: str = "default") -> Measured:
    """Every finished run, verified by ``hamlet.artifact.results``. report.ResultError if a file changed since its run,
    ValueError if the queries differ between runs.
    """
    measured, by_run, reference = Measured(), {}, None
    with contextlib.suppress(FileNotFoundError):  # nothing was run: the table says so, claim by claim
        for _, row in report.load_results(profile, dataset).iterrows():
            frame = _per_query(row["folder"] / "per_query.parquet", protocol)
            keys = frame[["query", "path", "label"]]
            reference = keys if reference is None else reference
            if not keys.equals(reference):
                raise ValueError(
                    f"{row['folder']}: its queries differ from those of the other runs; run it again"
                )
            by_run.setdefault(row["run"], []).append(frame[list(PER_QUERY)].to_numpy(np.float64))
    measured.values = {run: np.stack(seeds) for run, seeds in by_run.items()}
    measured.labels = None if reference is None else reference["label"].to_numpy()
    with contextlib.suppress(FileNotFoundError):
        measured.efficiency = report.load_efficiency(profile, dataset)["models"]
    return measured


def _per_query(path: Path, protocol: str) -> pd.DataFrame:
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
            run, column = self.paper.models[model]["run"], self.paper.metrics[metric]["measured"]
            if column in PER_QUERY and run not in self.measured.values:
                lacking.append(run)
            elif column not in PER_QUERY and self.measured.efficiency.get(run, {}).get(column) is None:
                # a device may not tell its memory
                lacking.append(f"{'memory' if run in self.measured.efficiency else 'efficiency'} of {run}")
        return list(dict.fromkeys(lacking))

    def measured_once(self, formula: str) -> bool:
        """Whether a formula uses a memory that was measured in one process: an interval would have no width."""
        runs = [self.paper.models[m]["run"] for metric, m in self.paper.cells(formula) if metric == "memory"]
        return any("memory_mb_q25" not in self.measured.efficiency[run] for run in runs)

    def point(self, metric: str, model: str) -> float:
        run, column = self.paper.models[model]["run"], self.paper.metrics[metric]["measured"]
        if column in PER_QUERY:
            return float(self.measured.values[run][:, :, PER_QUERY.index(column)].mean())
        return float(self.measured.efficiency[run][column])

    def draws(self, metric: str, model: str) -> np.ndarray:
        """(resamples,): accuracy by nested bootstrap; latency and memory so that quartiles and median are the
        measured ones.

        The spread of single calls (of processes, for memory) stands for the uncertainty of their median: wider
        than the latter's own, which would count calls on a shared machine as independent. Parameters are exact.
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
    """The rule of claims.yaml for one claim whose formula was measured. interval: of the value, or of the
    margin of the part that decides.
    """
    if not p_holm < ALPHA:
        return "not reproduced"
    if interval.high < 0:
        return "contradicted"
    if not interval.low > 0:
        return "not reproduced"
    if claim["kind"] != "quantitative":
        return "reproduced"
    target, slack = float(claim["reported"]), tolerance(claim)
    return (
        "reproduced"
        if interval.low <= target + slack and interval.high >= target - slack
        else "direction only"
    )


def _measure(formula: str, source: Replicates) -> tuple[str, st.Interval, float]:
    """The part that decides, the interval of its value or margin, and the two-sided p of the whole."""
    parts = atoms(formula, source.paper.groups)
    points = [source.paper.evaluate(part, source.point)[0] for part in parts]
    draws = [source.paper.evaluate(part, source.draws)[0] for part in parts]
    sides = np.array([st.bootstrap_p_values(d) for d in draws])
    # all parts must hold: the weakest supports the claim; one that surely fails refutes it (Bonferroni)
    support, against = sides[:, 0].max(), min(1.0, sides[:, 1].min() * len(sides))
    deciding = sides[:, 0] == support if support <= against else sides[:, 1] == sides[:, 1].min()
    worst = min(np.flatnonzero(deciding), key=lambda i: points[i])
    interval = st.percentile_interval(points[worst], draws[worst])
    return parts[worst], interval, min(1.0, 2 * min(support, against))


def _judged(source: Replicates) -> pd.DataFrame:
    """decided_by, value, low, high, p, p_holm, verdict and reason of every claim, from one set of replicates."""
    rows = []
    for claim in source.paper.claims:
        row = {"decided_by": "", **dict.fromkeys(("value", "low", "high", "p"), np.nan)}
        row["reason"] = claim.get("not_testable", "")
        if "formula" in claim and (lacking := source.missing(claim["formula"])):
            row["reason"] = row["reason"] or f"missing: {', '.join(lacking)}"
        elif "formula" in claim:
            part, interval, p = _measure(claim["formula"], source)
            row |= {"value": interval.estimate, "low": interval.low, "high": interval.high}
            row["decided_by"] = part if claim["kind"] != "quantitative" else ""
            if source.measured_once(claim["formula"]):
                row |= {"low": np.nan, "high": np.nan, "reason": row["reason"] or ONCE}
            row["p"] = np.nan if row["reason"] else p
        rows.append(row)
    table = pd.DataFrame(rows)
    table["p_holm"] = st.holm(table["p"])
    table["verdict"] = [
        "not testable here"
        if row["reason"]
        else verdict(claim, st.Interval(row["value"], row["low"], row["high"]), row["p_holm"])
        for claim, row in zip(source.paper.claims, table.to_dict("records"), strict=True)
    ]
    return table


def claims_table(profile: str, dataset: str, *, resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """One row for each claim, in the report's order: arithmetic, measured value, interval, p, verdict,
    reason.

    ``value`` is in the claim's unit; for a statement it is the margin in per cent of the part that decides it,
    ``decided_by``. ``low`` to ``verdict`` resample queries, the columns that end in ``_classes`` whole classes
    of queries: what holds for classes not seen here. Costs have the same replicates in both.
    """
    paper, measured = Paper(), load_measured(profile, dataset)
    keys = ("id", "section", "kind", "english", "reported", "unit", "note", "japanese", "formula")
    stated = pd.DataFrame([{key: claim.get(key, "") for key in keys} for claim in paper.claims])
    arithmetic = [paper.arithmetic(claim) for claim in paper.claims]
    stated["arithmetic"] = [word for word, _ in arithmetic]
    stated["recomputed"] = [np.nan if value is None else float(value) for _, value in arithmetic]
    queries, classes = (
        _judged(Replicates(paper, measured, resamples, seed, by_class)) for by_class in (False, True)
    )
    classes = classes[["decided_by", "low", "high", "p", "p_holm", "verdict"]].add_suffix("_classes")
    return pd.concat([stated, queries, classes], axis=1).assign(seeds=measured.seeds)


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
    row |= {"seeds": f"{len(a)}/{len(b)}", "queries": a.shape[1]}
    if min(len(a), len(b)) < 2:
        return row | {"improvement": np.nan, "reason": "P(improvement) needs two seeds of both"}
    improvement = st.probability_of_improvement([a.mean(axis=1)], [b.mean(axis=1)])
    return row | {"improvement": improvement.estimate, "reason": ""}


def comparisons(profile: str, dataset: str, *, resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """Paired comparisons in mAP: difference with its nested and class-wise intervals, randomisation p, Holm,
    effects.

    ``p`` is over queries, on the means over seeds; ``p_holm`` corrects over all rows. ``improvement`` is the
    probability that a run of ``first`` beats one of ``second``, over the seeds at hand; NaN below two of each.
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


def improvement(profile: str, *, resamples: int = 2_000, seed: int = 0) -> pd.DataFrame:
    """Probability of improvement over data sets (Agarwal et al. 2021) of the pairs that ``comparisons`` has.

    Every data set of the profile counts on which both configurations have two seeds; one row of strings a pair.
    """
    paper, stored, refused, rows = Paper(), {}, [], []
    for dataset in report.stored_datasets(profile):
        try:
            stored[dataset] = load_measured(profile, dataset).values
        except ValueError:  # another data set's damage: its own build explains it
            refused.append(f"{dataset} left out: its results do not verify")
    for names in _pairs(paper):
        pair = [paper.models[name]["run"] for name in names]
        sides = {
            d: [v[run][:, :, 0].mean(axis=1) for run in pair] for d, v in stored.items() if {*pair} <= {*v}
        }
        several = {d: ab for d, ab in sides.items() if min(map(len, ab)) > 1}
        row = dict(zip(("First", "Second"), (paper.models[name]["label"] for name in names), strict=True))
        row |= {"P(improvement)": "", "95%, seeds": "", "Data sets (seeds)": ""}
        if several:
            found = st.probability_of_improvement(
                *zip(*several.values(), strict=True), resamples=resamples, seed=seed
            )
            row["P(improvement)"] = f"{found.estimate:.2f}"
            row["95%, seeds"] = f"[{found.low:.2f}, {found.high:.2f}]"
            counts = [f"{d} ({len(a)}/{len(b)})" for d, (a, b) in several.items()]
            row["Data sets (seeds)"] = ", ".join(counts + refused)
        rows.append(row | {"Why empty": "" if several else "needs two seeds of both on a data set"})
    return pd.DataFrame(rows)


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """A claims or comparisons table as strings for ``hamlet.artifact.results.write_table``: rounded, intervals in
    brackets, named by what was resampled.

    The Japanese text and the formulas stay in data/paper/claims.yaml, under the same id.
    """
    claims = "verdict" in table
    several = table["seeds"].gt(1) if claims else table["seeds"].dropna().ne("1/1")
    over = "95%, seeds x " if several.any() else "95%, "
    # accuracies have four decimals, per cent one
    fine = table["unit"].eq("") & table["kind"].eq("quantitative") if claims else pd.Series(True, table.index)

    def spans(ends: str) -> pd.Series:
        rows = zip(table["low" + ends], table["high" + ends], fine.map({True: 4, False: 1}), strict=True)
        texts = ["" if np.isnan(low) else f"[{low:.{d}f}, {high:.{d}f}]" for low, high, d in rows]
        return pd.Series(texts, table.index, dtype=object)

    def number(column: str, decimals: int) -> pd.Series:
        return table[column].map(lambda value: "" if pd.isna(value) else f"{value:.{decimals}f}")

    intervals = {f"{over}queries": spans(""), f"{over}classes": spans("_classes")}
    if claims:
        columns = {"Claim": table["id"], "Statement": table["english"]}
        columns |= {"Reported": table["reported"] + table["unit"], "Arithmetic": table["arithmetic"]}
        columns |= {"Measured": number("value", 1).mask(fine, number("value", 4))}
        # in words, which LaTeX prints in every font
        decided, other = (
            table[key].str.replace(" > ", " above ").str.replace(" < ", " below ")
            for key in ("decided_by", "decided_by_classes")
        )
        # the interval over classes names its part where that is another one
        intervals[f"{over}classes"] += (" of " + other).where(other != decided, "")
        columns |= {"Decided by": decided, **intervals, "p (Holm)": number("p_holm", 4)}
        columns |= {"Verdict": table["verdict"], "Verdict, other classes": table["verdict_classes"]}
        return pd.DataFrame(columns | {"Why not": table["reason"]})
    columns = {"First": table["first"], "Second": table["second"]}
    columns |= {"Difference in mAP": number("difference", 4), **intervals}
    columns |= {"p": number("p", 4), "p (Holm)": number("p_holm", 4), "d_z": number("d_z", 2)}
    columns |= {"Rank-biserial": number("rank_biserial", 2), "P(improvement)": number("improvement", 2)}
    columns |= {"Seeds": table["seeds"].astype(object).where(table["seeds"].notna(), "")}
    return pd.DataFrame(columns | {"Why empty": table["reason"]})
