"""The sentences name the leader, the gap, its direction and the front that the summaries hold."""

import json

import pandas as pd
import pytest

from hamlet.artifact import claims, figures, findings, tables
from hamlet.artifact import results as stored


def test_accuracy_names_leader_gap_controls_and_text():
    rows = [
        ("HAMLET_ResNet18", "report", 0.5), ("SPARSE_ResNet18", "report", 0.4), ("GeM_ResNet18", "control", 0.6),
        ("HAMLET_ResNet18 (no text)", "control", 0.45), ("MACE_ResNet18", "report", float("nan")),
    ]  # fmt: skip
    summary = pd.DataFrame(rows, columns=["model", "group", "mean"]).assign(
        metric="mAP",
        query_half_width=[0.01, 0.02, 0.05, 0.05, 0.05],
        seeds=[3, 1, 1, 1, 0],
        lowest_seed=0.48,
        highest_seed=0.53,
    )
    said = " ".join(findings.accuracy(summary))
    assert "HAMLET_ResNet18 has the highest mAP of the report's 2 rows, 0.5000; SPARSE_ResNet18" in said
    assert "20.0% below it" in said and "25.0%" not in said  # 0.4 is 20% below 0.5, which is 25% above it
    assert "either mean reaches at most 0.0200 to each side" in said  # of the first two
    assert "Over the seeds HAMLET_ResNet18 from 0.4800 to 0.5300." in said  # SPARSE has one
    assert "Controls above the leader: GeM_ResNet18." in said
    assert "Text changes the mAP of HAMLET_ResNet18 by +0.0500." in said


def test_text_that_lowers_and_text_that_raises():
    rows = [("HAMLET_ResNet18", "report", 0.4), ("HAMLET_ResNet18 (no text)", "control", 0.45)]
    summary = pd.DataFrame(rows, columns=["model", "group", "mean"]).assign(
        metric="mAP", query_half_width=0.01, seeds=1, lowest_seed=0.0, highest_seed=0.0
    )
    assert findings.accuracy(summary) == [
        "Controls above the leader: HAMLET_ResNet18 (no text).",
        "Text changes the mAP of HAMLET_ResNet18 by -0.0500.",
    ]


def test_cost_names_fastest_slowest_and_the_ratio_the_right_way_up():
    rows = [("HAMLET_ResNet18", 30.0, 18.0), ("SPARSE_ResNet18", 20.0, 12.0), ("DSCF_ResNet18", 45.0, 40.0)]
    summary = pd.DataFrame(rows, columns=["model", "latency_ms", "reported_latency_ms"]).assign(
        group="report", backbone="ResNet18"
    )
    said = findings.cost(summary)
    assert (
        said[0]
        == "SPARSE_ResNet18 is the fastest of the report's 3 rows (20.0 ms), DSCF_ResNet18 the slowest (45.0 ms)."
    )
    assert said[1:] == ["HAMLET_ResNet18 takes 1.50 times the time of SPARSE_ResNet18; the report says 1.50."]
    summary["reported_latency_ms"] = float("nan")
    assert findings.cost(summary)[1] == "HAMLET_ResNet18 takes 1.50 times the time of SPARSE_ResNet18."


def test_the_front_is_told_from_fast_to_accurate_with_its_rows_of_the_report():
    rows = [("B", "control", 20.0, 0.4, True), ("A", "report", 10.0, 0.2, True), ("C", "report", 30.0, 0.3, False)]
    points = pd.DataFrame(rows, columns=["model", "group", "latency_ms", "mAP", "pareto"]).assign(source="measured")
    front, ranked = findings.tradeoff(points)
    assert front.endswith("from fast to accurate: A (10 ms, 0.200), B (20 ms, 0.400).")
    assert ranked == "Rows of the report on it: A."


def test_backbone_changes_have_their_sign():
    rows = [("mAP", "HAMLET", 0.4, 0.3), ("Memory (MB)", "HAMLET", 50.0, 60.0)]
    pairs = pd.DataFrame(rows, columns=["quantity", "method", "ResNet18", "MobileNetV3"]).assign(source="measured")
    assert findings.backbones(pairs) == [
        "mAP, from ResNet18 to MobileNetV3: HAMLET -25%.",
        "Memory (MB), from ResNet18 to MobileNetV3: HAMLET +20%.",
    ]


def test_verdicts_are_counted_and_the_contradicted_named():
    table = pd.DataFrame({
        "id": ["S1", "S2", "S3"], "english": ["a.", "b.", "c."],
        "verdict": ["contradicted", "reproduced", "reproduced"],
        "verdict_classes": ["not reproduced", "reproduced", "reproduced"],
    })  # fmt: skip
    assert findings.verdicts(table) == [
        "Of 3 claims: 1 contradicted, 2 reproduced.",
        "For other classes of images 1 of these verdicts change.",
        "Contradicted, S1: a.",
    ]


def test_ablation_says_above_and_below_and_what_text_is_worth():
    rows = [
        ("H", "H (shuffled)", 0.03, 0.01, 0.05, 0.001),
        ("H", "H (no gate)", -0.02, -0.03, -0.01, 0.2),
        ("H", "H (last level)", 0.02, -0.01, 0.04, 0.001),
        ("H", "H (no text)", float("nan"), -1, 1, 1.0),
    ]
    said = findings.ablation(pd.DataFrame(rows, columns=["first", "second", "difference", "low", "high", "p_holm"]))
    nothing = "(Holm p 0.0010 over queries, but its 95% interval holds 0, which shows nothing)"
    assert said == [
        "H lies 0.0300 mAP above H (shuffled) (Holm p 0.0010).",
        "H lies 0.0200 mAP below H (no gate) (Holm p 0.2000, which shows nothing).",
        f"H lies 0.0200 mAP above H (last level) {nothing}.",
    ]


