"""The sentences name the leader, the gap and the front that the summaries hold."""

import pandas as pd
import pytest

from hamlet.artifact import figures, findings
from hamlet.artifact import results as report


def test_accuracy_names_leader_gap_controls_and_text():
    rows = [
        ("HAMLET_ResNet18", "report", 0.5), ("SPARSE_ResNet18", "report", 0.4), ("GeM_ResNet18", "control", 0.6),
        ("HAMLET_ResNet18 (no text)", "control", 0.45), ("MACE_ResNet18", "report", float("nan")),
    ]  # fmt: skip
    summary = pd.DataFrame(rows, columns=["model", "group", "mean"]).assign(
        metric="mAP", query_half_width=0.01, seeds=[3, 1, 1, 1, 0], lowest_seed=0.48, highest_seed=0.53
    )
    said = " ".join(findings.accuracy(summary))
    assert "HAMLET_ResNet18 has the highest mAP of the report's seven, 0.5000; SPARSE_ResNet18" in said
    assert "20.0% below" not in said and "25.0% below" in said
    assert "Over the seeds HAMLET_ResNet18 from 0.4800 to 0.5300." in said  # SPARSE has one
    assert "Controls above the leader: GeM_ResNet18." in said
    assert "Text changes the mAP of HAMLET_ResNet18 by +0.0500." in said


@pytest.mark.parametrize("dataset", ["scenes", "grocery"])
def test_committed_results_give_sentences(dataset):
    accuracy = report.accuracy_summary(report.load_results("quick", dataset))
    cost = report.efficiency_summary(report.load_efficiency("quick", dataset))
    points, pairs = figures.tradeoff_data(accuracy, cost), figures.backbone_data(accuracy, cost)
    said = [
        *findings.accuracy(accuracy),
        *findings.cost(cost),
        *findings.tradeoff(points),
        *findings.backbones(pairs),
    ]
    assert len(said) in (5 + 3 + 2 + 4, 6 + 3 + 2 + 4) and not any("nan" in sentence for sentence in said)
