"""The verdict rule by hand-made cases, and the claims table on a synthetic results folder with a known answer."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import stored

from hamlet import paths
from hamlet.artifact import claims
from hamlet.artifact import results as report
from hamlet.artifact.paper import Paper
from hamlet.statistics import Interval, bootstrap_p_values, holm

QUERIES, CLASSES = 200, 20
# true levels in the report's order: HAMLET first, SPARSE second, and SpCa last; the control beats HAMLET_MobileNetV3
LEVELS = {
    "hamlet_resnet18": 0.70,
    "hamlet_mobilenetv3": 0.60,
    "sparse_resnet18": 0.66,
    "sparse_mobilenetv3": 0.52,
    "mace_resnet18": 0.56,
    "spca_resnet18": 0.45,
    "dscf_resnet18": 0.54,
    "gem_resnet18": 0.50,
    "gem_mobilenetv3": 0.64,
    "mlp_resnet18": 0.50,
    "mlp_mobilenetv3": 0.50,
    "hamlet_resnet18-no_text": 0.70,
}


def write_run(root, run, level, seed, *, queries=QUERIES, **columns):
    """A sealed run whose true AP is ``level``; ``columns`` replace values of the default protocol."""
    g = np.random.default_rng([seed, *run.encode()])
    labels = np.arange(queries) % CLASSES
    difficulty = np.random.default_rng(7).normal(0, 0.1, queries)
    ap = np.clip(level + difficulty + g.normal(0, 0.03, queries), 0.01, 1)
    frame = pd.DataFrame({"protocol": "default", "query": np.arange(queries), "label": labels, "AP": ap})
    frame["path"] = [f"q{i}.png" for i in range(queries)]
    for column in ("P@1", "P@5", "P@10"):
        frame[column] = np.clip(ap + g.normal(0, 0.01, queries), 0.01, 1)
    frame = frame.assign(**columns)
    other = frame.assign(protocol="seen", AP=0.0)
    folder = root / run / f"seed{seed}"
    folder.mkdir(parents=True)
    # the rows' order in the file is not to matter
    pd.concat([other, frame]).sample(frac=1, random_state=seed).to_parquet(folder / "per_query.parquet")
    digest = hashlib.sha256((folder / "per_query.parquet").read_bytes()).hexdigest()
    model, _, variant = run.partition("-")
    name = {"profile": root.parent.name, "dataset": root.name, "model": model, "variant": variant or "default"}
    content = {"schema": 1, "run": name | {"seed": seed}, "files": {"per_query.parquet": digest}}
    content["metrics"] = {"default": dict.fromkeys(report.ACCURACY, level)}
    sources = {"parameters": stored.PARAMETERS, "provenance": stored.PROVENANCE}
    stored.seal(content | sources, folder / "result.json")


def write_efficiency(root, once=(), none=()):
    """Costs of every run; memory without quartiles for the runs in ``once``, not measured for those in ``none``."""
    models = {}
    for run in LEVELS:
        small = "mobilenet" in run
        latency = (11.7 if small else 18.0) - (1.5 if "sparse" in run else 0) - (1 if "hamlet" not in run else 0)
        models[run] = {"latency_ms": latency, "latency_ms_q25": latency * 0.995, "latency_ms_q75": latency * 1.01}
        models[run] |= {"memory_mb": None if run in none else latency * 7, "parameters": int(latency * 1e6)}
        if run not in once:
            models[run] |= {"memory_mb_q25": latency * 6.95, "memory_mb_q75": latency * 7.02}
    sources = {"parameters": {}, "provenance": stored.PROVENANCE}
    stored.seal({"schema": 1, "models": models} | sources, root / "efficiency" / "result.json")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAMLET_OUTPUT", str(output))
        root = paths.output_dir("results", "quick", "made")
        for run, level in LEVELS.items():
            for seed in range(3 if run == "hamlet_resnet18" else 2):
                write_run(root, run, level, seed)
        write_efficiency(root)
        yield root


@pytest.fixture(scope="module")
def table(results):
    return claims.claims_table("quick", "made", resamples=4000).set_index("id")


QUANTITATIVE = {"kind": "quantitative", "reported": "4.2"}
STATEMENT = {"kind": "comparative"}


@pytest.mark.parametrize(
    ("claim", "low", "high", "p", "expected"),
    [
        (QUANTITATIVE, 3.0, 5.0, 0.001, "reproduced"),
        (QUANTITATIVE, 4.25, 5.0, 0.001, "reproduced"),  # meets 4.2 +- 0.05 at its very end
        (QUANTITATIVE, 4.26, 5.0, 0.001, "direction only"),
        (QUANTITATIVE, 1.0, 4.14, 0.001, "direction only"),
        (QUANTITATIVE | {"tolerance": "1"}, 4.26, 5.3, 0.001, "reproduced"),
        (QUANTITATIVE, -1.0, 9.0, 0.2, "not reproduced"),  # contains 4.2, but the direction is open
        (QUANTITATIVE, 0.1, 9.0, 0.06, "not reproduced"),  # Holm's correction counts
        (QUANTITATIVE, -9.0, -0.1, 0.001, "contradicted"),
        (QUANTITATIVE, -9.0, -0.1, 0.051, "not reproduced"),
        (QUANTITATIVE, 3.0, 5.0, 0.05, "not reproduced"),  # below 0.05, not at it
        (STATEMENT, 0.2, 1.0, 0.001, "reproduced"),
        (STATEMENT, -0.2, 1.0, 0.3, "not reproduced"),
        (STATEMENT, -2.0, -1.0, 0.001, "contradicted"),
        (QUANTITATIVE, 3.0, 5.0, np.nan, "not reproduced"),
    ],
)
def test_the_rule(claim, low, high, p, expected):
    assert claims.verdict(claim, Interval((low + high) / 2, low, high), p) == expected


def test_every_claim_has_a_row_and_one_of_the_five_verdicts(table):
    assert list(table.index) == [c["id"] for c in Paper().claims]
    words = {"reproduced", "direction only", "not reproduced", "contradicted", "not testable here"}
    assert set(table["verdict"]) <= words
    assert ((table["verdict"] == "not testable here") == (table["reason"] != "")).all()


def test_p_values_are_corrected_over_the_claims_that_were_measured(table):
    for end in ("", "_classes"):
        np.testing.assert_allclose(table[f"p_holm{end}"], holm(table[f"p{end}"]), rtol=1e-6)
        assert (table[f"p_holm{end}"] > 1.5 * table[f"p{end}"]).any()


def test_known_answers(table):
    verdicts = table["verdict"]
    assert verdicts["S3.1-1"] == "reproduced"  # HAMLET_ResNet18 first in all four metrics
    assert verdicts["S3.1-10"] == "reproduced"  # SpCa last
    assert verdicts["S3.1-5"] == "direction only"  # 0.70 / 0.66 is 6.1%, not 4.2%
    assert verdicts["S3.2-2"] == "reproduced"  # 11.7 / 18.0 ms
    assert verdicts["S3.2-5"] == "reproduced"
    assert verdicts["S3.2-1"] == "reproduced"  # 24.5% below the next in time and memory, more than 17.6
    assert verdicts["S4.1-4"] == "reproduced"  # 0.60 / 0.70 is a loss of 14.3%, less than 17.6
    assert verdicts["S4.3-4"] == "contradicted"  # and more than 10
    assert verdicts["S4.1-7"] == "not reproduced"  # equal with and without text
    assert verdicts["S5.1-3"] == "contradicted"  # GeM_MobileNetV3 lies above HAMLET_MobileNetV3
    assert table.at["S3.1-5", "value"] == pytest.approx((0.70 / 0.66 - 1) * 100, abs=0.6)
    assert table.at["S3.1-5", "low"] < 6.06 < table.at["S3.1-5", "high"]


def test_the_part_that_decides_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "quick", "made")
    for run, level in list(LEVELS.items())[:7]:
        write_run(root, run, level, 0, **({"P@5": 1.0} if run == "dscf_resnet18" else {}))
    table = claims.claims_table("quick", "made", resamples=4000)
    row = table.set_index("id").loc["S3.1-1"]
    assert row["decided_by"] == "P5[HAMLET_ResNet18] > P5[DSCF_ResNet18]" and row["verdict"] == "contradicted"
    shown = claims.printed_claims(table).set_index("Claim")["Decided by"]
    assert shown["S3.1-1"] == "P5[HAMLET_ResNet18] above P5[DSCF_ResNet18]"
    assert shown["S3.1-10"].startswith("mAP[SpCa_ResNet18] below ") and shown["S3.1-5"] == ""
    table.loc[table["id"] == "S3.1-1", "decided_by_classes"] = "mAP[HAMLET_ResNet18] > mAP[DSCF_ResNet18]"
    interval = claims.printed_claims(table).set_index("Claim").at["S3.1-1", "95%, classes"]
    assert interval.endswith("] of mAP[HAMLET_ResNet18] above mAP[DSCF_ResNet18]")


def test_what_was_stated_after_results_says_so():
    known = {claim["id"]: claim for claim in Paper().claims}
    thresholds = {i for i, c in known.items() if "0.824 *" in str(c.get("formula")) or "0.9 *" in str(c.get("formula"))}
    assert thresholds == {"S3.2-1", "S4.1-4", "S4.3-4"}
    for name in (*thresholds, "S4.1-3", "S4.2-3", "S4.2-13", "S5.2-4"):
        assert "had been seen" in known[name]["note"], name


def test_other_classes_have_a_verdict_of_their_own(tmp_path, monkeypatch):
    """Half of the classes gain 0.23, half lose 0.11: sure for more queries of them, open for other classes."""
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "quick", "made")
    g, effect = np.random.default_rng(3), np.where(np.arange(QUERIES) % CLASSES % 2, 0.23, -0.11)
    write_run(root, "dscf_resnet18", 0.5, 0, AP=0.5 + g.normal(0, 0.03, QUERIES))
    write_run(root, "hamlet_resnet18", 0.56, 0, AP=0.5 + effect + g.normal(0, 0.03, QUERIES))
    table = claims.claims_table("quick", "made", resamples=4000)
    row = table.set_index("id").loc["S4.2-11"]
    assert row["verdict"] == "reproduced"  # 12%, and 13.6% lies in the interval
    assert row["low"] > 0 > row["low_classes"] and row["verdict_classes"] == "not reproduced"
    shown = claims.printed_claims(table).set_index("Claim").loc["S4.2-11"]
    assert list(shown[["Verdict", "Verdict, other classes"]]) == ["reproduced", "not reproduced"]
    assert shown["95%, queries"] != shown["95%, classes"]
    pairs = claims.comparisons("quick", "made", resamples=1000).set_index(["first", "second"])
    pair = pairs.loc[("HAMLET_ResNet18", "DSCF_ResNet18")]
    assert pair["low"] > 0 > pair["low_classes"] and pair["high_classes"] > pair["high"]


def test_absolute_values_are_shown_but_not_judged(table):
    row = table.loc["S3.1-2"]
    assert row["verdict"] == "not testable here" and "names no data set" in row["reason"]
    assert row["value"] == pytest.approx(0.70, abs=0.02) and np.isnan(row["p"])


def test_ties_are_rarely_contradicted(tmp_path, monkeypatch):
    """Seven equal configurations: the best of six rivals lies above HAMLET by chance, which is no evidence."""
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    alarms = []
    for trial in range(8):
        for i, run in enumerate(list(LEVELS)[:7]):
            write_run(paths.output_dir("results", "quick", f"t{trial}"), run, 0.5, 100 * trial + i)
        source = claims.Replicates(Paper(), claims.load_measured("quick", f"t{trial}"), 1000)
        parts = source.paper.parts({"id": "S1-1", "formula": "mAP[HAMLET_ResNet18] > mAP[others]"})
        alarms.append(source.measure(parts, False)[2] < 0.05)
    assert sum(alarms) <= 2  # of 8 at 5%: more than two has probability 0.006


def test_one_part_of_many_that_fails_refutes_after_bonferroni(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    for run in list(LEVELS)[:7]:
        level = 0.512 if run == "mace_resnet18" else 0.50
        write_run(paths.output_dir("results", "quick", "made"), run, level, 0)
    source = claims.Replicates(Paper(), claims.load_measured("quick", "made"), 2000)
    parts = source.paper.parts({"id": "S1-1", "formula": "mAP[HAMLET_ResNet18] > mAP[others]"})
    single = [bootstrap_p_values(part[0].change(source.draws)) for part in parts]
    least = min(against for _, against in single)
    assert len(parts) == 6 and least < 0.05
    assert source.measure(parts, False)[2] == pytest.approx(2 * 6 * least)


def test_pairs_by_hand(results):
    frame = claims.comparisons("quick", "made", resamples=1000)
    assert len(frame) == 17
    first = frame.set_index(["first", "second"]).loc[("HAMLET_ResNet18", "SPARSE_ResNet18")]
    assert first["difference"] == pytest.approx(first["mAP_first"] - first["mAP_second"])
    assert first["low"] < 0.04 < first["high"] and first["seeds"] == "3/2" and first["queries"] == QUERIES
    assert first["p"] == pytest.approx(2 / 1001) and first["improvement"] == 1.0
    tested = frame["p"].notna()
    assert first["p_holm"] == pytest.approx(2 * tested.sum() / 1001)
    missing = frame[~tested]
    assert set(missing["second"]) == {
        "HAMLET_MobileNetV3 (no text)",
        "HAMLET_ResNet18 (no exchange)",
        "GeM_ResNet18 (text)",
    }
    assert missing["reason"].str.startswith("missing: ").all()


def test_one_seed_says_nothing_about_improvement(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "quick", "made")
    for run, seeds in (("hamlet_resnet18", 2), ("mace_resnet18", 1), ("spca_resnet18", 2)):
        for seed in range(seeds):
            write_run(root, run, LEVELS[run], seed)
    frame = claims.comparisons("quick", "made", resamples=200)
    rows = frame.set_index(["first", "second"]).loc["HAMLET_ResNet18"]
    assert rows.at["SpCa_ResNet18", "improvement"] == 1.0 and rows.at["SpCa_ResNet18", "reason"] == ""
    assert np.isnan(rows.at["MACE_ResNet18", "improvement"])
    assert "two seeds" in rows.at["MACE_ResNet18", "reason"]
    assert claims.printed_comparisons(frame).set_index("Second").at["MACE_ResNet18", "P(improvement)"] == ""


def test_improvement_is_averaged_over_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    for dataset, mace in (("made", 0.9), ("other", 0.1), ("single", 0.9)):
        for run, level in (("hamlet_resnet18", 0.5), ("mace_resnet18", mace)):
            for seed in range(1 if dataset == "single" else 3):
                write_run(paths.output_dir("results", "quick", dataset), run, level, seed)
    row = claims.improvement("quick").set_index(["First", "Second"]).loc[("HAMLET_ResNet18", "MACE_ResNet18")]
    assert row.tolist() == ["0.50", "[0.50, 0.50]", "made (3/3), other (3/3)", ""]  # wins on one, loses on the other
    (paths.output_dir("results", "quick", "other") / "mace_resnet18" / "seed1" / "per_query.parquet").write_bytes(b"")
    row = claims.improvement("quick").iloc[3]
    assert row["Data sets (seeds)"] == "made (3/3), other left out: its results do not verify"
    assert row["P(improvement)"] == "0.00"
    rest = claims.improvement("quick").iloc[0]
    assert rest["P(improvement)"] == "" and "two seeds" in rest["Why empty"]


def test_memory_that_was_measured_once_has_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "quick", "made")
    write_efficiency(root, once=("hamlet_mobilenetv3",), none=("mace_resnet18",))
    table = claims.claims_table("quick", "made", resamples=500).set_index("id")
    row = table.loc["S3.2-3"]
    assert row["verdict"] == row["verdict_classes"] == "not testable here"
    assert row["reason"] == "memory was measured once" and np.isnan(row["p"])
    assert row["value"] == pytest.approx(35) and np.isnan(row["low"]) and np.isnan(row["high_classes"])
    assert table.at["S3.2-2", "verdict"] == "reproduced"  # latency alone
    assert table.at["S4.2-6", "reason"] == "missing: memory of mace_resnet18"


def test_missing_runs_are_reasons(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    empty = claims.claims_table("quick", "none")
    assert (empty["verdict"] == "not testable here").all() and empty["value"].isna().all()
    assert claims.comparisons("quick", "none")["p"].isna().all()
    write_run(paths.output_dir("results", "quick", "one"), "hamlet_resnet18", 0.7, 0)
    one = claims.claims_table("quick", "one", resamples=50).set_index("id")
    assert one.at["S3.1-5", "reason"] == "missing: sparse_resnet18"
    assert "efficiency of hamlet_mobilenetv3" in one.at["S3.2-2", "reason"]


def test_unequal_queries_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "quick", "made")
    write_run(root, "hamlet_resnet18", 0.7, 0)
    write_run(root, "mace_resnet18", 0.6, 0, queries=QUERIES - 1)
    with pytest.raises(ValueError, match=r"mace_resnet18.*queries differ"):
        claims.load_measured("quick", "made")


@pytest.mark.parametrize("tamper", ["values", "values and their hash", "efficiency"])
def test_a_changed_file_is_refused_by_every_table(tmp_path, monkeypatch, tamper):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "quick", "made")
    write_run(root, "hamlet_resnet18", 0.7, 0)
    write_efficiency(root)
    record = root / ("efficiency" if tamper == "efficiency" else "hamlet_resnet18/seed0") / "result.json"
    content = json.loads(record.read_text())
    if tamper == "efficiency":
        content["models"]["hamlet_resnet18"]["memory_mb"] = 999.0
    else:
        path = record.with_name("per_query.parquet")
        pd.read_parquet(path).assign(AP=1.0).to_parquet(path)
        if tamper == "values and their hash":
            content["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    record.write_text(json.dumps(content))
    for make in (claims.claims_table, claims.comparisons):
        with pytest.raises(report.ResultError, match="does not match"):
            make("quick", "made")


def test_draws_of_costs_have_the_measured_quartiles(results):
    source = claims.Replicates(Paper(), claims.load_measured("quick", "made"), 40_000)
    cell = source.measured.efficiency["hamlet_resnet18"]
    got = np.quantile(source.draws("latency", "HAMLET_ResNet18"), [0.25, 0.5, 0.75])
    assert got == pytest.approx([cell["latency_ms_q25"], 18.0, cell["latency_ms_q75"]], rel=1e-3)
    got = np.quantile(source.draws("memory", "HAMLET_ResNet18"), [0.25, 0.5, 0.75])
    assert got == pytest.approx([18 * 6.95, 18 * 7, 18 * 7.02], rel=1e-3)
    assert np.ptp(source.draws("parameters", "HAMLET_ResNet18")) == pytest.approx(0)  # exact
    other = source.draws("latency", "MACE_ResNet18")
    assert abs(np.corrcoef(other, source.draws("latency", "HAMLET_ResNet18"))[0, 1]) < 0.02


def test_classes_and_repeats(results):
    again = [claims.claims_table("quick", "made", resamples=200) for _ in range(2)]
    pd.testing.assert_frame_equal(*again)
    by_class = claims.Replicates(Paper(), claims.load_measured("quick", "made"), 200, by_class=True)
    low = claims.judged(by_class)["low"]
    assert low.equals(again[0]["low_classes"]) and not low.equals(again[0]["low"])


def test_printed_tables_are_text_without_holes(table):
    shown = claims.printed_claims(table.reset_index())
    assert shown.map(lambda x: isinstance(x, str)).all(axis=None)
    assert shown.set_index("Claim").at["S3.1-5", "Reported"] == "4.2%"
    assert shown.set_index("Claim").at["S3.1-2", "Measured"].startswith("0.")
    assert {"95%, seeds x queries", "95%, seeds x classes"} <= set(shown)
    corrected = table["p_holm"].dropna()
    assert (shown.set_index("Claim").loc[corrected.index, "p (Holm)"] == corrected.map("{:.4f}".format)).all()
    made = claims.comparisons("quick", "made", resamples=200).dropna(subset="p")
    assert list(claims.printed_comparisons(made)["p (Holm)"]) == [f"{p:.4f}" for p in made["p_holm"]]
    assert (made["p_holm"] > made["p"]).any()
    pairs = claims.printed_comparisons(claims.comparisons("quick", "none"))
    assert pairs.map(lambda x: isinstance(x, str)).all(axis=None)


def test_what_is_equal_is_a_tie_whatever_the_last_bit(results, monkeypatch):
    """Replicates that differ by a processor's rounding alone speak for neither side."""
    source = claims.Replicates(Paper(), claims.load_measured("quick", "made"), 500)
    same = source.accuracy["AP"][:, source.runs.index("mace_resnet18")]
    source.accuracy["AP"][:, source.runs.index("spca_resnet18")] = same * (1 + 1e-15)
    parts = source.paper.parts({"id": "S1-1", "formula": "mAP[MACE_ResNet18] > mAP[SpCa_ResNet18]"})
    assert source.measure(parts, False)[2] == 1.0


