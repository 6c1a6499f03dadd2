"""Tables against hand-computed cells."""

import math

import numpy as np
import pandas as pd
import pytest
import stored
from scipy import stats

from hamlet.artifact import figures, paper, tables
from hamlet.artifact import results as report
from hamlet.artifact.paper import CONTROLS, label


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """All rows but SpCa and GeM with text; two seeds."""
    root = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAMLET_OUTPUT", str(root))
        stored.store_profile(root, without=("spca_resnet18", "gem_resnet18-text"))
        results = report.load_results("quick", "flat")
        efficiency = report.load_efficiency("quick", "flat")
    return results, efficiency, tables.accuracy_summary(results), tables.efficiency_summary(efficiency)


REPORT_ROWS = [
    "HAMLET_ResNet18", "HAMLET_MobileNetV3", "SPARSE_ResNet18", "SPARSE_MobileNetV3", "MACE_ResNet18",
    "SpCa_ResNet18", "DSCF_ResNet18",
]  # fmt: skip


def test_table1_has_the_reports_rows_columns_and_decimals(profile):
    table = tables.accuracy_table(profile[2])
    assert list(table["Model"]) == REPORT_ROWS
    assert list(table.columns) == ["Model", "mAP", "P@1", "P@5", "P@10"]
    # seeds 0 and 1 of the second row hold 0.48 and 0.49 for mAP, and 0.05 more for each following metric
    assert list(table.iloc[1])[1:] == ["0.4850", "0.5350", "0.5850", "0.6350"]


def test_table2_has_the_reports_rows_columns_and_decimals(profile):
    table = tables.efficiency_table(profile[3])
    assert list(table["Model"]) == REPORT_ROWS
    assert list(table.columns) == ["Model", "Inference time (ms)", "Memory (MB)", "Parameters (M)"]
    assert list(table.iloc[0])[1:] == ["24.00", "90.00", "25.00"]


def test_a_missing_run_is_an_empty_cell_with_its_reason(profile):
    results, efficiency, accuracy, cost = profile
    for table in (tables.accuracy_table(accuracy), tables.efficiency_table(cost)):
        assert set(table.loc[table["Model"] == "SpCa_ResNet18"].iloc[0, 1:]) == {""}
    for notes in (tables.notes(results), tables.notes(results, efficiency)):
        assert any("SpCa_ResNet18: empty" in note and "spca_resnet18" in note for note in notes)


def test_a_missing_seed_is_told(root):
    for seed in (0, 1):
        stored.store_run(root, "gem_resnet18", seed, 0.4)
    stored.store_run(root, "mace_resnet18", 1, 0.4)
    notes = tables.notes(report.load_results("quick", "flat"))
    assert any("MACE_ResNet18: mean without seed 0" in note for note in notes)


def test_controls_stand_apart_in_their_order(profile):
    table = tables.accuracy_table(profile[2], "control")
    assert list(table["Model"]) == [label(run) for run in CONTROLS]


def test_accuracy_against_the_report(profile):
    rows = tables.accuracy_vs_reported(profile[2]).set_index(["Model", "Metric"])
    row = rows.loc[("HAMLET_ResNet18", "mAP")]
    assert row["Reported"] == "0.3450"  # the printed digits, trailing zero included
    assert row["Measured mean"] == "0.5050" and row["Difference"] == "+0.1600" and row["Seeds"] == "2"
    # values 0.50 and 0.51: SciPy's own interval of the mean
    low, high = stats.t.interval(0.95, 1, loc=0.505, scale=stats.sem([0.50, 0.51]))
    assert float(row["± over seeds"]) == pytest.approx((high - low) / 2, abs=5e-5)
    assert len(rows) == 28
    both = profile[2].set_index(["model", "metric"]).loc[("HAMLET_ResNet18", "mAP")]
    assert (both["lowest_seed"], both["highest_seed"]) == (0.50, 0.51)
    assert row["± over queries"] == f"{both['query_half_width']:.4f}" != row["± over seeds"]


