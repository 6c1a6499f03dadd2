"""From loaded results to tables: summaries (tidy frames of floats, which figures draw too), Tables 1 to 4, and files.

Every number is measured and stored, or labelled as reported. Summaries are rounded to DIGITS significant digits and
printed cells to the decimals of their column, so that no file depends on a processor's linear algebra. A table is a
frame of strings, exactly as `write_table` writes it; an empty string is a value that no run produced.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML

from hamlet import paths
from hamlet import statistics as st
from hamlet.artifact.paper import backbone_of, expected_rows, is_reported, reported
from hamlet.artifact.results import ACCURACY

DIGITS = 10  # significant, of a summary's floats
RESAMPLES = 2_000  # of the queries, for a half width of four printed decimals
EFFICIENCY = {"Inference time (ms)": "latency_ms", "Memory (MB)": "memory_mb", "Parameters (M)": "parameters_m"}
COSTS = EFFICIENCY | {"Multiply-adds (G)": "macs_g", "Descriptor (bytes)": "descriptor_bytes"}
OTHER_DATA = "The report names neither its data set nor its GPU, so a difference is no error of either side."
SECTION_3_3 = [
    ("HAMLET_MobileNetV3", "HAMLET_ResNet18"),
    ("SPARSE_ResNet18", "HAMLET_ResNet18"),
    ("SPARSE_MobileNetV3", "HAMLET_MobileNetV3"),
]
TEXTS = {  # variant -> what HAMLET was trained with
    "default": "mean sentence of the class",
    "shuffled": "the same, of another class",
    "no_text": "no text",
    "word": "name of the class",
    "template": '"a photo of a <name>"',
    "aligned": "mean sentence, images aligned to it",
    "caption": "images aligned to their own sentences",
    "lsa": "mean sentence, teacher LSA",
}
LATEX = str.maketrans({c: "\\" + c for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}"})


def rounded(frame: pd.DataFrame, digits: int = DIGITS) -> pd.DataFrame:
    """The frame with its float columns at ``digits`` significant digits."""
    return frame.assign(**frame.select_dtypes("float").map(lambda value: float(f"{value:.{digits}g}")))


def fixed(values: Sequence[float], decimals: int | Sequence[int], sign: str = "") -> list[str]:
    """Numbers as text with ``decimals``, of all or of each; "" for a missing one."""
    pairs = zip(values, np.broadcast_to(decimals, len(values)), strict=True)
    return ["" if pd.isna(value) else f"{value:{sign}.{places}f}" for value, places in pairs]


def spans(low: Sequence[float], high: Sequence[float], decimals: int | Sequence[int], form: str) -> list[str]:
    """Both ends as text in ``form``, such as "{} to {}"; "" where they are missing."""
    both = zip(fixed(low, decimals), fixed(high, decimals), strict=True)
    return [form.format(*ends) if all(ends) else "" for ends in both]


def write_table(frame: pd.DataFrame, stem: Path, caption: str, remarks: Iterable[str] = ()) -> list[Path]:
    """Write ``stem`` as .csv, .md and .tex; the same frame gives the same bytes."""
    stem, remarks = Path(stem), list(remarks)
    lines = [f"**{stem.name}.** {caption}", frame.to_markdown(index=False, disable_numparse=True)]
    lines += ["\n".join(f"- {remark}" for remark in remarks)] if remarks else []
    tex_caption = " ".join([caption, *remarks]).translate(LATEX)
    tex = frame.to_latex(index=False, escape=True, caption=tex_caption, label=f"tab:{stem.name}", na_rep="")
    contents = {".csv": frame.to_csv(index=False), ".md": "\n\n".join(lines) + "\n", ".tex": tex}
    return [paths.write_bytes(stem.with_name(stem.name + end), text.encode()) for end, text in contents.items()]


def shown(frame: pd.DataFrame) -> HTML:
    """A table for a notebook: wrapped within the page, every row, and no name read as a formula."""
    with pd.option_context("display.html.use_mathjax", False, "display.max_colwidth", None):
        text = frame.to_html(index=False, border=0, na_rep="")
    # the first column names the row and stays on one line, however long
    text = re.sub(r"(<tr>\s*)<td>", r'\1<td style="text-align: left; white-space: nowrap">', text)
    return HTML(re.sub(r"<(td|th)>", r'<\1 style="text-align: left; max-width: 24em; white-space: normal">', text))


def identity(run: str, label: str) -> dict:
    """run, model (its label), group ("report": a row of the report or its method; else "control"), backbone."""
    group = "report" if is_reported(label) else "control"
    return {"run": run, "model": label, "group": group, "backbone": backbone_of(label)}


def t_half_width(values: pd.Series) -> float:
    """Half of the 95% Student interval of the mean over seeds; NaN below two values."""
    if len(values) < 2:
        return float("nan")
    interval = st.t_interval(values)
    return (interval.high - interval.low) / 2


def _query_half_widths(rows: pd.DataFrame) -> pd.Series:
    """Half of the 95% bootstrap interval over the default protocol's queries, each first averaged over seeds."""
    if rows.empty:
        return pd.Series(float("nan"), index=ACCURACY)
    frames = pd.concat([pd.read_parquet(folder / "per_query.parquet") for folder in rows["folder"]])
    frames = frames[frames["protocol"] == "default"].rename(columns={"AP": "mAP"})
    means = frames.groupby("query")[ACCURACY].mean().dropna()
    draws = st.bootstrap_means([means[metric].to_numpy()[None] for metric in ACCURACY], resamples=RESAMPLES)
    intervals = [st.percentile_interval(0, drawn) for drawn in draws.T]
    return pd.Series([(interval.high - interval.low) / 2 for interval in intervals], index=ACCURACY)


