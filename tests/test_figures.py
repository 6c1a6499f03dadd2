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
from PIL import Image

from hamlet import figures, paths, pictures, report

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
        "import sys, pandas as pd; from hamlet import figures; d = pd.read_csv(sys.argv[1]);"
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


def test_colours_stay_apart_in_grey():
    def grey(colour):
        return np.dot([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], [0.299, 0.587, 0.114])

    assert abs(grey(figures.COLOURS["ResNet18"]) - grey(figures.COLOURS["MobileNetV3"])) > 0.2


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


def test_no_two_labels_of_the_tradeoff_overlap(profile):
    figure, data = drawn("tradeoff", profile)
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == (data["source"] == axis.get_title().split()[0].lower()).sum()
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


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