def test_every_reported_value_is_that_of_its_row_and_column(profile):
    accuracy, cost = profile[2], profile[3]
    of = {"accuracy": paper.reported("accuracy"), "efficiency": paper.reported("efficiency")}
    found = accuracy[accuracy["group"] == "report"]
    for row in found.itertuples():
        assert row.reported == float(of["accuracy"].at[row.model, row.metric])
    assert len(found) == 28 and accuracy.loc[accuracy["group"] == "control", "reported"].isna().all()
    for row in cost[cost["group"] == "report"].to_dict("records"):
        told = [float(cell) for cell in of["efficiency"].loc[row["model"]]]
        assert [row[f"reported_{key}"] for key in ("latency_ms", "memory_mb", "parameters_m")] == told


def test_query_interval_averages_seeds_first(profile):
    results, _, accuracy, _ = profile
    folders = results.loc[results["run"] == "mace_resnet18", "folder"]
    frames = [pd.read_parquet(folder / "per_query.parquet") for folder in folders]
    columns = [frame.loc[frame["protocol"] == "default", "P@5"].to_numpy() for frame in frames]
    averaged = (np.mean(columns, axis=0),)
    low, high = stats.bootstrap(averaged, np.mean, method="percentile", rng=1).confidence_interval
    got = accuracy.query("run == 'mace_resnet18' and metric == 'P@5'")["query_half_width"].item()
    assert got == pytest.approx((high - low) / 2, rel=0.07)  # each half width has a Monte Carlo error of 2%


def test_one_seed_has_no_spread_and_says_so(root):
    stored.store_run(root, "gem_resnet18", 0, 0.4)
    results = report.load_results("quick", "flat")
    assert math.isnan(tables.t_half_width(results["mAP"]))
    assert any("no spread over seeds" in note for note in tables.notes(results))


def test_efficiency_against_the_report_and_the_headline_ratio(profile):
    cost = profile[3]
    rows = tables.efficiency_vs_reported(cost).set_index(["Model", "Quantity"])
    row = rows.loc[("HAMLET_ResNet18", "Inference time (ms)")]
    assert list(row) == ["18.00", "24.00", "23.00 to 26.00", "+6.00", "1.33"]
    assert set(rows.drop(index="Inference time (ms)", level=1)["Quartiles over images"]) == {""}
    details = tables.efficiency_details(cost).set_index("Model").loc["HAMLET_ResNet18"]
    assert details.to_dict() == {
        "Inference time (ms)": "24.00", "Quartiles (ms)": "23.00 to 26.00", "Memory (MB)": "90.00",
        "Parameters (M)": "25.00", "Multiply-adds (G)": "2.000", "Descriptor (bytes)": "2048",
    }  # fmt: skip
    ratios = tables.ratio_table(cost).set_index(["Ratio", "Quantity"])
    # 18.00 / 14.76 reported; 24 / 18 stored
    assert list(ratios.loc[("HAMLET / SPARSE, ResNet18", "Inference time (ms)")]) == ["1.22", "1.33"]
    assert ratios.loc[("HAMLET / SPARSE, ResNet18", "Descriptor (bytes)"), "Measured"] == "5.33"


def test_protocols_hold_untrained_and_hierarchical(profile):
    row = tables.protocol_table(profile[0]).set_index("Model").loc["HAMLET_ResNet18"]
    assert dict(row) == {"mAP untrained": "0.0500", "mAP": "0.5050", "HAP": "0.6050", "mAP seen": "0.2525"}


def test_equal_bytes_only_where_runs_hold_it(root, profile):
    assert tables.equal_bytes_table(profile[0]) is None
    metrics = {"default": dict.fromkeys(stored.METRICS, 0.4), "equal_bytes": {"mAP": 0.31, "P@1": 0.5}}
    size = {"parameters": 1, "embedding_dim": 8192, "descriptor_bytes": 512}  # as SPARSE: no four bytes a dimension
    stored.store_run(root, "gem_resnet18", 0, 0.4, metrics=metrics, model=size)
    stored.store_run(root, "mace_resnet18", 0, 0.4)
    table = tables.equal_bytes_table(report.load_results("quick", "flat"))
    assert table.to_dict("records") == [
        {"Model": "GeM_ResNet18", "Descriptor (bytes)": "512", "mAP, whole": "0.4000",
         "mAP, equal bytes": "0.3100", "P@1, equal bytes": "0.5000"}
    ]  # fmt: skip