def accuracy_summary(results: pd.DataFrame) -> pd.DataFrame:
    """One row per run and metric: `identity`, metric, mean, seeds, lowest_seed, highest_seed, seed_half_width
    (95% t), query_half_width (95% bootstrap), reported (NaN for controls). A run without results has NaN and 0
    seeds."""
    rows = []
    for run, label in expected_rows(results["run"]).items():
        found = results[results["run"] == run]
        over_queries = _query_half_widths(found)
        for metric in ACCURACY:
            row = {"metric": metric, "mean": found[metric].mean(), "seeds": len(found)}
            row |= {"lowest_seed": found[metric].min(), "highest_seed": found[metric].max()}
            row |= {"seed_half_width": t_half_width(found[metric]), "query_half_width": over_queries[metric]}
            rows.append(identity(run, label) | row)
    told = reported("accuracy").astype(float).stack().rename("reported")
    return rounded(pd.DataFrame(rows).join(told, on=["model", "metric"]))


def efficiency_summary(efficiency: dict) -> pd.DataFrame:
    """One row per run: `identity`, the values of COSTS, latency_ms_q25, latency_ms_q75, and reported_<quantity> for
    the three that the report gives; NaN where not measured."""
    rows, told = [], reported("efficiency").astype(float).add_prefix("reported_")
    for run, label in expected_rows(efficiency["models"]).items():
        row = identity(run, label) | efficiency["models"].get(run, {})
        row["parameters_m"] = row.pop("parameters", float("nan")) / 1e6
        row["macs_g"] = row.pop("macs", float("nan")) / 1e9
        rows.append(row | dict(told.reindex([label]).iloc[0]))
    return rounded(pd.DataFrame(rows))


def notes(results: pd.DataFrame, efficiency: dict | None = None) -> list[str]:
    """Why a cell is empty or weaker than its neighbours: a sentence per run."""
    seeds, told = set(results["seed"]), []
    for run, label in expected_rows(results["run"]).items():
        lacking = sorted(seeds - set(results.loc[results["run"] == run, "seed"]))
        if len(lacking) == len(seeds):
            told.append(f"{label}: empty, because no finished run named {run} is stored.")
        elif efficiency is not None and run not in efficiency["models"]:
            why = "it was not there, or without its weights, when the cost was measured"
            told.append(f"{label}: empty, because {why}.")
        elif efficiency is None and lacking:
            told.append(f"{label}: mean without seed {', '.join(map(str, lacking))}, of which nothing is stored.")
    if len(seeds) == 1 and efficiency is None:
        told.append("One seed was run, so there is no spread over seeds.")
    if results["stale"].any():
        old = results.loc[results["stale"], "label"]
        names = "all runs" if len(old) == len(results) else ", ".join(dict.fromkeys(old))
        told.append(f"Made by other code than the present, {len(old)} of {len(results)} runs: {names}.")
    return told


