"""Tables 1 and 2 with the report's rows, order, columns and decimals, and the tables around them.

Each function turns a summary of hamlet.artifact.results into a frame of strings, exactly as `report.write_table` writes
it; an empty string is a value that no run produced.
"""

from collections.abc import Iterable

import pandas as pd

from hamlet.artifact.results import ACCURACY, EFFICIENCY, labels, printed


def _fixed(values: Iterable[float], decimals: int, sign: str = "") -> list[str]:
    return ["" if pd.isna(value) else f"{value:{sign}.{decimals}f}" for value in values]


def _group(summary: pd.DataFrame, group: str | None) -> pd.DataFrame:
    return (summary if group is None else summary[summary["group"] == group]).reset_index(drop=True)


def accuracy_table(summary: pd.DataFrame, group: str | None = "report") -> pd.DataFrame:
    """Table 1 from `accuracy_summary`: Model, mAP, P@1, P@5, P@10 with 4 decimals. group: "report" (the
    report's rows), "control" or None (both)."""
    rows = _group(summary, group)
    cells = {metric: _fixed(rows.loc[rows["metric"] == metric, "mean"], 4) for metric in ACCURACY}
    return pd.DataFrame({"Model": rows["model"].unique(), **cells})


def efficiency_table(summary: pd.DataFrame, group: str | None = "report") -> pd.DataFrame:
    """Table 2 from `efficiency_summary`: Model and the report's three columns with 2 decimals."""
    rows = _group(summary, group)
    return pd.DataFrame(
        {"Model": rows["model"], **{name: _fixed(rows[key], 2) for name, key in EFFICIENCY.items()}}
    )


def efficiency_details(summary: pd.DataFrame) -> pd.DataFrame:
    """Every run, with the quartiles, multiply-adds and descriptor bytes that Table 2 leaves out."""
    table = efficiency_table(summary, None)
    table.insert(2, "Quartiles (ms)", _quartiles(summary))
    table["Multiply-adds (G)"] = _fixed(summary["macs_g"], 3)
    table["Descriptor (bytes)"] = _fixed(summary["descriptor_bytes"], 0)
    return table


def _quartiles(summary: pd.DataFrame) -> list[str]:
    low, high = (_fixed(summary[f"latency_ms_{end}"], 2) for end in ("q25", "q75"))
    return [f"{a} to {b}" if a else "" for a, b in zip(low, high, strict=True)]


