"""What a notebook's tables say, in sentences computed from the same summaries: nothing in them is typed."""

import pandas as pd


def accuracy(summary: pd.DataFrame) -> list[str]:
    """From `tables.accuracy_summary`: who leads in mAP, by how much, and what the controls reach."""
    rows = summary[summary["metric"] == "mAP"].dropna(subset="mean").set_index("model")
    rows = rows.sort_values("mean", ascending=False)
    means, said = rows["mean"], []
    ranked, controls = (rows[rows["group"] == group] for group in ("report", "control"))
    if len(ranked) > 1:
        (first, second), (one, two) = ranked.index[:2], ranked["mean"].iloc[:2]
        half = ranked["query_half_width"].iloc[:2].max()
        said += [
            f"{first} has the highest mAP of the report's {len(ranked)} rows, {one:.4f}; {second} follows with "
            f"{two:.4f}, {1 - two / one:.1%} below it.",
            f"The interval over queries of either mean reaches at most {half:.4f} to each side; the paired test that "
            "decides is in 06_claims.",
        ]
        several = ranked.iloc[:2].query("seeds > 1").itertuples()
        spans = [f"{row.Index} from {row.lowest_seed:.4f} to {row.highest_seed:.4f}" for row in several]
        said += [f"Over the seeds {', '.join(spans)}."] if spans else []
    if len(controls) and len(ranked):
        above = controls.index[controls["mean"] > ranked["mean"].iloc[0]]
        said.append(f"Controls above the leader: {', '.join(above) or 'none'}.")
    for bare in means.index[means.index.str.endswith(" (no text)")]:
        if (whole := bare.removesuffix(" (no text)")) in means:
            said.append(f"Text changes the mAP of {whole} by {means[whole] - means[bare]:+.4f}.")
    return said


def cost(summary: pd.DataFrame) -> list[str]:
    """From `tables.efficiency_summary`: the fastest and the slowest of the report's rows, and HAMLET against SPARSE."""
    rows = summary[summary["group"] == "report"].dropna(subset=["latency_ms"]).set_index("model")
    times = rows["latency_ms"].sort_values()
    if len(times) < 2:
        return []
    said = [
        f"{times.index[0]} is the fastest of the report's {len(times)} rows ({times.iloc[0]:.1f} ms), "
        f"{times.index[-1]} the slowest ({times.iloc[-1]:.1f} ms)."
    ]
    for backbone in rows["backbone"].unique():
        top, bottom = f"HAMLET_{backbone}", f"SPARSE_{backbone}"
        if {top, bottom} <= set(times.index):
            told = rows["reported_latency_ms"][top] / rows["reported_latency_ms"][bottom]
            report = f"; the report says {told:.2f}" if told == told else ""
            said.append(f"{top} takes {times[top] / times[bottom]:.2f} times the time of {bottom}{report}.")
    return said


def tradeoff(points: pd.DataFrame) -> list[str]:
    """From `figures.tradeoff_data`: the measured Pareto front, and which of it are controls."""
    front = points[(points["source"] == "measured") & points["pareto"]].sort_values("latency_ms")
    names = ", ".join(f"{row.model} ({row.latency_ms:.0f} ms, {row.mAP:.3f})" for row in front.itertuples())
    ranked = front.loc[front["group"] == "report", "model"]
    return [
        f"Measured Pareto front over every row, controls included, from fast to accurate: {names}.",
        f"Rows of the report on it: {', '.join(ranked) or 'none'}.",
    ]


def backbones(pairs: pd.DataFrame) -> list[str]:
    """From `figures.backbone_data`: each method's relative change from ResNet18 to MobileNetV3."""
    said = []
    for quantity, part in pairs[pairs["source"] == "measured"].groupby("quantity", sort=False):
        change = 100 * (part["MobileNetV3"] / part["ResNet18"] - 1)
        changes = ", ".join(f"{name} {value:+.0f}%" for name, value in zip(part["method"], change, strict=True))
        said.append(f"{quantity}, from ResNet18 to MobileNetV3: {changes}.")
    return said