def _provenance(records: list[dict]) -> str:
    def listed(key: str, letters: int = 60) -> str:
        return ", ".join(sorted({str(record.get(key) or "unknown")[:letters] for record in records}))

    changed = " with uncommitted changes" if any(record.get("dirty") for record in records) else ""
    # a machine with a card brings a PyTorch of its own, other than the lock's
    torches = sorted({record["versions"]["torch"] for record in records if record.get("driver")})
    card = f" with PyTorch {', '.join(torches)}" if torches else ""
    return f"Device: {listed('device')}{card}; threads: {listed('threads')}; commit: {listed('commit', 10)}{changed}."


def accuracy_caption(results: pd.DataFrame) -> str:
    """What was measured on what, with which seeds, where and by which commit."""
    run, seeds = results["result"].iloc[0]["run"], ", ".join(map(str, sorted(set(results["seed"]))))
    text = f"Retrieval accuracy, measured: data set {run['dataset']}, profile {run['profile']}, default protocol"
    over = f"mean over seeds {seeds}" if "," in seeds else f"seed {seeds} alone"
    return f"{text}, {over}. {_provenance([kept['provenance'] for kept in results['result']])}"


def efficiency_caption(efficiency: dict) -> str:
    """The same of the costs."""
    given = efficiency["parameters"]
    text = f"Cost of describing one image, measured with the weights of {given['dataset']}, profile "
    text += f"{given['profile']}: batch 1, {given['image_size']} px, median over {given['images']} query images. "
    return f"{text}Memory: {given['memory']} {_provenance([efficiency['provenance']])}"


def _group(summary: pd.DataFrame, group: str | None) -> pd.DataFrame:
    return (summary if group is None else summary[summary["group"] == group]).reset_index(drop=True)


def accuracy_table(summary: pd.DataFrame, group: str | None = "report") -> pd.DataFrame:
    """Table 1 from `accuracy_summary`: Model, mAP, P@1, P@5, P@10 with 4 decimals. group: "report" (the
    report's rows), "control" or None (both)."""
    rows = _group(summary, group)
    cells = {metric: fixed(rows.loc[rows["metric"] == metric, "mean"], 4) for metric in ACCURACY}
    return pd.DataFrame({"Model": rows["model"].unique(), **cells})


def efficiency_table(summary: pd.DataFrame, group: str | None = "report") -> pd.DataFrame:
    """Table 2 from `efficiency_summary`: Model and the report's three columns with 2 decimals."""
    rows = _group(summary, group)
    return pd.DataFrame({"Model": rows["model"], **{name: fixed(rows[key], 2) for name, key in EFFICIENCY.items()}})


def efficiency_details(summary: pd.DataFrame) -> pd.DataFrame:
    """Every run, with the quartiles, multiply-adds and descriptor bytes that Table 2 leaves out."""
    table = efficiency_table(summary, None)
    table.insert(2, "Quartiles (ms)", _quartiles(summary))
    table["Multiply-adds (G)"] = fixed(summary["macs_g"], 3)
    table["Descriptor (bytes)"] = fixed(summary["descriptor_bytes"], 0)
    return table


def _quartiles(summary: pd.DataFrame) -> list[str]:
    return spans(summary["latency_ms_q25"], summary["latency_ms_q75"], 2, "{} to {}")


