"""What a notebook's tables say, in sentences computed from the same summaries: nothing in them is typed."""

import pandas as pd


def accuracy(summary: pd.DataFrame) -> list[str]:
    """From `report.accuracy_summary`: who leads in mAP, by how much, and what the controls reach."""
    rows = summary[summary["metric"] == "mAP"].dropna(subset=["mean"]).set_index("model")
    seven = rows[rows["group"] == "report"]["mean"].sort_values(ascending=False)
    controls = rows[rows["group"] == "control"]["mean"].sort_values(ascending=False)
    said = []
    if len(seven) > 1:
        (first, second), gap = seven.index[:2], seven.iloc[0] - seven.iloc[1]
        said.append(
            f"{first} has the highest mAP of the report's seven, {seven.iloc[0]:.4f}; {second} follows with "
            f"{seven.iloc[1]:.4f}, {100 * gap / seven.iloc[1]:.1f}% below it in relative terms."
        )
        half = rows["query_half_width"].reindex([first, second]).max()
        said.append(
            f"The interval over queries of either mean reaches {half:.4f} to each side; the paired test that decides "
            "is in 06_claims."
        )
        spans = [
            f"{name} from {rows.at[name, 'lowest_seed']:.4f} to {rows.at[name, 'highest_seed']:.4f}"
            for name in (first, second)
            if rows.at[name, "seeds"] > 1
        ]
        if spans:
            said.append(f"Over the seeds {', '.join(spans)}.")
    if len(controls) and len(seven):
        above = [name for name in controls.index if controls[name] > seven.iloc[0]]
        said.append(f"Controls above the leader: {', '.join(above) or 'none'}.")
    for backbone in ("ResNet18", "MobileNetV3"):
        whole, bare = f"HAMLET_{backbone}", f"HAMLET_{backbone} (no text)"
        if {whole, bare} <= set(rows.index):
            change = rows["mean"][whole] - rows["mean"][bare]
            said.append(f"Text changes the mAP of {whole} by {change:+.4f}.")
    return said


def cost(summary: pd.DataFrame) -> list[str]:
    """From `report.efficiency_summary`: the fastest and the slowest of the seven, and HAMLET against SPARSE."""
    rows = summary[summary["group"] == "report"].dropna(subset=["latency_ms"]).set_index("model")
    times = rows["latency_ms"].sort_values()
    if len(times) < 2:
        return []
    said = [
        f"{times.index[0]} is the fastest of the seven ({times.iloc[0]:.1f} ms), {times.index[-1]} the slowest "
        f"({times.iloc[-1]:.1f} ms)."
    ]
    for backbone in ("ResNet18", "MobileNetV3"):
        top, bottom = f"HAMLET_{backbone}", f"SPARSE_{backbone}"
        if {top, bottom} <= set(times.index):
            reported = rows["reported_latency_ms"][top] / rows["reported_latency_ms"][bottom]
            said.append(
                f"{top} takes {times[top] / times[bottom]:.2f} times the time of {bottom}; the report says "
                f"{reported:.2f}."
            )
    return said


def tradeoff(points: pd.DataFrame) -> list[str]:
    """From `figures.tradeoff_data`: the measured Pareto front, and which of it are controls."""
    front = points[(points["source"] == "measured") & points["pareto"]].sort_values("latency_ms")
    names = ", ".join(f"{row.model} ({row.latency_ms:.0f} ms, {row.mAP:.3f})" for row in front.itertuples())
    hamlet = [name for name in front["model"] if name.startswith("HAMLET")]
    return [
        f"Measured Pareto front, from fast to accurate: {names}.",
        f"HAMLET on it: {', '.join(hamlet) or 'no configuration'}.",
    ]


def backbones(pairs: pd.DataFrame) -> list[str]:
    """From `figures.backbone_data`: each method's relative change from ResNet18 to MobileNetV3."""
    measured = pairs[pairs["source"] == "measured"]
    said = []
    for quantity, part in measured.groupby("quantity", sort=False):
        change = 100 * (part["MobileNetV3"] / part["ResNet18"] - 1)
        changes = ", ".join(
            f"{name} {value:+.0f}%" for name, value in zip(part["method"], change, strict=True)
        )
        said.append(f"{quantity}, from ResNet18 to MobileNetV3: {changes}.")
    return said