def test_text_is_measured_against_shuffled_captions():
    table = pd.DataFrame({"metric": ["mAP", "HAP"], "difference": [-0.1, 0.1], "p": [0.01, float("nan")]})
    table = table.assign(low=[-0.2, 0], high=[-0.05, 0])
    fine, graded = findings.language(table)
    assert "-0.1000 mAP" in fine and "(p 0.0100)" in fine
    assert "+0.1000 hierarchical AP" in graded and "untested" in graded
    nothing = table.assign(difference=float("nan"))
    assert findings.language(nothing)[0].startswith("HAMLET with shuffled captions has not been run")


@pytest.mark.parametrize("dataset", ["scenes", "grocery"])
def test_committed_results_give_sentences(dataset):
    accuracy = tables.accuracy_summary(stored.load_results("quick", dataset))
    cost = tables.efficiency_summary(stored.load_efficiency("quick", dataset))
    points, pairs = figures.tradeoff_data(accuracy, cost), figures.backbone_data(accuracy, cost)
    said = [*findings.accuracy(accuracy), *findings.cost(cost), *findings.tradeoff(points), *findings.backbones(pairs)]
    said += findings.ablation(claims.comparisons("quick", dataset, ablation=True, resamples=200))
    assert len(said) > 14 and not any("nan" in sentence for sentence in said)


def test_machines_are_compared_by_the_size_of_single_differences():
    """Differences that cancel are told all the same."""
    columns = ["run", "seed", "device", "other_device", "mAP", "other_mAP"]
    rows = [("gem", 0, "Card", "CPU", 0.52, 0.50), ("gem", 1, "Card", "CPU", 0.50, 0.53)]
    (said,) = findings.machines(pd.DataFrame(rows, columns=columns))
    assert said == (
        "2 runs were made twice, on Card against CPU: mAP differs by -0.0050 on average, "
        "a single run by 0.0250 in the mean and 0.0300 at most."
    )
    assert "No run" in findings.machines(pd.DataFrame(columns=columns))[0]


def test_what_is_inside_is_told_part_by_part():
    row = {
        "label": "HAMLET_X",
        "seed": 0,
        "update": 0.08,
        "level_cosine": 0.15,
        "gate_entropy": 0.97,
        "gate_spread": 0.03,
    }
    parts = [("the blocks", 0.9998, 0.00001), ("the perceptron", 0.5, -0.02)]
    rows = pd.DataFrame([{**row, "part": part, "cosine": cosine, "change": change} for part, cosine, change in parts])
    (said,) = findings.inside(rows)
    assert (
        "HAMLET_X: a block changes a token by 8% of its length; two levels' tokens of a cell have cosine 0.15" in said
    )
    assert "entropy is 0.97 of the uniform's, and between images a weight varies by 0.03" in said
    assert said.endswith("(cosine above 0.99): the blocks.")
    (without_gate,) = findings.inside(rows.assign(gate_entropy=float("nan"), cosine=0.5))
    assert "gates" not in without_gate and without_gate.endswith("no part.")
    assert "Nothing was measured" in findings.inside(rows[:0])[0]
    table = tables.inside_table(pd.concat([rows, rows.assign(seed=1, change=-0.04)]))
    assert table.to_numpy().tolist() == [
        ["HAMLET_X", "the blocks", "-0.0200", "0.9998"],
        ["HAMLET_X", "the perceptron", "-0.0300", "0.5000"],
    ]


def test_what_the_profile_lacks_inside_comes_from_the_one_it_extends(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    part = {"change": 0.0, "cosine": 1.0}

    def write(profile, *runs):
        rows = [{"run": run, "seed": 0, "mAP": 0.9, "parts": {"the blocks": part}, "from": profile} for run in runs]
        content = {"parameters": {"runs": {f"{run} seed0": run for run in runs}}, "provenance": {}, "rows": rows}
        for run in runs:
            (tmp_path / "results" / profile / "scenes" / run / "seed0").mkdir(parents=True)
            (tmp_path / "results" / profile / "scenes" / run / "seed0" / "result.json").write_text(
                f'{{"digest": "{run}"}}'
            )
        folder = tmp_path / "results" / profile / "scenes" / "inside"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(content | {"digest": stored.digest(content)}))

    assert stored.load_inside("ablation", "scenes").empty
    write("pretrained", "hamlet_efficientnetlite0", "hamlet_efficientnetlite0-shuffled")
    write("ablation", "hamlet_efficientnetlite0-shuffled")
    assert stored.load_inside("ablation", "scenes")["run"].tolist() == [
        "hamlet_efficientnetlite0-shuffled",
        "hamlet_efficientnetlite0",
    ]
    assert stored.load_inside("quick", "scenes").empty
    again = tmp_path / "results" / "pretrained" / "scenes" / "hamlet_efficientnetlite0" / "seed0" / "result.json"
    again.write_text('{"digest": "trained again"}')
    assert stored.load_inside("ablation", "scenes")["run"].tolist() == ["hamlet_efficientnetlite0-shuffled"]