def test_written_tables_repeat_byte_for_byte_and_read_back(tmp_path, profile):
    results, _, accuracy, _ = profile
    table, caption = tables.accuracy_table(accuracy), tables.accuracy_caption(results)
    first = tables.write_table(table, tmp_path / "a" / "table1_accuracy", caption, tables.notes(results))
    again = tables.write_table(table, tmp_path / "b" / "table1_accuracy", caption, tables.notes(results))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        f"table1_accuracy.{end}" for end in ("csv", "md", "tex")
    ]
    assert pd.read_csv(first[0], dtype=str, keep_default_na=False).equals(table)
    markdown, tex = first[1].read_text(), first[2].read_text()
    assert "test device" in markdown and "0123456789" in markdown and "seeds 0, 1" in markdown
    assert "HAMLET\\_ResNet18 & 0.5050" in tex and "\\toprule" in tex


def test_the_caption_tells_cards_their_pytorch_and_changes_of_any_run(profile):
    versions = {"versions": {"torch": "2.11.0+cu130"}}
    card = stored.PROVENANCE | versions | {"device": "a card", "driver": "13.0", "dirty": True, "commit": None}
    run, results = profile[0]["result"].iloc[0]["run"], profile[0].iloc[:2]
    kept = [{"run": run, "provenance": origin} for origin in (card, stored.PROVENANCE)]
    caption = tables.accuracy_caption(results.assign(result=kept))
    assert "Device: a card, test device with PyTorch 2.11.0+cu130; threads: 1;" in caption
    assert caption.endswith("commit: 0123456789, unknown with uncommitted changes.")
    plain = tables.accuracy_caption(results.assign(result=kept[1:] * 2))
    assert "PyTorch" not in plain and plain.endswith("commit: 0123456789.")


def test_tradeoff_table_is_section_3_3(profile):
    table = tables.tradeoff_table(figures.tradeoff_data(profile[2], profile[3])).set_index("Comparison")
    row = table.loc["HAMLET_MobileNetV3 against HAMLET_ResNet18"]
    # 0.3174 / 0.3450 - 1, 0.485 / 0.505 - 1, 11.70 / 18.00 - 1, 19 / 24 - 1
    assert list(row) == ["-8.0", "-4.0", "-35.0", "-20.8"]


def test_rows_of_other_code_are_named_in_the_notes(profile):
    results = profile[0].assign(stale=[run == "mace_resnet18" for run in profile[0]["run"]])
    assert any(
        "other code than the present, 2 of" in note and "MACE_ResNet18" in note for note in tables.notes(results)
    )
    assert not any("other code" in note for note in tables.notes(results.assign(stale=False)))
    assert any(note.endswith("runs: all runs.") for note in tables.notes(results.assign(stale=True)))


def test_costs_of_a_control_alone_make_every_table():
    cost = dict.fromkeys(("latency_ms", "latency_ms_q25", "latency_ms_q75", "memory_mb"), 1.0)
    cost |= {"parameters": 2, "macs": 3, "descriptor_bytes": 4}
    for run in ("gem_efficientnetlite0", "gem_resnet18"):
        summary = tables.efficiency_summary({"models": {run: cost}})
        assert len(tables.efficiency_table(summary)) in (5, 7)
        assert set(tables.ratio_table(summary)["Measured"]) == {""}


def test_the_reports_methods_on_another_backbone_are_its_rows(root):
    for run in ("hamlet_efficientnetlite0", "gem_efficientnetlite0", "hamlet_efficientnetlite0-no_text"):
        stored.store_run(root, run, 0, 0.4)
    results = report.load_results("quick", "flat")
    table = tables.accuracy_table(tables.accuracy_summary(results))
    assert list(table["Model"]) == [f"{m}_EfficientNetLite0" for m in ("HAMLET", "SPARSE", "MACE", "SpCa", "DSCF")]
    controls = tables.accuracy_table(tables.accuracy_summary(results), "control")
    assert list(controls["Model"])[-1] == "HAMLET_EfficientNetLite0 (no text)"
    compared = tables.accuracy_vs_reported(tables.accuracy_summary(results))
    assert set(compared["Reported"]) == {""} and set(compared["Difference"]) == {""}