def test_side_by_side_holds_what_was_decided_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    base = {"Statement": "s", "Reported": ["4.2%", "", "", ""], "Measured": ["5.0", "-3.0", "", "1.0"]}
    verdicts = {"one": ["direction only", "contradicted", "not testable here", "not reproduced"]}
    verdicts["two"] = ["reproduced", "not reproduced", "not testable here", "direction only"]
    for dataset, words in verdicts.items():
        folder = paths.output_dir("tables", "quick", dataset)
        folder.mkdir(parents=True)
        pd.DataFrame({"Claim": list("ABCD"), "Verdict": words, **base}).to_csv(folder / "claims.csv", index=False)
    table = claims.side_by_side("quick", ["one", "two", "three"]).set_index("Claim")
    assert list(table.index) == ["A", "B"]
    assert list(table.loc["A", ["one", "two"]]) == ["direction only: 5.0%", "reproduced: 5.0%"]
    assert table.at["B", "one"] == "contradicted: -3.0%" and table.at["B", "three"].startswith("not there yet")
    assert claims.side_by_side("quick", ["none"]).empty


def test_a_variant_with_its_exchange_cut_is_set_against_that_variant():
    pairs = claims.ablation_pairs(["hamlet_resnet18", "gem_resnet18"])
    first = {second: one for one, second in pairs}
    assert first["hamlet_resnet18-full_blocks_no_exchange"] == "hamlet_resnet18-full_blocks"
    assert first["hamlet_resnet18-no_exchange"] == first["hamlet_resnet18-full_blocks"] == "hamlet_resnet18"
    assert set(first.values()) == {"hamlet_resnet18", "hamlet_resnet18-full_blocks"}


