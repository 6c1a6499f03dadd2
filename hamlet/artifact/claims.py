"""A verdict on every claim of the report, and paired comparisons of configurations, from the results folder.

The rule and its history stand in the header of ``data/paper/claims.yaml``; this module applies it to what
``hamlet.artifact.results`` loads and to the per-query values of each run. A missing run is a reason in the table,
never a number.
"""

import contextlib
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from hamlet import paths
from hamlet import statistics as st
from hamlet.artifact import results as stored
from hamlet.artifact.paper import REPORTED_BACKBONES, Comparison, Paper, expected_rows, foreign_backbone, label, meets
from hamlet.artifact.profiles import load_profile
from hamlet.artifact.tables import fixed, rounded, spans
from hamlet.errors import HamletError

ALPHA = 0.05
PER_QUERY = ("AP", "P@1", "P@5", "P@10")
STEADY = 9  # decimals of a replicate in per cent: what is equal must not differ by a processor's last bit


class Measured(NamedTuple):
    """Paired results of one data set: ``values[run]`` (seeds, queries, 4) in PER_QUERY's order, ``labels``
    (queries,), ``efficiency[run]``."""

    values: dict[str, np.ndarray]
    labels: np.ndarray | None
    efficiency: dict[str, dict]


def load_measured(profile: str, dataset: str, also: str | None = None) -> Measured:
    """Every finished run of a profile and, of profile ``also``, those that it lacks. ResultError if a file changed
    since its run, HamletError if the queries differ between runs."""
    by_run, reference, efficiency = {}, None, {}
    # where nothing was run the table says so, claim by claim
    for name in [name for name in (profile, also) if name and stored.stored_runs(name, dataset)]:
        rows = stored.load_results(name, dataset)
        for row in rows[~rows["run"].isin(set(by_run))].itertuples():
            frame = _per_query(row.folder / "per_query.parquet")
            keys = frame[["query", "path", "label"]]
            reference = keys if reference is None else reference
            if not keys.equals(reference):
                raise HamletError(f"{row.folder}: its queries differ from those of the other runs; run it again")
            by_run.setdefault(row.run, []).append(frame[list(PER_QUERY)].to_numpy(np.float64))
    with contextlib.suppress(FileNotFoundError):
        efficiency = stored.load_efficiency(profile, dataset)["models"]
    values = {run: np.stack(seeds) for run, seeds in sorted(by_run.items())}
    return Measured(values, None if reference is None else reference["label"].to_numpy(), efficiency)