def verdicts(table: pd.DataFrame) -> list[str]:
    """From `claims.claims_table`: how many claims came out how, and which are contradicted."""
    counts = table["verdict"].value_counts(sort=False).sort_index()
    against = table.loc[table["verdict"] == "contradicted"]
    said = [f"Of {len(table)} claims: " + ", ".join(f"{n} {word}" for word, n in counts.items()) + "."]
    changed = int((table["verdict"] != table["verdict_classes"]).sum())
    said.append(f"For other classes of images {changed} of these verdicts change.")
    return said + [f"Contradicted, {row.id}: {row.english}" for row in against.itertuples()]


def shows(row, p: float) -> bool:
    """Whether a difference shows something: by its p over queries and by its interval, over seeds too where there are
    several; either alone does not do."""
    return p < 0.05 and not row.low <= 0 <= row.high


def sure(row, p: float, name: str) -> str:
    """How sure a difference is, in words."""
    why = " over queries, but its 95% interval holds 0" if p < 0.05 else ""
    return f"{name} {p:.4f}" + ("" if shows(row, p) else f"{why}, which shows nothing")


def ablation(table: pd.DataFrame) -> list[str]:
    """From `claims.comparisons` with ``ablation``: what each part is worth; text counts over the shuffled control."""
    said = []
    for row in table.dropna(subset="difference").itertuples():
        word, how = "above" if row.difference > 0 else "below", sure(row, row.p_holm, "Holm p")
        said.append(f"{row.first} lies {abs(row.difference):.4f} mAP {word} {row.second} ({how}).")
    return said or ["No run of the ablation is stored yet, so nothing can be said."]


def language(table: pd.DataFrame) -> list[str]:
    """From `claims.language`: what true sentences add to shuffled ones, by class and by family."""
    what, said = {"mAP": "mAP, where one class alone is right"}, []
    what["HAP"] = "hierarchical AP, where one of its family is half right"
    for row in table.dropna(subset="difference").itertuples():
        told = "untested, since single queries were not kept" if pd.isna(row.p) else sure(row, row.p, "p")
        said.append(f"Over shuffled captions, true ones are worth {row.difference:+.4f} {what[row.metric]} ({told}).")
    return said or ["HAMLET with shuffled captions has not been run, so nothing can be said of its text."]


def machines(twice: pd.DataFrame) -> list[str]:
    """From `results.trained_twice`: what the same training comes to on another machine."""
    if twice.empty:
        return ["No run was made on two machines, so nothing can be said of what a machine is worth."]
    apart, pairs = twice["mAP"] - twice["other_mAP"], twice.groupby(["device", "other_device"])
    names = " and ".join(f"{one} against {other}" for one, other in pairs.groups)
    return [
        f"{len(twice)} runs were made twice, on {names}: mAP differs by {apart.mean():+.4f} on average, "
        f"a single run by {apart.abs().mean():.4f} in the mean and {apart.abs().max():.4f} at most."
    ]


def inside(table: pd.DataFrame) -> list[str]:
    """From `results.load_inside`: what gate, blocks and tokens do in each trained HAMLET."""
    said = []
    for name, rows in table.groupby("label", sort=False):
        size, gate = rows["update"].mean(), rows[["gate_entropy", "gate_spread"]].mean()
        told = f"{name}: a block changes a token by {size:.0%} of its length; two levels' tokens of a cell have cosine "
        told += f"{rows['level_cosine'].mean():.2f}"
        if gate.notna().all():
            told += f"; the gates' entropy is {gate.iloc[0]:.2f} of the uniform's, "
            told += f"and between images a weight varies by {gate.iloc[1]:.2f}"
        least = rows.groupby("part", sort=False)["cosine"].mean()
        idle = ", ".join(least.index[least > 0.99]) or "no part"
        said.append(f"{told}. Taken out without moving a descriptor (cosine above 0.99): {idle}.")
    nothing = "Nothing was measured inside a trained HAMLET here: workflow/inside.py does, where its weights are."
    return said or [nothing]