def test_search_by_words_is_read_from_each_run_and_averaged_over_seeds():
    names = ["R@1", "R@5", "R@10", "chance_R@1", "chance_R@5", "chance_R@10", "mAP", "chance_mAP", "median_rank"]

    def record(level):
        found = dict.fromkeys(names, level) | {"queries": 40, "median_rank": 10 * level}
        return {"words": {"default": {"text_to_image": found, "ceiling": found | {"mAP": 1.0}}}}

    rows = {"model": "hamlet_a", "label": "HAMLET", "variant": "default", "mAP": 0.5}
    results = pd.DataFrame([rows | {"result": record(level)} for level in (0.2, 0.4)])
    table = tables.words_table(results)
    assert list(table["Direction"]) == ["text to image", "ceiling"]
    assert list(table["mAP"]) == ["0.3000", "1.0000"] and list(table["Median rank"]) == ["3.0", "3.0"]
    assert list(table["chance R@5"]) == ["0.3000", "0.3000"] and list(table["Queries"]) == ["40", "40"]
    assert tables.words_table(results.assign(result=[{}, {}])).empty
    # LSA was fitted anew to queries, captions and training's text: what was stored compares unrelated spaces
    lsa = [record(0.3) | {"parameters": {"text_teacher": "lsa"}}] * 2
    assert tables.words_table(results.assign(result=lsa)).empty


def test_kinds_of_text_are_compared_on_hamlet_alone():
    rows = [
        ("hamlet_a", "shuffled", 0.2),
        ("hamlet_a", "default", 0.5),
        ("hamlet_a", "default", 0.7),
        ("gem_a", "default", 0.9),
    ]
    results = pd.DataFrame(rows, columns=["model", "variant", "mAP"]).assign(**{"P@1": 0.1, "P@5": 0.1, "P@10": 0.1})
    results["result"] = [{"metrics": {"hierarchical": {"HAP": v / 2}}} for v in results["mAP"]]
    table = tables.text_table(results)
    assert list(table["Text"]) == ["mean sentence of the class", "the same, of another class"]
    assert list(table["mAP"]) == ["0.6000", "0.2000"]
    assert list(table["HAP"]) == ["0.3000", "0.1000"]
    assert list(table["mAP by seed"]) == ["0.5000 to 0.7000", ""] and list(table["Words mAP by seed"]) == ["", ""]
    spoken = {"default": {"text_to_image": {"R@1": 0.25, "mAP": 0.125}}}
    results["result"] = [{"metrics": {}, "words": spoken}] * 4
    table = tables.text_table(results)
    assert list(table["Words R@1"]) == ["0.2500"] * 2 and list(table["Words mAP"]) == ["0.1250"] * 2
    other = results[:1].assign(model="hamlet_b", mAP=0.9)  # the backbone with most runs counts
    assert tables.text_table(pd.concat([other, results], ignore_index=True)).equals(table)
    results["result"] = [{"metrics": {}}] * 4  # of runs that kept no hierarchical AP
    assert list(tables.text_table(results)["HAP"]) == ["", ""]


def test_a_table_for_a_notebook_wraps_and_reads_no_formula():
    html = tables.shown(pd.DataFrame({"Class": ["cost_$5_$6 <b>"]})).data
    assert "mathjax_ignore" in html and "white-space: normal" in html and "&lt;b&gt;" in html


def test_summaries_carry_no_bits_of_a_processor():
    frame = pd.DataFrame({"a": [0.1 + 0.2, 1 / 3, float("nan")], "b": ["x", "y", "z"]})
    assert tables.rounded(frame)["a"].tolist()[:2] == [0.3, 0.3333333333]
