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
from hamlet.artifact import figures, pictures
from hamlet.artifact import results as report

FEW = ("spca_resnet18", "dscf_resnet18", "gem_resnet18-text", "mlp_mobilenetv3")  # left out: time is short


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    root = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAMLET_OUTPUT", str(root))
        stored.store_profile(root, without=FEW)
        results = report.load_results("quick", "flat")
        cost = report.efficiency_summary(report.load_efficiency("quick", "flat"))
    return results, report.accuracy_summary(results), cost


def drawn(name, profile):
    """(figure, data) of each figure."""
    results, accuracy, cost = profile
    images = stored.dataset()
    if name == "accuracy":
        return figures.accuracy_bars(accuracy), accuracy
    if name == "efficiency":
        return figures.efficiency_bars(cost), cost
    make, data = {
        "tradeoff": (figures.tradeoff, lambda: figures.tradeoff_data(accuracy, cost)),
        "backbones": (figures.backbones, lambda: figures.backbone_data(accuracy, cost)),
        "learning_curves": (figures.learning_curves, lambda: figures.curves_data(results)),
        "retrieval_gallery": (
            lambda rows: pictures.retrieval_gallery(rows, images),
            lambda: pictures.neighbours_data(results, "hamlet_resnet18"),
        ),
        "contact_sheet": (
            lambda rows: pictures.contact_sheet(rows, images),
            lambda: pictures.contact_data(images),
        ),
    }[name]
    rows = data()
    return make(rows), rows


