"""Figures: what they draw, that their bytes repeat, and the Pareto front against a loop."""

import io
import itertools
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import stored
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hamlet import paths
from hamlet.artifact import claims, figures, paper, pictures, tables
from hamlet.artifact import results as report
from hamlet.errors import HamletError

FEW = ("spca_resnet18", "dscf_resnet18", "gem_resnet18-text", "mlp_mobilenetv3")  # left out: time is short


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels: time is short."""
    monkeypatch.setattr(figures, "RESOLUTIONS", (60, 40))


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAMLET_OUTPUT", str(root))
        stored.store_profile(root, without=FEW)
        results = report.load_results("quick", "flat")
        cost = tables.efficiency_summary(report.load_efficiency("quick", "flat"))
    return results, tables.accuracy_summary(results), cost


def drawn(name, profile):
    """(figure, data) of each figure."""
    results, accuracy, cost = profile
    images, run = pictures.thumbnails(results, "hamlet_resnet18"), "hamlet_resnet18"
    make, data = {
        "accuracy": (figures.accuracy_bars, lambda: accuracy),
        "efficiency": (figures.efficiency_bars, lambda: cost),
        "tradeoff": (figures.tradeoff, lambda: figures.tradeoff_data(accuracy, cost)),
        "backbones": (figures.backbones, lambda: figures.backbone_data(accuracy, cost)),
        "learning_curves": (figures.learning_curves, lambda: figures.curves_data(results)),
        "ablation": (figures.ablation, lambda: compared(results)),
        "captions_quality": (figures.captions_quality, lambda: tables.text_table(results)),
        "retrieval_gallery": (
            lambda rows, title: pictures.retrieval_gallery(rows, images, title),
            lambda: pictures.neighbours_data(results, run),
        ),
        "contact_sheet": (
            lambda rows, title: pictures.contact_sheet(rows, images, title),
            lambda: pictures.contact_data(results, run),
        ),
    }[name]
    rows = data()
    return make(rows, "profile quick, data set flat"), rows


def compared(results):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAMLET_OUTPUT", str(results["folder"].iloc[0].parents[4]))
        return claims.comparisons("quick", "flat", ablation=True, resamples=100)


NAMES = [
    *("accuracy", "efficiency", "tradeoff", "backbones", "learning_curves", "ablation", "captions_quality"),
    *("retrieval_gallery", "contact_sheet"),
]


def texts(figure):
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


@pytest.mark.parametrize("name", NAMES)
def test_three_files_that_repeat_and_carry_no_date(name, profile, tmp_path):
    figure, data = drawn(name, profile)
    assert isinstance(figure, Figure)
    written = figures.save_figure(figure, tmp_path / "a" / name, data)
    again = figures.save_figure(drawn(name, profile)[0], tmp_path / "b" / name, data)
    assert [path.name for path in written] == [f"{name}.{end}" for end in ("pdf", "png", "csv")]
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in written)
    assert all(path.stat().st_size < 2_000_000 for path in written)
    pdf, png = written[0].read_bytes(), written[1].read_bytes()
    assert b"CreationDate" not in pdf and b"Producer" not in pdf and b"Software" not in png
    assert len(pd.read_csv(written[2])) == len(data)
    alt = Image.open(written[1]).text["Description"]
    assert alt == figure.get_label() and alt.startswith("profile quick, data set flat") and len(alt) > 40
    assert (
        figures.shown(figure).metadata["alt"] == alt
        if figures.shown(figure).metadata
        else figures.shown(figure).alt == alt
    )


def test_bytes_do_not_depend_on_the_process(tmp_path, profile):
    data = figures.tradeoff_data(profile[1], profile[2])
    data.to_csv(tmp_path / "data.csv", index=False)
    code = (
        "import sys, pandas as pd; from hamlet.artifact import figures; d = pd.read_csv(sys.argv[1]);"
        f"figures.RESOLUTIONS = {figures.RESOLUTIONS};"
        "figures.save_figure(figures.tradeoff(d, chr(116)), sys.argv[2], d)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "data.csv"), str(tmp_path / "other")]
    subprocess.run(command, check=True, env=environment)
    data = pd.read_csv(tmp_path / "data.csv")
    for path in figures.save_figure(figures.tradeoff(data, "t"), tmp_path / "own", data):
        assert path.read_bytes() == path.with_stem("other").read_bytes(), path.suffix


def test_every_bar_has_its_length_and_a_missing_run_says_so(profile):
    figure, data = drawn("accuracy", profile)
    axis = figure.axes[0]
    lengths = [bar.get_width() for bar in axis.patches]
    expected = data.loc[data["metric"] == "mAP", "mean"].dropna()
    assert np.allclose(sorted(lengths), sorted(expected))
    left, right = axis.get_xlim()
    assert left == 0 and right > max(expected)
    assert " not run" in texts(figure)
    hatched = sum(bar.get_hatch() is not None for bar in axis.patches)
    assert hatched == len(set(paper.CONTROLS) - set(FEW)) == 6


def test_seeds_are_marked_and_named_from_two_on(profile):
    summary, dots = profile[1].dropna(subset="mean"), "dots: lowest and highest seed"

    def marked(seeds):
        figure = figures.accuracy_bars(summary.assign(seeds=seeds), "t")
        lines = figure.findobj(lambda artist: artist.get_gid() == "seeds")
        return sum(len(line.get_xdata()) for line in lines), any(dots in text for text in texts(figure))

    assert marked(1) == (0, False)
    assert marked(2) == marked(3) == (2 * len(summary), True)
    assert marked([2] * 4 + [1] * (len(summary) - 4)) == (8, True)  # the four metrics of one run


def test_whiskers_run_both_ways_over_seeds_only_where_every_run_has_three(profile):
    summary = profile[1].dropna(subset="mean").assign(seed_half_width=0.03, query_half_width=0.01)
    row = summary.iloc[0]
    for seeds, half, over in ((3, 0.03, "seeds"), ([2] * 4 + [3] * (len(summary) - 4), 0.01, "queries")):
        figure = figures.accuracy_bars(summary.assign(seeds=seeds), "t")
        whisker = next(line for line in figure.axes[0].lines if line.get_marker() == "|")
        assert list(whisker.get_xdata()) == pytest.approx([row["mean"] - half, row["mean"] + half])
        assert any(text.startswith(f"95% interval over {over}") for text in texts(figure))


def test_a_reported_value_is_marked_in_the_panel_of_its_quantity(profile):
    cost = profile[2]
    figure = figures.efficiency_bars(cost, "t")
    for axis, key in zip(figure.axes, ("latency_ms", "memory_mb", "parameters_m"), strict=False):
        marked = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]
        told = cost.loc[cost[key].notna(), f"reported_{key}"].dropna()
        assert marked and marked == list(told)


def test_the_ablation_shows_both_intervals_and_fills_what_shows_something():
    ends = {"low": 0.01, "high": 0.03, "low_classes": -0.01, "high_classes": 0.05, "difference": 0.02}
    data = pd.DataFrame([ends | {"p": 0.001, "p_holm": p, "first": "H", "second": f"H ({p})"} for p in (0.2, 0.01)])
    lines = figures.ablation(data, "t").axes[0].lines
    spans = [(line.get_linewidth(), list(line.get_xdata())) for line in lines if len(line.get_xdata()) == 2]
    assert spans.count((3.5, [0.01, 0.03])) == spans.count((1.0, [-0.01, 0.05])) == 2
    fills = {tuple(line.get_ydata()): line.get_markerfacecolor() for line in lines if line.get_marker() == "o"}
    assert fills == {(0,): "#0072B2", (1,): "white"}  # by the corrected p; the first row stands on top


def test_memory_has_whiskers_where_its_quartiles_were_measured(profile):
    cost, over = profile[2], "(memory: over processes)"
    without = cost.drop(columns=["memory_mb_q25", "memory_mb_q75"], errors="ignore")
    measured = cost.assign(memory_mb_q25=cost["memory_mb"] - 1, memory_mb_q75=cost["memory_mb"] + 2)
    for summary, expected in ((without, False), (measured, True)):
        figure = figures.efficiency_bars(summary, "t")
        assert any(line.get_marker() == "|" for line in figure.axes[1].lines) == expected
        assert any(over in text for text in texts(figure)) == expected


def test_colours_stay_apart_in_grey():
    def grey(colour):
        return np.dot([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], [0.299, 0.587, 0.114])

    assert abs(grey(figures.COLOURS["ResNet18"]) - grey(figures.COLOURS["MobileNetV3"])) > 0.2
    assert abs(grey(figures.COLOURS["MobileNetV3"]) - 0.85) > 0.15  # the other configurations' curves


def test_reported_values_are_labelled_as_reported(profile):
    for name in ("accuracy", "efficiency"):
        assert figures.REPORTED in texts(drawn(name, profile)[0])
    assert any(text.startswith("Reported") for text in texts(drawn("tradeoff", profile)[0]))
    assert any("(reported)" in text for text in texts(drawn("backbones", profile)[0]))
    bare = profile[1].assign(reported=np.nan)  # the report has no such backbone: nothing to be explained
    assert figures.REPORTED not in texts(figures.accuracy_bars(bare, "profile pretrained"))


def test_pareto_front_against_a_loop(profile):
    _, accuracy, cost = profile
    rng = np.random.default_rng(3)
    shuffled = cost.assign(latency_ms=rng.integers(5, 12, len(cost)).astype(float))  # ties included
    data = figures.tradeoff_data(accuracy, shuffled)
    for source, rows in data.groupby("source"):
        for row in rows.itertuples():
            dominated = any(
                other.latency_ms <= row.latency_ms
                and other.mAP >= row.mAP
                and (other.latency_ms < row.latency_ms or other.mAP > row.mAP)
                for other in rows.itertuples()
            )
            assert row.pareto == (not dominated), (source, row.model)
    reported = data[(data["source"] == "reported") & data["pareto"]]
    assert set(reported["model"]) == {"HAMLET_ResNet18", "HAMLET_MobileNetV3", "SPARSE_ResNet18", "SPARSE_MobileNetV3"}


def test_the_front_is_over_every_row_and_a_variant_can_dominate(profile):
    _, accuracy, cost = profile
    better = accuracy["run"].eq("hamlet_resnet18-no_text") & accuracy["metric"].eq("mAP")
    data = figures.tradeoff_data(accuracy.assign(mean=accuracy["mean"].mask(better, 0.9)), cost.assign(latency_ms=20.0))
    front = data[(data["source"] == "measured") & data["pareto"]]
    assert list(front["model"]) == ["HAMLET_ResNet18 (no text)"]


def test_intervals_run_both_ways(profile):
    data = figures.tradeoff_data(profile[1], profile[2])
    row = data[(data["source"] == "measured") & (data["model"] == "HAMLET_ResNet18")].iloc[0]
    assert [row["latency_low"], row["latency_ms"], row["latency_high"]] == [23, 24, 26]
    assert row["mAP"] - row["mAP_low"] == pytest.approx(row["mAP_high"] - row["mAP"]) and row["mAP_low"] < row["mAP"]
    drawn_lines = figures.tradeoff(data, "t").axes[0].lines
    assert any(list(line.get_xdata()) == [23, 26] for line in drawn_lines)


def test_the_key_explains_every_marker_shape(profile):
    figure, data = drawn("tradeoff", profile)
    named = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {model.split("_")[0] for model in data["model"]} <= named


@pytest.mark.parametrize("dataset", ["scenes", "grocery"])
def test_labels_of_the_tradeoff_cover_no_label_and_no_point(dataset):
    cost = tables.efficiency_summary(report.load_efficiency("quick", dataset))
    data = figures.tradeoff_data(tables.accuracy_summary(report.load_results("quick", dataset)), cost)
    figure = figures.tradeoff(data, "t")
    figure.draw_without_rendering()
    for axis in figure.axes:
        named = [text for text in axis.texts if text.get_text()]
        boxes = [Text.get_window_extent(text) for text in named]
        assert len(boxes) == (data["source"] == axis.get_title().split()[0].lower()).sum()
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        points = [axis.transData.transform(dots.get_offsets()[0]) for dots in axis.collections]
        for box in boxes:
            assert axis.bbox.x0 - 1 < box.x0 and box.x1 < axis.bbox.x1 + 1
            assert not box.count_contains(points)


def test_backbone_changes(profile):
    data = figures.backbone_data(profile[1], profile[2]).set_index(["method", "source", "quantity"])
    row = data.loc[("HAMLET", "reported", "Inference time (ms)")]
    assert row["MobileNetV3"] / row["ResNet18"] - 1 == pytest.approx(11.70 / 18.00 - 1)
    assert list(data.loc[("HAMLET", "reported", "mAP")]) == [0.3450, 0.3174]
    assert list(data.loc[("HAMLET", "measured", "mAP")]) == pytest.approx([0.505, 0.485])
    assert {method for method, *_ in data.index} == {"HAMLET", "SPARSE", "GeM", "HAMLET (no text)"}


def test_gallery_marks_right_and_wrong_and_shows_the_right_pixels(profile):
    figure, data = drawn("retrieval_gallery", profile)
    titles = [axis.get_title() for axis in figure.axes]
    assert sum(title.startswith("✓") for title in titles) == data["correct"].sum()
    assert sum(title.startswith("✗") for title in titles) == (~data["correct"]).sum()
    images = pictures.thumbnails(profile[0], "hamlet_resnet18")
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert np.array_equal(shown[0], images[data["query_path"].iloc[0]])
    assert np.array_equal(shown[1], images[data["path"].iloc[0]])
    split = stored.dataset().query
    original = split.images[split.paths.index(data["query_path"].iloc[0])]
    assert abs(original.astype(int).mean((0, 1)) - shown[0].astype(int).mean((0, 1))).max() < 12


def test_the_pictures_are_of_the_first_seed_whatever_the_order_of_the_results(profile):
    results, run = profile[0].iloc[::-1], "hamlet_resnet18"
    first = results[(results["run"] == run) & (results["seed"] == 0)]["folder"].item()
    rows = pd.read_parquet(first / "neighbours.parquet")
    assert pictures.neighbours_data(results, run).equals(rows)


def test_a_run_without_pictures_says_so_in_their_place(profile):
    data = pictures.neighbours_data(profile[0], "hamlet_resnet18")
    assert "no picture\nstored" in texts(pictures.retrieval_gallery(data, {}, "t"))


def test_names_with_dollars_are_no_formulas(profile, tmp_path):
    results, accuracy, _ = profile
    data = pictures.neighbours_data(results, "hamlet_resnet18").assign(**{"class": "cost_$5_$6", "query_class": "a$_$"})
    classes = pd.DataFrame({"class": ["cost_$5_$6"], "path": ["x"]})
    named = accuracy.assign(model="cost_$5_$6")
    points = figures.tradeoff_data(named, profile[2].assign(model="cost_$5_$6"))
    for index, figure in enumerate((
        pictures.retrieval_gallery(data, {}, "$5_$6"), pictures.contact_sheet(classes, {}, "$5_$6"),
        figures.accuracy_bars(named, "$5_$6"), figures.tradeoff(points, "$5_$6"),
    )):  # fmt: skip
        figures.save_figure(figure, tmp_path / str(index), classes)
        figures.shown(figure)


LONGEST = [  # of the Grocery Store Dataset and of scenes
    "Arla-Natural-Mild-Low-Fat-Yoghurt", "Garant-Ecological-Medium-Fat-Milk", "God-Morgon-Red-Grapefruit-Juice",
    "Tropicana-Golden-Grapefruit", "lighthouse_triangles", "lighthouse_lattice", "butterfly_triangles",
]  # fmt: skip


def test_gallery_names_are_whole_and_fit_over_their_images(profile):
    data = pictures.neighbours_data(profile[0], "hamlet_resnet18")
    names = np.resize(LONGEST, len(data))
    data = data.assign(**{"class": names, "query_class": np.roll(names, 1)})
    data["query_class"] = data.groupby("query_path")["query_class"].transform("first")
    figure = pictures.retrieval_gallery(data, {}, "t")
    figure.draw_without_rendering()
    shown = [axis for axis in figure.axes if axis.get_title()]
    whole = [axis.get_title().replace("\n", "").lstrip("✓✗ ") for axis in shown]
    assert sorted(whole) == sorted([*names, *data.groupby("query_path")["query_class"].first()])
    assert max(axis.get_title().count("\n") for axis in shown) == 1
    boxes = [axis.title.get_window_extent() for axis in shown]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(axis.bbox) for box in boxes for axis in shown)


def test_gallery_frames_differ_without_their_colour(profile):
    figure, _ = drawn("retrieval_gallery", profile)
    styles = {mark: set() for mark in "✓✗"}
    for axis in figure.axes:
        if axis.get_title().startswith(("✓", "✗")):
            styles[axis.get_title()[0]].add(str(axis.spines["left"].get_linestyle()))
    assert styles["✓"] == {"-"} and styles["✗"] and not styles["✓"] & styles["✗"]


@pytest.mark.parametrize(
    "name, lines",
    [
        ("Kiwi", ["Kiwi"]),
        ("Arla-Natural-Mild-Low-Fat-Yoghurt", ["Arla-Natural-Mild-", "Low-Fat-Yoghurt"]),
        ("lighthouse_lattice", ["lighthouse_lattice"]),
        ("lighthouse_triangles", ["lighthouse_", "triangles"]),
        ("one two three four five", ["one two three", "four five"]),
        ("x" * 20, ["x" * 18, "xx"]),
        ("", [""]),
    ],
)
def test_names_are_wrapped_not_cut(name, lines):
    assert pictures.wrapped(name).split("\n") == lines


def test_learning_curves_show_each_configuration_twice():
    frame = pd.DataFrame({"epoch": [1, 2], "metric_loss": [2.0, 1.0], "validation_mAP": [0.1, 0.2], "seed": 0})
    for count in (1, 2, 7, 15):
        data = pd.concat([frame.assign(run=f"m{i}", model=f"M{i}_ResNet18") for i in range(count)])
        shown = [axis for axis in figures.learning_curves(data, "t").axes if axis.get_visible()]
        assert len(shown) == 2 * count
        assert sum(axis.get_xlabel() == "epoch" for axis in shown) == min(count, 5)  # once, below each column


def test_data_of_figures_has_six_digits(profile, tmp_path):
    figure, _ = drawn("captions_quality", profile)
    path = figures.save_figure(figure, tmp_path / "a", pd.DataFrame({"x": [1 / 3, 123456.789]}))[2]
    assert path.read_text() == "x\n0.333333\n123457.0\n"


def test_search_figure_says_what_was_searched():
    rows = itertools.product([1000, 2000], figures.INDEXES)
    data = pd.DataFrame(rows, columns=["size", "kind"]).assign(dimensions=128, threads=1, value=16)
    data = data.assign(**{"recall@10": 0.9, "queries_per_second": 100.0, "bytes_per_image": 512})
    figure = figures.search_tradeoff(data)
    assert list(figure.axes[0].lines[0].get_xdata()) == [100.0]  # speed to the right, recall upwards
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.9]
    assert "synthetic 128-d vectors, CPU, one thread:" in figure.get_suptitle()
    assert figures.search_conditions(data.assign(threads=4)).endswith("4 threads")
    assert len({marker for _, marker in figures.INDEXES.values()}) == len(figures.INDEXES)


def test_an_unknown_run_is_refused_by_name(profile):
    with pytest.raises(HamletError, match="no run 'x'"):
        pictures.neighbours_data(profile[0], "x")


def test_contact_sheet_shows_every_class_once(profile):
    data = pictures.contact_data(profile[0], "hamlet_resnet18")
    assert list(data["class"]) == sorted({"blue", "orange", "red", "sky"})
    assert len(pictures.contact_data(profile[0], "hamlet_resnet18", classes=2)) == 2


def test_png_is_not_blank(profile):
    buffer = io.BytesIO()
    drawn("efficiency", profile)[0].savefig(buffer, format="png")
    assert np.asarray(Image.open(buffer).convert("L")).std() > 20


def test_a_heavy_figure_is_written_at_a_lower_resolution(profile, tmp_path, monkeypatch):
    figure, data = drawn("learning_curves", profile)
    full = Image.open(figures.save_figure(figure, tmp_path / "full", data)[1]).width
    monkeypatch.setattr(figures, "LIMIT", (tmp_path / "full.png").stat().st_size - 1)
    small = figures.save_figure(figure, tmp_path / "small", data)[1]
    assert Image.open(small).width < full and small.stat().st_size < figures.LIMIT


def test_backbones_says_so_where_no_method_has_both():
    columns = ["method", "source", "quantity", *figures.REPORTED_BACKBONES]
    figure = figures.backbones(pd.DataFrame(columns=columns), "profile pretrained")
    assert "No method was run on both" in figure.axes[0].texts[0].get_text()