def _per_query(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    frame = frame[frame["protocol"] == "default"].sort_values("query", ignore_index=True)
    if frame.empty or not np.isfinite(frame[list(PER_QUERY)]).all(axis=None):
        raise HamletError(f"{path}: the default protocol is absent or holds values that are not finite")
    return frame


class Replicates:
    """Point estimates and replicates of any table cell, drawn once so that all claims share their queries."""

    def __init__(self, paper: Paper, measured: Measured, resamples: int = 10_000, by_class: bool = False):
        self.paper, self.measured, self.resamples = paper, measured, resamples
        self.runs = list(measured.values)
        clusters = measured.labels if by_class else None
        self.accuracy = {
            # the same seed for each metric: its draws of queries and seeds agree with those of the others
            column: st.bootstrap_means([measured.values[r][:, :, i] for r in self.runs], clusters, resamples)
            for i, column in enumerate(PER_QUERY)
            if self.runs
        }

    def missing(self, cells: set[tuple[str, str]]) -> str:
        """What a claim needs and the results folder does not hold, or holds without any measure of its spread."""
        lacking, once = [], False
        for metric, name in sorted(cells):
            run, column = name.lower(), self.paper.metrics[metric]["measured"]
            cost = self.measured.efficiency.get(run, {})
            if column in PER_QUERY and run not in self.measured.values:
                lacking.append(run)
            elif column not in PER_QUERY and cost.get(column) is None:  # a device may not tell its memory
                lacking.append(f"{'memory' if cost else 'efficiency'} of {run}")
            once |= metric == "memory" and "memory_mb_q25" not in cost
        return f"missing: {', '.join(lacking)}" if lacking else "memory was measured once" * once

    def point(self, metric: str, name: str, helps: int = 1) -> float:
        run, column = name.lower(), self.paper.metrics[metric]["measured"]
        if column in PER_QUERY:
            return float(self.measured.values[run][:, :, PER_QUERY.index(column)].mean())
        return float(self.measured.efficiency[run][column])

    def draws(self, metric: str, name: str, helps: int = 1) -> np.ndarray:
        """(resamples,): accuracy by nested bootstrap; latency and memory so that quartiles and median are the
        measured ones. The spread of single calls (of processes, for memory) stands for the uncertainty of their
        median: wider than the latter's own, which would count calls on a shared machine as independent."""
        run, column = name.lower(), self.paper.metrics[metric]["measured"]
        if column in PER_QUERY:
            return self.accuracy[column][:, self.runs.index(run)]
        cost = self.measured.efficiency[run]
        middle, low, high = (float(cost.get(column + end, cost[column])) for end in ("", "_q25", "_q75"))
        key = int.from_bytes(hashlib.sha256(f"{run} {column}".encode()).digest()[:4], "big")
        z = np.random.default_rng([0, key]).standard_normal(self.resamples) / stats.norm.ppf(0.75)
        return middle * np.exp(np.where(z < 0, np.log(middle / low), np.log(high / middle)) * z)

    def measure(self, parts: list[tuple[Comparison, ...]], quantitative: bool) -> tuple[str, st.Interval, float]:
        """The part that decides, the interval of its value or margin, and the two-sided p of the whole."""
        points = [max(c.change(self.point, quantitative) for c in part) for part in parts]
        draws = [np.max([c.change(self.draws, quantitative) for c in part], axis=0).round(STEADY) for part in parts]
        sides = np.array([st.bootstrap_p_values(d) for d in draws])
        # all parts must hold: the weakest supports the claim; one that surely fails refutes it (Bonferroni)
        support, against = sides[:, 0].max(), min(1.0, sides[:, 1].min() * len(sides))
        deciding = sides[:, 0] == support if support <= against else sides[:, 1] == sides[:, 1].min()
        worst = min(np.flatnonzero(deciding), key=lambda i: round(points[i], STEADY))
        interval = st.percentile_interval(points[worst], draws[worst])
        return " or ".join(map(str, parts[worst])), interval, min(1.0, 2 * min(support, against))


def verdict(claim: dict, interval: st.Interval, p_holm: float) -> str:
    """The rule of claims.yaml for one claim that was measured. interval: of the value, or of the margin of the part
    that decides."""
    if not p_holm < ALPHA or interval.low <= 0 <= interval.high:
        return "not reproduced"
    if interval.high < 0:
        return "contradicted"
    close = claim["kind"] != "quantitative" or meets(claim, interval.low, interval.high)
    return "reproduced" if close else "direction only"


def judged(source: Replicates) -> pd.DataFrame:
    """decided_by, value, low, high, p, p_holm, verdict and reason of every claim, from one set of replicates."""
    rows = []
    for claim in source.paper.claims:
        row = {"decided_by": "", **dict.fromkeys(("value", "low", "high", "p"), np.nan)}
        parts, quantitative = source.paper.parts(claim), claim["kind"] == "quantitative"
        lacking = source.missing({cell for part in parts for c in part for cell in c.cells})
        row["reason"] = claim.get("not_testable") or lacking
        if parts and not lacking.startswith("missing"):
            part, interval, p = source.measure(parts, quantitative)
            row |= {"value": interval.estimate, "decided_by": "" if quantitative else part}
            row |= {} if lacking else {"low": interval.low, "high": interval.high}
            row |= {} if row["reason"] else {"p": p}
        rows.append(row)
    table = rounded(pd.DataFrame(rows))
    table["p_holm"] = st.holm(table["p"])
    measured = zip(source.paper.claims, table[["value", "low", "high"]].to_numpy(), table["p_holm"], strict=True)
    verdicts = pd.Series([verdict(claim, st.Interval(*interval), p) for claim, interval, p in measured])
    return table.assign(verdict=verdicts.where(table["reason"] == "", "not testable here"))


def claims_table(profile: str, dataset: str, resamples: int = 10_000) -> pd.DataFrame:
    """One row for each claim, in the report's order: arithmetic, measured value, interval, p, verdict, reason.

    ``value`` is in the claim's unit; for a statement it is the margin in per cent of the part that decides it,
    ``decided_by``. ``low`` to ``verdict`` resample queries, the columns that end in ``_classes`` whole classes of
    queries: what holds for classes not seen here. Costs have the same replicates in both."""
    measured = load_measured(profile, dataset)
    paper = Paper(backbone=foreign_backbone(measured.values))
    keys = ("id", "section", "kind", "english", "reported", "unit", "note")
    stated = pd.DataFrame([{key: claim.get(key, "") for key in keys} for claim in paper.claims])
    stated["arithmetic"], stated["recomputed"], *_ = zip(*map(paper.arithmetic, paper.claims), strict=True)
    queries, classes = (judged(Replicates(paper, measured, resamples, flag)) for flag in (False, True))
    classes = classes[["decided_by", "low", "high", "p", "p_holm", "verdict"]].add_suffix("_classes")
    seeds = max(map(len, measured.values.values()), default=0)
    return pd.concat([stated, queries, classes], axis=1).assign(seeds=seeds)


def side_by_side(profile: str, datasets: list[str]) -> pd.DataFrame:
    """What holds: each claim that came out reproduced or contradicted on one of the data sets, with its figure on each,
    from the claims.csv that notebook 06 wrote."""
    columns, stated = {}, pd.DataFrame(columns=["Claim", "Statement", "Reported"]).set_index("Claim")
    for dataset in datasets:
        columns[dataset] = "not there yet: run 06_claims"
        if (path := paths.output_dir("tables", profile, dataset) / "claims.csv").is_file():
            table = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("Claim")
            unit = table["Reported"].where(table["Reported"] == "", table["Reported"].str.extract(r"(%?)$")[0])
            figure = table["Measured"] + unit.replace("", "%")
            columns[dataset] = table["Verdict"] + (": " + figure).where(table["Measured"] != "", "")
            stated = table[["Statement", "Reported"]]
    found = stated.assign(**columns)
    decided = found[datasets].map(lambda cell: cell.startswith(("reproduced", "contradicted")))
    return found[decided.any(axis=1)].reset_index()


def _compare(a: np.ndarray, b: np.ndarray, draws: list[np.ndarray], permutations: int) -> dict:
    """One row: a, b (seeds, queries) average precisions; draws: replicates of the difference, by query and class."""
    first, second = a.mean(axis=0), b.mean(axis=0)
    effects = st.effect_sizes(first, second)
    nested, classes = (st.percentile_interval(effects["mean_difference"], d.round(STEADY)) for d in draws)
    row = {"mAP_first": a.mean(), "mAP_second": b.mean(), "difference": nested.estimate}
    row |= {"low": nested.low, "high": nested.high, "low_classes": classes.low, "high_classes": classes.high}
    row |= {"p": st.randomisation_test(first, second, permutations=permutations), **effects}
    row |= {"seeds": f"{len(a)}/{len(b)}", "queries": a.shape[1]}
    if min(len(a), len(b)) < 2:
        return row | {"improvement": np.nan, "reason": "P(improvement) needs two seeds of both"}
    won = st.probability_of_improvement([a.mean(axis=1)], [b.mean(axis=1)])
    return row | {"improvement": won.estimate, "reason": ""}


def pairs(runs: list[str]) -> list[tuple[str, str]]:
    """HAMLET's first backbone against every other row, then its second against the controls on that backbone."""
    backbone = foreign_backbone(runs) or REPORTED_BACKBONES[0]
    first = f"hamlet_{backbone.lower()}"
    mobile = ("hamlet_mobilenetv3-no_text", "gem_mobilenetv3", "mlp_mobilenetv3")
    found = [(first, run) for run in expected_rows(runs) if run != first]
    return found + [("hamlet_mobilenetv3", run) for run in mobile if backbone in REPORTED_BACKBONES]


def ablation_pairs(runs: list[str]) -> list[tuple[str, str]]:
    """HAMLET in full against every other run of the profile "ablation", named for the backbone of ``runs``; a variant
    whose exchange is cut as well against that variant."""
    backbone = (foreign_backbone(runs) or REPORTED_BACKBONES[0]).lower()
    first, *others = [re.sub("_[^-]+", f"_{backbone}", run, count=1) for run in load_profile("ablation")["runs"]]
    wholes = {run: run.removesuffix("_no_exchange") for run in others}
    return [(whole if whole in others and whole != run else first, run) for run, whole in wholes.items()]


def comparisons(profile: str, dataset: str, ablation: bool = False, resamples: int = 10_000) -> pd.DataFrame:
    """Paired comparisons in mAP: difference with its nested and class-wise intervals, randomisation p, Holm, effects.

    ``p`` is over queries, on the means over seeds; ``p_holm`` corrects over all rows. ``improvement`` is the
    probability that a run of ``first`` beats one of ``second``, over the seeds at hand; NaN below two of each.
    ablation: HAMLET against its parts, with rows of profile "pretrained" that "ablation" does not repeat."""
    measured = load_measured(profile, dataset, "pretrained" if profile == "ablation" else None)
    runs = list(measured.values)
    values = [measured.values[run][:, :, 0] for run in runs]
    # one draw for all pairs: its cost does not grow with their number
    draws = [st.bootstrap_means(values, c, resamples) if runs else None for c in (None, measured.labels)]
    rows = []
    for pair in (ablation_pairs if ablation else pairs)(runs):
        row = {"first": label(pair[0]), "second": label(pair[1]), "p": np.nan}
        if lacking := [run for run in pair if run not in runs]:
            row["reason"] = f"missing: {', '.join(lacking)}"
        else:
            one, two = map(runs.index, pair)
            row |= _compare(values[one], values[two], [d[:, one] - d[:, two] for d in draws], resamples)
        rows.append(row)
    order = "first second mAP_first mAP_second difference low high low_classes high_classes p d_z rank_biserial"
    table = rounded(pd.DataFrame(rows).reindex(columns=[*order.split(), "improvement", "seeds", "queries", "reason"]))
    table.insert(table.columns.get_loc("p") + 1, "p_holm", st.holm(table["p"]))
    if ablation:  # which shows no P(improvement), so that only rows without a test lack something
        table["reason"] = table["reason"].where(table["p"].isna(), "")
    return table


def language(profile: str, dataset: str, resamples: int = 10_000) -> pd.DataFrame:
    """What its text adds to HAMLET over captions shuffled between classes, the same training otherwise: a row for mAP,
    where one class is right, and one for HAP, where one of its family is half right (`metrics.hierarchical_metrics`).

    true, shuffled, difference: means over the seeds that both have; the rest as in ``comparisons``, NaN with a reason
    where the values of single queries were not kept."""
    runs = stored.load_results(profile, dataset)
    runs = runs[runs["model"].str.startswith("hamlet")]
    kept = runs[runs["variant"] == "shuffled"].merge(runs[runs["variant"] == "default"], on=["model", "seed"])
    sides = [[_per_query(f / "per_query.parquet") for f in kept[side]] for side in ("folder_y", "folder_x")]
    rows = []
    for name, column in (("mAP", "AP"), ("HAP", "HAP")):
        row = {"metric": name, "p": np.nan, "reason": "missing: HAMLET with shuffled captions, or without"}
        whole = [i for i, pair in enumerate(zip(*sides, strict=True)) if all(column in f for f in pair)]
        if whole:
            true, shuffled = (np.stack([side[i][column].to_numpy() for i in whole]) for side in sides)
            clusters = (None, sides[0][0]["label"].to_numpy())
            draws = [st.bootstrap_means([true, shuffled], c, resamples) for c in clusters]
            row |= _compare(true, shuffled, [d[:, 0] - d[:, 1] for d in draws], resamples)
            row |= {"true": row["mAP_first"], "shuffled": row["mAP_second"], "reason": ""}
        elif len(kept):
            results = (kept["result_y"], kept["result_x"])
            true, shuffled = (r.map(lambda one: one["metrics"]["hierarchical"]["HAP"]).mean() for r in results)
            row |= {"true": true, "shuffled": shuffled, "difference": true - shuffled}
            row |= {"seeds": f"{len(kept)}/{len(kept)}", "reason": "not kept for single queries"}
        rows.append(row)
    order = ["metric", "true", "shuffled", "difference", "low", "high", "low_classes", "high_classes", "p", "seeds"]
    return rounded(pd.DataFrame(rows).reindex(columns=[*order, "reason"]))


def printed_language(table: pd.DataFrame) -> pd.DataFrame:
    """`language` as strings."""
    columns = {"Metric": table["metric"], "True text": fixed(table["true"], 4)}
    columns |= {"Shuffled": fixed(table["shuffled"], 4), "Difference": fixed(table["difference"], 4, "+")}
    columns |= _intervals(table, "95%, ") | {"p": fixed(table["p"], 4)}
    return pd.DataFrame(columns | {"Seeds": table["seeds"].astype(object).fillna(""), "Why empty": table["reason"]})


def _intervals(table: pd.DataFrame, name: str, decimals: int | np.ndarray = 4) -> dict[str, list[str]]:
    """The columns of the two intervals, named by what was resampled."""
    ends = {"queries": "", "classes": "_classes"}
    return {name + of: spans(table["low" + end], table["high" + end], decimals, "[{}, {}]") for of, end in ends.items()}


def improvement(profile: str) -> pd.DataFrame:
    """Probability of improvement over data sets (Agarwal et al. 2021) of the pairs that ``comparisons`` has: every data
    set of the profile counts on which both configurations have two seeds; one row of strings a pair."""
    loaded, refused, rows = {}, [], []
    for dataset in stored.stored_datasets(profile):
        try:
            loaded[dataset] = load_measured(profile, dataset).values
        except HamletError:  # another data set's damage: its own build explains it
            refused.append(f"{dataset} left out: its results do not verify")
    for pair in pairs(list(dict.fromkeys(run for values in loaded.values() for run in values))):
        sides = {d: [v[run][:, :, 0].mean(axis=1) for run in pair] for d, v in loaded.items() if {*pair} <= {*v}}
        several = {d: ab for d, ab in sides.items() if min(map(len, ab)) > 1}
        row = [label(pair[0]), label(pair[1]), "", "", "", "needs two seeds of both on a data set"]
        if several:
            found = st.probability_of_improvement(*zip(*several.values(), strict=True))
            counts = [f"{d} ({len(a)}/{len(b)})" for d, (a, b) in several.items()]
            ends = f"[{found.low:.2f}, {found.high:.2f}]"
            row[2:] = [f"{found.estimate:.2f}", ends, ", ".join(counts + refused), ""]
        rows.append(row)
    columns = ["First", "Second", "P(improvement)", "95%, seeds", "Data sets (seeds)", "Why empty"]
    return pd.DataFrame(rows, columns=columns)


def printed_claims(table: pd.DataFrame) -> pd.DataFrame:
    """`claims_table` as strings, verdicts first, intervals named by what was resampled. The Japanese text and the
    formulas stay in data/paper/claims.yaml, under the same id."""
    over = "95%, seeds x " if table["seeds"].gt(1).any() else "95%, "
    # accuracies have four decimals, per cent one
    decimals = np.where(table["unit"].eq("") & table["kind"].eq("quantitative"), 4, 1)
    # in words, which LaTeX prints in every font
    table = table.replace({" > ": " above ", " < ": " below "}, regex=True)
    decided, other = table["decided_by"], table["decided_by_classes"]
    columns = {"Claim": table["id"], "Verdict": table["verdict"], "Verdict, other classes": table["verdict_classes"]}
    columns |= {"Statement": table["english"], "Reported": table["reported"] + table["unit"]}
    columns |= {"Measured": fixed(table["value"], decimals)} | _intervals(table, over, decimals)
    # the interval over classes names its part where that is another one
    columns[f"{over}classes"] = columns[f"{over}classes"] + (" of " + other).where(other != decided, "")
    columns |= {"p (Holm)": fixed(table["p_holm"], 4), "Decided by": decided, "Arithmetic": table["arithmetic"]}
    return pd.DataFrame(columns | {"Why not": table["reason"]})


def printed_comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """`comparisons` as strings."""
    over = "95%, seeds x " if table["seeds"].dropna().ne("1/1").any() else "95%, "
    columns = {"First": table["first"], "Second": table["second"], "Difference in mAP": fixed(table["difference"], 4)}
    columns |= _intervals(table, over) | {"p": fixed(table["p"], 4), "p (Holm)": fixed(table["p_holm"], 4)}
    columns |= {"d_z": fixed(table["d_z"], 2), "Rank-biserial": fixed(table["rank_biserial"], 2)}
    columns |= {"P(improvement)": fixed(table["improvement"], 2), "Seeds": table["seeds"].astype(object).fillna("")}
    return pd.DataFrame(columns | {"Why empty": table["reason"]})
