"""The committed results keep what the README and the data set's README say of them."""

import pytest

from hamlet.artifact import claims, findings, profiles
from hamlet.artifact import results as report

# a small backbone that learns from nothing in four epochs
NOT_FAR = {("scenes", f"{name}_mobilenetv3") for name in ("gem", "mlp", "sparse")}


@pytest.mark.parametrize("dataset", ["scenes", "grocery"])
def test_training_lifts_every_configuration_far_above_its_untrained_self(dataset):
    """Far: twice the untrained mAP, or 0.10 above it."""
    results = report.load_results("quick", dataset)
    far = (results["mAP"] >= 2 * results["untrained_mAP"]) | (results["mAP"] >= results["untrained_mAP"] + 0.1)
    assert {(dataset, run) for run in results.loc[~far, "run"]} == {pair for pair in NOT_FAR if pair[0] == dataset}
    assert results.loc[results["seed"] == 0, "run"].nunique() == 15


def test_scenes_is_neither_solved_nor_open_to_an_untrained_network():
    results = report.load_results("quick", "scenes")
    assert results["untrained_mAP"].max() < 0.15
    assert results["mAP"].max() < 0.9


def scores(dataset: str) -> dict[str, list[float]]:
    """Run -> mAP of its seeds."""
    return report.load_results("quick", dataset).groupby("run")["mAP"].apply(list).to_dict()


def test_the_readme_says_of_scenes_what_the_seeds_say():
    runs = scores("scenes")
    others = [values for name, values in runs.items() if not name.startswith("hamlet")]
    assert len(others) == 10 and all(len(values) == 3 for values in runs.values())
    assert min(runs["hamlet_resnet18"]) > max(map(max, others))  # "in every seed"
    means = {name: sum(values) / len(values) for name, values in runs.items()}
    assert max(means, key=means.get) == "hamlet_resnet18-no_exchange"
    rows = claims.comparisons("quick", "scenes").set_index(["first", "second"])
    row = rows.loc[("HAMLET_ResNet18", "HAMLET_ResNet18 (no exchange)")]
    assert row["p_holm"] < 0.05 and row["high"] < 0


def test_the_readme_says_of_grocery_what_the_runs_say():
    rows = claims.comparisons("quick", "grocery").set_index(["first", "second"]).loc["HAMLET_ResNet18"]
    rows = rows[~rows.index.str.startswith("HAMLET")]
    assert len(rows) == 10 and (rows["difference"] > 0).all()  # all other methods and plain controls
    others, two = rows.drop("DSCF_ResNet18"), rows.loc["DSCF_ResNet18"]
    assert (others["p_holm"] < 0.05).all() and (others["low"] > 0).all()
    assert two["low"] < 0 < two["high"]  # "its lead over DSCF_ResNet18 is not sure"


def test_the_readme_says_of_hamlet_s_parts_what_the_ablation_says():
    """No part of HAMLET shows anything on either data set; taken out, the blocks leave the descriptor as it was."""
    parts = ("no exchange", "no gate", "last level", "no keeping", "full blocks")
    for dataset in ("scenes", "grocery_unseen"):
        rows = claims.comparisons("ablation", dataset, ablation=True).set_index("second")
        for part in parts:
            row = rows.loc[f"HAMLET_EfficientNetLite0 ({part})"]
            assert not findings.shows(row, row["p_holm"]), (dataset, part)
        seen = report.load_inside("ablation", dataset).groupby(["run", "part"])["cosine"].mean()
        assert seen["hamlet_efficientnetlite0", "the blocks"] > 0.999
        assert seen["hamlet_efficientnetlite0-full_blocks", "the blocks"] > 0.95
        assert seen["hamlet_efficientnetlite0", "plain C5"] < 0.8
        update = report.load_inside("ablation", dataset).groupby("run")["update"].mean()
        assert update["hamlet_efficientnetlite0"] < 0.1 and update["hamlet_efficientnetlite0-full_blocks"] > 0.5


def test_no_stored_result_is_stale():
    """A clone must never train by surprise."""
    for profile in profiles.profile_names():
        for dataset in report.stored_datasets(profile):
            assert not report.load_results(profile, dataset)["stale"].any(), (profile, dataset)