def accuracy_vs_reported(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 1 beside the report, a row per model and metric. ± are half widths of 95% intervals; difference =
    measured mean - reported."""
    rows = _group(summary, "report")
    cells = zip(rows["model"], rows["metric"], strict=True)
    columns = {
        "Reported": [printed("accuracy", model, ACCURACY.index(metric)) for model, metric in cells],
        "Measured mean": _fixed(rows["mean"], 4),
        "± over seeds": _fixed(rows["seed_half_width"], 4),
        "± over queries": _fixed(rows["query_half_width"], 4),
        "Seeds": rows["seeds"].astype(str),
        "Difference": _fixed(rows["mean"] - rows["reported"], 4, "+"),
    }
    return pd.DataFrame({"Model": rows["model"], "Metric": rows["metric"], **columns})


def efficiency_vs_reported(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 2 beside the report, a row per model and quantity; the spread is the quartiles over images."""
    rows, tables = _group(summary, "report"), []
    for column, (name, key) in enumerate(EFFICIENCY.items()):
        cells = {"Model": rows["model"], "Quantity": name}
        cells["Reported"] = [printed("efficiency", model, column) for model in rows["model"]]
        cells["Measured"] = _fixed(rows[key], 2)
        cells["Quartiles over images"] = _quartiles(rows) if key == "latency_ms" else ""
        cells["Difference"] = _fixed(rows[key] - rows[f"reported_{key}"], 2, "+")
        cells["Measured / reported"] = _fixed(rows[key] / rows[f"reported_{key}"], 2)
        tables.append(pd.DataFrame(cells))
    return pd.concat(tables).sort_index(kind="stable").reset_index(drop=True)


def ratio_table(
    summary: pd.DataFrame, numerator: str = "HAMLET", denominator: str = "SPARSE"
) -> pd.DataFrame:
    """What one method costs in terms of another on each backbone, reported and measured, 2 decimals."""
    quantities = {**EFFICIENCY, "Multiply-adds (G)": "macs_g", "Descriptor (bytes)": "descriptor_bytes"}
    rows, tables = summary.set_index("model"), []
    for backbone in ("ResNet18", "MobileNetV3"):
        top, bottom = rows.loc[f"{numerator}_{backbone}"], rows.loc[f"{denominator}_{backbone}"]
        measured = [top[key] / bottom[key] for key in quantities.values()]
        names = [f"reported_{key}" for key in quantities.values()]
        reported = [top[key] / bottom[key] if key in rows else float("nan") for key in names]
        cells = {
            "Quantity": list(quantities),
            "Reported": _fixed(reported, 2),
            "Measured": _fixed(measured, 2),
        }
        tables.append(pd.DataFrame({"Ratio": f"{numerator} / {denominator}, {backbone}", **cells}))
    return pd.concat(tables, ignore_index=True)


def protocol_table(results: pd.DataFrame) -> pd.DataFrame:
    """mAP of every run before training and under every stored protocol; hierarchical AP where it was kept."""
    measured = pd.DataFrame(
        {"run": results["run"], "mAP untrained": results["untrained_mAP"], "mAP": results["mAP"]}
    )
    protocols = {name for kept in results["result"] for name in kept["metrics"]} - {"default", "equal_bytes"}
    for protocol in sorted(protocols):
        name, key = ("HAP", "HAP") if protocol == "hierarchical" else (f"mAP {protocol}", "mAP")
        measured[name] = [kept["metrics"].get(protocol, {}).get(key) for kept in results["result"]]
    return _means(measured, labels(results["run"]))


def equal_bytes_table(results: pd.DataFrame) -> pd.DataFrame | None:
    """Accuracy of dense descriptors cut to SPARSE's bytes beside the whole one's; None where no run holds the
    protocol "equal_bytes"."""
    kept = results[["equal_bytes" in result["metrics"] for result in results["result"]]]
    if kept.empty:
        return None
    whole = [result["model"]["descriptor_bytes"] for result in kept["result"]]
    cut = pd.DataFrame([result["metrics"]["equal_bytes"] for result in kept["result"]], index=kept.index)
    measured = pd.DataFrame({"run": kept["run"], "Descriptor (bytes)": whole, "mAP, whole": kept["mAP"]})
    measured = measured.join(
        cut[[metric for metric in ACCURACY if metric in cut]].add_suffix(", equal bytes")
    )
    return _means(
        measured, {run: label for run, label in labels(kept["run"]).items() if run in set(kept["run"])}
    )


def _means(measured: pd.DataFrame, rows: dict[str, str]) -> pd.DataFrame:
    """Means over seeds as text, a row per entry of ``rows`` (run -> label)."""
    means = measured.astype(dict.fromkeys(measured.columns.drop("run"), float)).groupby("run").mean()
    means = means.reindex(list(rows))
    cells = {name: _fixed(means[name], 0 if "bytes)" in name else 4) for name in means}
    return pd.DataFrame({"Model": list(rows.values()), **cells})


SECTION_3_3 = [
    ("HAMLET_MobileNetV3", "HAMLET_ResNet18"),
    ("SPARSE_ResNet18", "HAMLET_ResNet18"),
    ("SPARSE_MobileNetV3", "HAMLET_MobileNetV3"),
]


def tradeoff_table(data: pd.DataFrame) -> pd.DataFrame:
    """The comparisons of the report's section 3.3, from `figures.tradeoff_data`: relative change of mAP and of
    inference time in percent with 1 decimal, reported and measured."""
    table = pd.DataFrame({"Comparison": [f"{model} against {base}" for model, base in SECTION_3_3]})
    for key, name in (("mAP", "mAP"), ("latency_ms", "Inference time")):
        for source in ("reported", "measured"):
            values = data[data["source"] == source].set_index("model")[key]
            changes = [
                100 * (values.get(m, float("nan")) / values.get(b, float("nan")) - 1) for m, b in SECTION_3_3
            ]
            table[f"{name}, {source} (%)"] = _fixed(changes, 1, "+")
    return table