def accuracy_vs_reported(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 1 beside the report, a row per model and metric. ± are half widths of 95% intervals; difference =
    measured mean - reported."""
    rows = _group(summary, "report")
    columns = {
        "Model": rows["model"],
        "Metric": rows["metric"],
        "Reported": fixed(rows["reported"], 4),
        "Measured mean": fixed(rows["mean"], 4),
        "± over seeds": fixed(rows["seed_half_width"], 4),
        "± over queries": fixed(rows["query_half_width"], 4),
        "Seeds": rows["seeds"].astype(str),
        "Difference": fixed(rows["mean"] - rows["reported"], 4, "+"),
    }
    return pd.DataFrame(columns)


def efficiency_vs_reported(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 2 beside the report, a row per model and quantity; the spread is the quartiles over images."""
    rows, tables = _group(summary, "report"), []
    for name, key in EFFICIENCY.items():
        told, measured = rows[f"reported_{key}"], rows[key]
        cells = {"Model": rows["model"], "Quantity": name, "Reported": fixed(told, 2), "Measured": fixed(measured, 2)}
        cells["Quartiles over images"] = _quartiles(rows) if key == "latency_ms" else ""
        cells["Difference"] = fixed(measured - told, 2, "+")
        tables.append(pd.DataFrame(cells | {"Measured / reported": fixed(measured / told, 2)}))
    return pd.concat(tables).sort_index(kind="stable", ignore_index=True)


def ratio_table(summary: pd.DataFrame) -> pd.DataFrame:
    """What HAMLET costs in terms of SPARSE on each backbone, reported and measured, 2 decimals."""
    values, tables = summary.set_index("model").select_dtypes("number"), []
    for backbone in _group(summary, "report")["backbone"].unique():
        ratio = values.loc[f"HAMLET_{backbone}"] / values.loc[f"SPARSE_{backbone}"]
        cells = {"Ratio": f"HAMLET / SPARSE, {backbone}", "Quantity": list(COSTS)}
        for name, prefix in (("Reported", "reported_"), ("Measured", "")):
            cells[name] = fixed(ratio.reindex([prefix + key for key in COSTS.values()]), 2)
        tables.append(pd.DataFrame(cells))
    return pd.concat(tables, ignore_index=True)


def protocol_table(results: pd.DataFrame) -> pd.DataFrame:
    """mAP of every run before training and under every stored protocol; hierarchical AP where it was kept."""
    measured = pd.DataFrame({"run": results["run"], "mAP untrained": results["untrained_mAP"], "mAP": results["mAP"]})
    protocols = {name for kept in results["result"] for name in kept["metrics"]} - {"default", "equal_bytes"}
    for protocol in sorted(protocols):
        name, key = ("HAP", "HAP") if protocol == "hierarchical" else (f"mAP {protocol}", "mAP")
        measured[name] = [kept["metrics"].get(protocol, {}).get(key) for kept in results["result"]]
    return _means(measured)


def equal_bytes_table(results: pd.DataFrame) -> pd.DataFrame | None:
    """Accuracy of dense descriptors cut to SPARSE's bytes beside the whole one's; None where no run holds the
    protocol "equal_bytes"."""
    kept = results[["equal_bytes" in result["metrics"] for result in results["result"]]]
    if kept.empty:
        return None
    whole = [result["model"]["descriptor_bytes"] for result in kept["result"]]
    cut = pd.DataFrame([result["metrics"]["equal_bytes"] for result in kept["result"]], index=kept.index)
    measured = pd.DataFrame({"run": kept["run"], "Descriptor (bytes)": whole, "mAP, whole": kept["mAP"]})
    table = _means(measured.join(cut.filter(ACCURACY).add_suffix(", equal bytes")))
    return table[table["mAP, whole"] != ""]


def _means(measured: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of each ``run`` as text, in the rows of Table 1 and the controls."""
    rows = expected_rows(measured["run"])
    means = rounded(measured.set_index("run").astype(float).groupby(level=0).mean().reindex(list(rows)))
    cells = {name: fixed(means[name], 0 if "bytes)" in name else 4) for name in means}
    return pd.DataFrame({"Model": list(rows.values()), **cells})


def tradeoff_table(data: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of the report's section 3.3, from `figures.tradeoff_data`: relative change of mAP and of
    inference time in percent with 1 decimal, reported and measured."""
    table = pd.DataFrame({"Comparison": [f"{model} against {base}" for model, base in SECTION_3_3]})
    for key, name in (("mAP", "mAP"), ("latency_ms", "Inference time")):
        for source in ("reported", "measured"):
            values, nan = data[data["source"] == source].set_index("model")[key], float("nan")
            changes = [100 * (values.get(m, nan) / values.get(b, nan) - 1) for m, b in SECTION_3_3]
            table[f"{name}, {source} (%)"] = fixed(changes, 1, "+")
    return table


def words_of(result: dict) -> dict:
    """What a run measured of search by words. The teacher LSA is fitted to each list of sentences anew, so that queries
    and the trained text lie in spaces of their own: what older runs stored of it says nothing."""
    return {} if result.get("parameters", {}).get("text_teacher") == "lsa" else result.get("words", {})


def words_table(results: pd.DataFrame) -> pd.DataFrame:
    """Table 4: search by words of every run that was trained with a text tower, a row for each protocol and direction,
    means over seeds; "ceiling" searches captions by captions in the teacher's own space."""
    rows = [
        {"Model": row.label, "Protocol": protocol, "Direction": way.replace("_", " "), **metrics}
        for row in results.itertuples()
        for protocol, ways in words_of(row.result).items()
        for way, metrics in ways.items()
    ]
    keys = ["Model", "Protocol", "Direction"]
    if not rows:
        return pd.DataFrame(columns=[*keys, "R@1", "R@5", "R@10", "mAP"])
    means = rounded(pd.DataFrame(rows).groupby(keys, sort=False).mean().reset_index())
    names = [name for k in (1, 5, 10) for name in (f"R@{k}", f"chance_R@{k}")] + ["mAP", "chance_mAP"]
    cells = {name.replace("chance_", "chance "): fixed(means[name], 4) for name in names}
    cells |= {"Median rank": fixed(means["median_rank"], 1), "Queries": fixed(means["queries"], 0)}
    return means[keys].assign(**cells)


def inside_table(inside: pd.DataFrame) -> pd.DataFrame:
    """From `results.load_inside`: what each part taken out of the trained network changes, means over seeds."""
    means = rounded(inside.groupby(["label", "part"], sort=False)[["change", "cosine"]].mean().reset_index())
    cells = {"Model": means["label"], "Taken out": means["part"]}
    cells["Validation mAP"] = fixed(means["change"].round(4) + 0.0, 4, "+")
    return pd.DataFrame(cells | {"Cosine to the whole's descriptors": fixed(means["cosine"], 4)})


def text_table(results: pd.DataFrame) -> pd.DataFrame:
    """HAMLET's accuracy by the text that it was trained with, means over seeds; the first row is the profile's own.

    HAP (`metrics.hierarchical_metrics`) also credits images of the coarse class: what sentences know of families.
    Words: images found by a sentence, R@1 and mAP, where the run can be asked so. "by seed": the lowest and highest,
    where seeds differ. Of several backbones the one with most runs counts.
    """
    kept = results[results["model"].str.startswith("hamlet")]
    kept = kept[kept["model"].isin(kept["model"].mode()[:1])]
    spoken = [words_of(result).get("default", {}).get("text_to_image", {}) for result in kept["result"]]
    measured = pd.DataFrame(spoken, kept.index, ["R@1", "mAP"], dtype=float).add_prefix("Words ")
    graded = [result["metrics"].get("hierarchical", {}).get("HAP") for result in kept["result"]]
    measured.insert(0, "HAP", pd.array(graded, dtype=float))
    texts = kept["variant"].map(lambda variant: TEXTS.get(variant, variant.replace("_", " ")))
    order = [name for name in dict.fromkeys([*TEXTS.values(), *sorted(texts)]) if name in set(texts)]
    groups = kept[ACCURACY].join(measured).groupby(texts)
    means, low, high = (rounded(of.reindex(order)) for of in (groups.mean(), groups.min(), groups.max()))
    cells = {"Text": order, **{m: fixed(means[m], 4) for m in means}}
    for m in ("mAP", "HAP", "Words mAP"):
        ends = zip(fixed(low[m], 4), fixed(high[m], 4), strict=True)
        cells[f"{m} by seed"] = [f"{a} to {b}" if a != b else "" for a, b in ends]
    return pd.DataFrame(cells)