def test_ablation_takes_from_pretrained_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    write_run(paths.output_dir("results", "pretrained", "scenes"), "hamlet_efficientnetlite0", 0.7, 0)
    write_run(paths.output_dir("results", "ablation", "scenes"), "hamlet_efficientnetlite0-shuffled", 0.6, 0)
    write_run(paths.output_dir("results", "ablation", "scenes"), "mace_efficientnetlite0-text", 0.5, 0)
    frame = claims.comparisons("ablation", "scenes", ablation=True, resamples=500).set_index("second")
    assert set(frame.dropna(subset="p")["first"]) == {"HAMLET_EfficientNetLite0"} and frame["p"].notna().sum() == 2
    assert frame.at["HAMLET_EfficientNetLite0 (shuffled)", "difference"] == pytest.approx(0.1, abs=0.02)
    assert frame.at["MACE_EfficientNetLite0 (text)", "p_holm"] == pytest.approx(4 / 501)
    assert frame.at["HAMLET_EfficientNetLite0 (no gate)", "reason"].startswith("missing: ")
    assert frame.at["HAMLET_EfficientNetLite0 (shuffled)", "reason"] == ""


def test_text_counts_for_what_it_adds_to_shuffled_captions(tmp_path, monkeypatch):
    """By class where single queries were kept, by family too; of both runs' seeds in common alone."""
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root, graded = paths.output_dir("results", "ablation", "scenes"), {"HAP": np.linspace(0.3, 0.5, QUERIES)}
    for seed in (0, 1):
        write_run(root, "hamlet_efficientnetlite0", 0.7, seed, HAP=graded["HAP"] + 0.1)
    write_run(root, "hamlet_efficientnetlite0-shuffled", 0.6, 0, **graded)
    write_run(root, "gem_efficientnetlite0-shuffled", 0.1, 0, **graded)
    fine, family = claims.language("ablation", "scenes", resamples=500).to_dict("records")
    assert fine["difference"] == pytest.approx(0.1, abs=0.02) and family["difference"] == pytest.approx(0.1)
    assert (family["true"], family["shuffled"]) == (pytest.approx(0.5), pytest.approx(0.4))
    assert fine["low"] != fine["low_classes"] and family["low"] == pytest.approx(family["high_classes"])
    assert fine["p"] < 0.01 and family["p"] < 0.01 and fine["seeds"] == family["seeds"] == "1/1"
    shown = claims.printed_language(claims.language("ablation", "scenes", resamples=500))
    assert list(shown["Difference"])[1] == "+0.1000" and not any(shown["Why empty"])


def test_text_without_kept_queries_has_its_means_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    root = paths.output_dir("results", "ablation", "scenes")
    write_run(root, "hamlet_efficientnetlite0", 0.7, 0)
    assert claims.language("ablation", "scenes")["reason"].str.startswith("missing").all()
    write_run(root, "hamlet_efficientnetlite0-shuffled", 0.6, 0)
    for name, level in (("", 0.5), ("-shuffled", 0.45)):
        path = root / f"hamlet_efficientnetlite0{name}" / "seed0" / "result.json"
        record = json.loads(path.read_text())
        record["metrics"]["hierarchical"] = {"HAP": level}
        stored.seal({k: v for k, v in record.items() if k != "digest"}, path)
    family = claims.language("ablation", "scenes", resamples=200).to_dict("records")[1]
    assert family["difference"] == pytest.approx(0.05) and np.isnan(family["p"])
    assert family["reason"] == "not kept for single queries"