NAMES = [
    "accuracy",
    "efficiency",
    "tradeoff",
    "backbones",
    "learning_curves",
    "retrieval_gallery",
    "contact_sheet",
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


def test_bytes_do_not_depend_on_the_process(tmp_path, profile):
    data = figures.tradeoff_data(profile[1], profile[2])
    data.to_csv(tmp_path / "data.csv", index=False)
    code = (
        "import sys, pandas as pd; from hamlet.artifact import figures; d = pd.read_csv(sys.argv[1]);"
        "figures.save_figure(figures.tradeoff(d), sys.argv[2], d)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "data.csv"), str(tmp_path / "other")]
    subprocess.run(command, check=True, env=environment)
    data = pd.read_csv(tmp_path / "data.csv")
    for path in figures.save_figure(figures.tradeoff(data), tmp_path / "own", data):
        assert path.read_bytes() == path.with_stem("other").read_bytes(), path.suffix


def test_every_bar_has_its_length_and_a_missing_run_says_so(profile):
    figure, data = drawn("accuracy", profile)
    axis = figure.axes[0]
    lengths = [bar.get_width() for bar in axis.patches]
    expected = data.loc[data["metric"] == "mAP", "mean"].dropna()
    assert np.allclose(sorted(lengths), sorted(expected))
    assert " not run" in texts(figure)
    hatched = sum(bar.get_hatch() is not None for bar in axis.patches)
    assert hatched == len(set(report.CONTROLS) - set(FEW)) == 6


def test_seeds_are_marked_and_named_from_two_on(profile):
    summary, dots = profile[1].dropna(subset="mean"), "dots: lowest and highest seed"

    def marked(seeds):
        figure = figures.accuracy_bars(summary.assign(seeds=seeds))
        lines = figure.findobj(lambda artist: artist.get_gid() == "seeds")
        return sum(len(line.get_xdata()) for line in lines), any(dots in text for text in texts(figure))

    assert marked(1) == (0, False)
    assert marked(2) == marked(3) == (2 * len(summary), True)
    assert marked([2] * 4 + [1] * (len(summary) - 4)) == (8, True)  # the four metrics of one run


def test_memory_has_whiskers_where_its_quartiles_were_measured(profile):
    cost, over = profile[2], "(memory: over processes)"
    without = cost.drop(columns=["memory_mb_q25", "memory_mb_q75"], errors="ignore")
    measured = cost.assign(memory_mb_q25=cost["memory_mb"] - 1, memory_mb_q75=cost["memory_mb"] + 2)
    for summary, expected in ((without, False), (measured, True)):
        figure = figures.efficiency_bars(summary)
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
    assert set(reported["model"]) == {
        "HAMLET_ResNet18",
        "HAMLET_MobileNetV3",
        "SPARSE_ResNet18",
        "SPARSE_MobileNetV3",
    }


CROWDED = [  # measured once: a short level piece of the front starts at a point whose name is longer than it
    ("HAMLET_ResNet18", 60.8, 0.418, 25.8, True), ("HAMLET_MobileNetV3", 24.4, 0.314, 11.6, True),
    ("SPARSE_ResNet18", 49.3, 0.314, 21.9, False), ("SPARSE_MobileNetV3", 16.5, 0.150, 9.8, False),
    ("MACE_ResNet18", 80.2, 0.335, 24.5, False), ("SpCa_ResNet18", 62.9, 0.362, 23.8, False),
    ("DSCF_ResNet18", 84.7, 0.400, 24.3, False), ("GeM_ResNet18", 44.5, 0.371, 11.4, True),
    ("GeM_MobileNetV3", 14.3, 0.214, 3.5, True), ("MLP_ResNet18", 48.5, 0.345, 25.8, False),
    ("MLP_MobileNetV3", 16.3, 0.195, 11.6, False),
]  # fmt: skip


def crowded(profile):
    rows = pd.DataFrame(CROWDED, columns=["model", "latency_ms", "mAP", "parameters_m", "pareto"])
    rows["backbone"] = rows["model"].str.split("_").str[1]
    return pd.concat([rows.assign(source=source) for source in ("measured", "reported")])


@pytest.mark.parametrize("make", [lambda p: figures.tradeoff_data(p[1], p[2]), crowded])
def test_labels_of_the_tradeoff_cover_no_label_no_point_and_no_front(profile, make):
    data = make(profile)
    figure = figures.tradeoff(data)
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axis.texts]
        assert len(boxes) == (data["source"] == axis.get_title().split()[0].lower()).sum()
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        points = [axis.transData.transform(dots.get_offsets()[0]) for dots in axis.collections]
        front = axis.lines[0].get_path().transformed(axis.lines[0].get_transform())
        steps = front.interpolated(200).vertices  # 200 places on each piece
        for box in boxes:
            assert axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            assert not box.count_contains(points) and not box.count_contains(steps)


def test_the_crowded_tradeoff_names_each_point_beside_it(profile):
    figure = figures.tradeoff(crowded(profile))
    figure.draw_without_rendering()
    for axis in figure.axes:
        for text in axis.texts:
            point, box = axis.transData.transform(text.xy), Text.get_window_extent(text)
            gap = np.maximum([box.x0 - point[0], box.y0 - point[1]], [point[0] - box.x1, point[1] - box.y1])
            assert gap.max() < 30, text.get_text()


def test_backbone_changes(profile):
    data = figures.backbone_data(profile[1], profile[2]).set_index(["method", "source", "quantity"])
    row = data.loc[("HAMLET", "reported", "Inference time (ms)")]
    assert row["MobileNetV3"] / row["ResNet18"] - 1 == pytest.approx(11.70 / 18.00 - 1)
    assert {method for method, *_ in data.index} == {"HAMLET", "SPARSE", "GeM", "HAMLET (no text)"}


def test_gallery_marks_right_and_wrong_and_shows_the_right_pixels(profile):
    figure, data = drawn("retrieval_gallery", profile)
    titles = [axis.get_title() for axis in figure.axes]
    assert sum(title.startswith("✓") for title in titles) == data["correct"].sum()
    assert sum(title.startswith("✗") for title in titles) == (~data["correct"]).sum()
    split = stored.dataset().query
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert np.array_equal(shown[0], split.images[split.paths.index(data["query_path"].iloc[0])])
    assert np.array_equal(shown[1], split.images[split.paths.index(data["path"].iloc[0])])


LONGEST = [  # of the Grocery Store Dataset and of scenes
    "Arla-Natural-Mild-Low-Fat-Yoghurt", "Garant-Ecological-Medium-Fat-Milk", "God-Morgon-Red-Grapefruit-Juice",
    "Tropicana-Golden-Grapefruit", "lighthouse_triangles", "lighthouse_lattice", "butterfly_triangles",
]  # fmt: skip


def test_gallery_names_are_whole_and_fit_over_their_images(profile):
    data = pictures.neighbours_data(profile[0], "hamlet_resnet18")
    names = np.resize(LONGEST, len(data))
    data = data.assign(**{"class": names, "query_class": np.roll(names, 1)})
    data["query_class"] = data.groupby("query_path")["query_class"].transform("first")
    figure = pictures.retrieval_gallery(data, stored.dataset())
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
    assert styles["✓"] and styles["✗"] and not styles["✓"] & styles["✗"]


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


@pytest.mark.parametrize("count, columns", [(2, 2), (7, 7), (8, 4), (11, 6), (12, 6), (13, 7), (15, 5)])
def test_learning_curves_leave_few_places_empty(count, columns):
    frame = pd.DataFrame(
        {"epoch": [1, 2], "metric_loss": [2.0, 1.0], "validation_mAP": [0.1, 0.2], "seed": 0}
    )
    data = pd.concat([frame.assign(run=f"m{i}", model=f"M{i}_ResNet18") for i in range(count)])
    figure = figures.learning_curves(data)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 2 * count
    assert shown[0].get_gridspec().ncols == columns
    assert sum(axis.get_xlabel() == "epoch" for axis in shown) == columns  # once, below each column


def test_search_figure_says_what_was_searched():
    rows = itertools.product([1000, 2000], figures.INDEXES)
    data = pd.DataFrame(rows, columns=["size", "kind"]).assign(dimensions=128, threads=1, value=16)
    data = data.assign(**{"recall@10": 0.9, "queries_per_second": 100.0, "bytes_per_image": 512})
    figure = figures.search_tradeoff(data)
    assert "synthetic 128-d vectors, CPU, one thread:" in figure.get_suptitle()
    assert figures.search_conditions(data.assign(threads=4)).endswith("4 threads")
    assert len({marker for _, marker in figures.INDEXES.values()}) == len(figures.INDEXES)


def test_gallery_refuses_unknown_runs_and_images(profile):
    with pytest.raises(KeyError, match="no run 'x'"):
        pictures.neighbours_data(profile[0], "x")
    data = pictures.neighbours_data(profile[0], "hamlet_resnet18").assign(path="elsewhere.png")
    with pytest.raises(KeyError, match="holds no image"):
        pictures.retrieval_gallery(data, stored.dataset())


def test_contact_sheet_shows_every_class_once_before_any_twice():
    data = pictures.contact_data(stored.dataset(), images=2)
    assert list(zip(data["coarse"], data["class"], strict=True)) == [
        ("cold", "blue"), ("cold", "sky"), ("warm", "orange"), ("warm", "red"),
    ]  # fmt: skip


def test_png_is_not_blank(profile):
    buffer = io.BytesIO()
    drawn("efficiency", profile)[0].savefig(buffer, format="png")
    assert np.asarray(Image.open(buffer).convert("L")).std() > 20


def test_a_heavy_figure_is_written_at_a_lower_resolution(profile, tmp_path, monkeypatch):
    figure, data = drawn("contact_sheet", profile)
    full = Image.open(figures.save_figure(figure, tmp_path / "full", data)[1]).width
    monkeypatch.setattr(figures, "LIMIT", (tmp_path / "full.png").stat().st_size - 1)
    small = figures.save_figure(figure, tmp_path / "small", data)[1]
    assert Image.open(small).width < full and small.stat().st_size < figures.LIMIT
