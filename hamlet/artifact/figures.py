"""The figures, each drawn from one tidy frame that is stored beside it as CSV.

A function takes the frame and returns a matplotlib Figure; `save_figure` writes it as PDF and PNG with the
frame. Nothing is told by hue alone: backbones are named beside what is coloured and differ in lightness, controls
are hatched, kinds of index have a marker each. Colours: Okabe and Ito, "Color universal design", 2008.
"""

import io
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from hamlet.artifact import results as report

COLOURS = {"ResNet18": "#0072B2", "MobileNetV3": "#E69F00", "other": "#999999"}
BACKBONES = ["ResNet18", "MobileNetV3"]
EDGE = ("axes fraction", "data")  # values stand in a column at the right edge, clear of every marker
LIMIT, RESOLUTIONS = 2_000_000, (150, 110, 80, 60)  # bytes; pixels per inch, best first
AREA = 9  # square points of a marker per million parameters
MARKERS = {"HAMLET": "o", "SPARSE": "s", "MACE": "^", "SpCa": "D", "DSCF": "v", "GeM": "P", "MLP": "X"}
INDEXES = {  # colour and marker of each kind of hamlet.search
    "flat": ("#000000", "o"),
    "ivfpq": ("#0072B2", "s"),
    "hnsw": ("#E69F00", "^"),
    "sparse": ("#999999", "D"),
}
SIDES = [
    (-1, 1),
    (1, -1),
    (1, 0),
    (-1, 0),
    (-0.5, 1),
    (0, 1),
    (0, -1),
    (0.5, -1),
    (1, 1),
    (-1, -1),
]  # of a point
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps text legible on what it crosses
REPORTED = "value in the report (other data, other machine)"
STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=1.05),
    **{"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6, "pdf.fonttype": 42},
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "figure.dpi": 110},
}


def save_figure(figure: Figure, stem: Path, data: pd.DataFrame) -> list[Path]:
    """Write ``stem`` as .pdf, .png and .csv, each renamed into place, without dates or program names. The
    resolution is the highest of RESOLUTIONS that keeps the file below LIMIT bytes."""
    stem, written = Path(stem), []
    plain = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "png": {"Software": None}}
    for end, metadata in plain.items():
        for dpi in RESOLUTIONS:
            buffer = io.BytesIO()
            with plt.rc_context(STYLE):
                figure.savefig(buffer, format=end, dpi=dpi, bbox_inches="tight", metadata=metadata)
            if buffer.tell() < LIMIT:
                break
        written.append(report.write_atomically(stem.with_name(f"{stem.name}.{end}"), buffer.getvalue()))
    rows = data.to_csv(index=False).encode()
    return [*written, report.write_atomically(stem.with_name(f"{stem.name}.csv"), rows)]


def new_figure(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A styled figure that pyplot forgets at once, so that a notebook shows it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **options
        )
    plt.close(figure)
    return figure, axes


def _bars(
    axis: plt.Axes, rows: pd.DataFrame, value: str, low: str, high: str, reported: str, decimals: int
) -> np.ndarray:
    """Horizontal bars in table order, controls below a gap; whiskers, value, the report's as a diamond. Returns
    the bars' places."""
    places = np.arange(len(rows)) + 0.6 * (rows["group"] == "control").to_numpy()
    for place, (_, row) in zip(places, rows.iterrows(), strict=True):
        if pd.isna(row[value]):
            axis.text(0, place, " not run", va="center", style="italic", color="0.4")
            continue
        hatch = "////" if row["group"] == "control" else None
        axis.barh(
            place, row[value], 0.72, color=COLOURS[row["backbone"]], edgecolor="black", lw=0.6, hatch=hatch
        )
        if not pd.isna(row[low]):
            for colour, width in (
                ("white", 3.3),
                ("black", 1.3),
            ):  # a light edge, seen on hatching in grey too
                whisker = {"color": colour, "lw": width, "marker": "|", "ms": 5, "mew": width}
                axis.plot([row[low], row[high]], [place, place], **whisker)
        axis.annotate(f"{row[value]:.{decimals}f}", (1, place), xycoords=EDGE, ha="right", va="center")
        if not pd.isna(row[reported]):
            axis.plot(row[reported], place, "D", mfc="white", mec="black", ms=5, zorder=5)
    axis.set_yticks(places, rows["model"])
    axis.set_ylim(places[-1] + 0.6, -0.6)
    axis.set_xlim(0, 1.3 * np.nanmax(rows[[value, high, reported]].to_numpy(dtype=float), initial=1e-9))
    axis.tick_params(axis="y", length=0)
    return places


def _legend(figure: Figure, whisker: str) -> None:
    handles = [
        Patch(facecolor=COLOURS[name], edgecolor="black", label=name) for name in ("ResNet18", "MobileNetV3")
    ]
    handles.append(
        Patch(facecolor="white", edgecolor="black", hatch="////", label="control, not in the report")
    )
    handles.append(Line2D([], [], color="black", marker="|", label=whisker))
    handles.append(Line2D([], [], color="none", marker="D", mfc="white", mec="black", label=REPORTED))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)


def accuracy_bars(summary: pd.DataFrame, title: str = "") -> Figure:
    """A panel per metric from `report.accuracy_summary`. Whiskers: 95% t interval over seeds where all runs have
    three or more, else 95% over queries (the legend says which); dots, for runs of two or more seeds: the lowest
    and the highest."""
    measured = summary.dropna(subset="mean")
    over = "seed" if (measured["seeds"] > 2).all() else "query"
    rows = summary.assign(low=summary["mean"] - summary[f"{over}_half_width"])
    rows["high"] = summary["mean"] + summary[f"{over}_half_width"]
    figure, axes = new_figure(1, len(report.ACCURACY), (13, 5.4), sharey=True)
    for axis, metric in zip(axes[0], report.ACCURACY, strict=True):
        shown = rows[rows["metric"] == metric]
        places = _bars(axis, shown, "mean", "low", "high", "reported", 3)
        several = (shown["seeds"] > 1).to_numpy()
        for column in ("lowest_seed", "highest_seed") if several.any() else ():
            dots = {"mfc": "white", "mec": "black", "mew": 0.7, "ms": 3, "zorder": 4, "gid": "seeds"}
            axis.plot(shown.loc[several, column], places[several] + 0.22, "o", **dots)
        axis.set_xlabel(metric)
    whisker = f"95% interval over {'seeds' if over == 'seed' else 'queries'}"
    _legend(figure, whisker + ("; dots: lowest and highest seed" if (measured["seeds"] > 1).any() else ""))
    figure.suptitle(title or "Retrieval accuracy, measured: higher is better")
    return figure


def efficiency_bars(summary: pd.DataFrame, title: str = "") -> Figure:
    """Latency and peak memory with such quartiles as were measured, parameters and multiply-adds, from
    `report.efficiency_summary`."""
    rows = summary.assign(none=np.nan)
    panels = [(name, key, f"reported_{key}") for name, key in report.EFFICIENCY.items()]
    panels.append(("Multiply-adds (G)", "macs_g", "none"))
    figure, axes = new_figure(1, len(panels), (13, 5.4), sharey=True)
    for axis, (name, key, reported) in zip(axes[0], panels, strict=True):
        low, high = (column if column in rows else "none" for column in (f"{key}_q25", f"{key}_q75"))
        _bars(axis, rows, key, low, high, reported, 1 if key in ("latency_ms", "memory_mb") else 2)
        axis.set_xlabel(name)
    apart = rows.get("memory_mb_q25", rows["none"]).notna().any()
    _legend(figure, "quartiles over images" + (" (memory: over processes)" if apart else ""))
    figure.suptitle(title or "Cost of describing one image, measured: lower is better")
    return figure


def tradeoff_data(accuracy: pd.DataFrame, efficiency: pd.DataFrame) -> pd.DataFrame:
    """One row per source ("measured", "reported") and run: latency_ms, mAP, parameters_m, and pareto: no run of
    that source is at least as fast and as accurate and better in one. Variants are left to the tables."""
    identity, point = ["run", "model", "group", "backbone"], ["latency_ms", "mAP", "parameters_m"]
    joined = accuracy[accuracy["metric"] == "mAP"].merge(efficiency.drop(columns=identity[1:]), on="run")
    joined = joined[~joined["run"].str.contains("-")]
    columns = {
        "measured": ["latency_ms", "mean", "parameters_m"],
        "reported": ["reported_latency_ms", "reported", "reported_parameters_m"],
    }
    frames = []
    for source, names in columns.items():
        frame = joined[identity + names].set_axis(identity + point, axis=1).dropna().assign(source=source)
        time, quality = frame["latency_ms"].to_numpy(), frame["mAP"].to_numpy()
        as_good = (time <= time[:, None]) & (quality >= quality[:, None])
        better = (time < time[:, None]) | (quality > quality[:, None])
        frames.append(frame.assign(pareto=~(as_good & better).any(axis=1)))
    return pd.concat(frames, ignore_index=True)


def tradeoff(data: pd.DataFrame, title: str = "") -> Figure:
    """mAP against latency from `tradeoff_data`, measured and reported side by side on axes of their own."""
    figure, axes = new_figure(1, 2, (13, 5.8))
    for axis, source in zip(axes[0], ("measured", "reported"), strict=True):
        rows = data[data["source"] == source].sort_values("latency_ms")
        front = rows[rows["pareto"]]
        axis.step(front["latency_ms"], front["mAP"], where="post", color="0.45", ls="--", lw=1.2, zorder=1)
        for row in rows.itertuples():
            style = {"marker": MARKERS.get(row.model.split("_")[0], "*"), "edgecolor": COLOURS[row.backbone]}
            style["facecolor"] = COLOURS[row.backbone] if row.pareto else "white"
            axis.scatter(row.latency_ms, row.mAP, AREA * row.parameters_m, linewidth=1.6, zorder=3, **style)
        axis.margins(0.22, 0.14)
        axis.set(xlabel="Inference time per image (ms)", ylabel="mAP")
        axis.set_title("Measured" if source == "measured" else "Reported (other data, other machine)")
    handles = [Patch(facecolor=COLOURS[name], label=name) for name in BACKBONES]
    handles += [Line2D([], [], color="0.45", ls="--", label="Pareto front (its points are filled)")]
    for size in (5, 25):
        style = {"mfc": "0.8", "mec": "0.4", "ms": (AREA * size) ** 0.5}
        handles.append(Line2D([], [], color="none", marker="o", label=f"{size} M parameters", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title or "Accuracy against latency: up and to the left is better")
    for axis, source in zip(axes[0], ("measured", "reported"), strict=True):
        _label_points(figure, axis, data[data["source"] == source].sort_values("latency_ms"))
    return figure


def _label_points(figure: Figure, axis: plt.Axes, rows: pd.DataFrame) -> None:
    """Name every point where `_place` puts its name; a name that stands off gets a line to its point."""
    figure.draw_without_rendering()
    centres, inch = axis.transData.transform(rows[["latency_ms", "mAP"]].to_numpy()), figure.dpi / 72
    halves = [_half_width(*row) * inch for row in zip(rows["model"], rows["parameters_m"], strict=True)]
    points = np.hstack([centres - np.c_[halves], centres + np.c_[halves]])
    taken = np.vstack([points, _front_boxes(centres[rows["pareto"].to_numpy()])])
    for index, row in enumerate(rows.itertuples()):
        font = {"fontsize": 8.5, "fontweight": "bold" if row.model.startswith("HAMLET") else "normal"}
        step, box = _place(index, points, taken, _text_size(axis, row.model, font), axis.bbox.extents, inch)
        axis.annotate(
            row.model,
            (row.latency_ms, row.mAP),
            (box[:2] - centres[index]) / inch,
            textcoords="offset points",
            ha="left",
            va="bottom",
            path_effects=HALO,
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6} if step > 1 else None,
            **font,
        )
        taken = np.vstack([taken, box])


def _place(
    index: int, points: np.ndarray, taken: np.ndarray, size: np.ndarray, inside: np.ndarray, inch: float
) -> tuple[int, np.ndarray]:
    """Where a name of ``size`` (2,) stands beside box ``index`` of ``points`` (N,4): how many steps away, and its box
    (4,). It lies inside and meets nothing in ``taken`` (M,4), near its point and best nearer to it than to any other;
    where every place is taken, the first of SIDES. Boxes are left, bottom, right, top in pixels."""
    centre, half = (points[index, :2] + points[index, 2:]) / 2, (points[index, 2] - points[index, 0]) / 2
    places = []
    for step, side in itertools.product(range(6), np.array(SIDES)):
        low = centre + side * (half + np.array([3 + 4 * step, 3 + 8 * step]) * inch) + (side - 1) / 2 * size
        box = np.hstack([low, low + size])
        free = (
            (box[:2] > inside[:2]).all() and (box[2:] < inside[2:]).all() and (_apart(box, taken) > 0).all()
        )
        away = _apart(box, points)
        stray = away[index] > np.delete(away, index).min(initial=np.inf)
        places.append((step + 1.5 * stray if free else 100, step, box))
    return min(places, key=lambda place: place[0])[1:]


def _front_boxes(front: np.ndarray) -> np.ndarray:
    """Boxes around the level and upright pieces of the steps through points (N,2), from left to right."""
    if len(front) < 2:
        return np.empty((0, 4))
    corners = np.c_[front[1:, 0], front[:-1, 1]]
    starts, ends = np.vstack([front[:-1], corners]), np.vstack([corners, front[1:]])
    return np.hstack([np.minimum(starts, ends) - 2, np.maximum(starts, ends) + 2])


def _half_width(model: str, parameters_m: float) -> float:
    """Points from the centre of a model's marker to its side."""
    marker = MarkerStyle(MARKERS.get(model.split("_")[0], "*"))
    extents = marker.get_path().transformed(marker.get_transform()).get_extents()
    return (AREA * parameters_m) ** 0.5 * max(extents.width, extents.height) / 2 + 0.8  # and half of its edge


def _text_size(axis: plt.Axes, text: str, font: dict) -> np.ndarray:
    """(width, height) of a text in pixels."""
    drawn = axis.text(0, 0, text, **font)
    box = drawn.get_window_extent()
    drawn.remove()
    return np.array([box.width, box.height])


def _apart(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances (N,) of a box (4,), left, bottom, right, top, to others (N,4); 0 where they meet."""
    gaps = np.maximum(others[:, :2] - box[2:], box[:2] - others[:, 2:])
    return np.hypot(*np.maximum(gaps, 0).T)


def backbone_data(accuracy: pd.DataFrame, efficiency: pd.DataFrame) -> pd.DataFrame:
    """A method with both backbones, source and quantity a row: its values on ResNet18 and MobileNetV3."""
    columns = ["run", *efficiency.columns.difference(accuracy.columns)]
    joined = accuracy[accuracy["metric"] == "mAP"].merge(efficiency[columns], on="run")
    joined["method"] = joined["model"].str.replace("_ResNet18|_MobileNetV3", "", regex=True)
    names = {"mAP": ("mean", "reported")}
    names |= {quantity: (key, f"reported_{key}") for quantity, key in report.EFFICIENCY.items()}
    rows = []
    for (quantity, pair), index in itertools.product(names.items(), (0, 1)):
        wide = joined.pivot(index="method", columns="backbone", values=pair[index]).reindex(columns=BACKBONES)
        wide = wide.reindex(joined["method"].unique()).dropna().reset_index()
        rows.append(wide.assign(source=("measured", "reported")[index], quantity=quantity))
    return pd.concat(rows, ignore_index=True)[["method", "source", "quantity", *BACKBONES]].rename_axis(
        columns=None
    )


def backbones(data: pd.DataFrame, title: str = "") -> Figure:
    """What changing ResNet18 for MobileNetV3 does to each method, from `backbone_data`: a line per method,
    labelled with the relative change; the report's own pairs dotted below."""
    quantities = list(dict.fromkeys(data["quantity"]))
    rows = list(dict.fromkeys(zip(data["source"], data["method"], strict=True)))
    rows.sort(key=lambda row: row[0])
    places = {row: index + 0.6 * (row[0] == "reported") for index, row in enumerate(rows)}
    figure, axes = new_figure(1, len(quantities), (13, 0.55 * len(rows) + 2), sharey=True)
    for axis, quantity in zip(axes[0], quantities, strict=True):
        shown = data[data["quantity"] == quantity]
        for row in shown.itertuples():
            place, ends = places[row.source, row.method], (row.ResNet18, row.MobileNetV3)
            axis.plot(
                ends, [place] * 2, "-" if row.source == "measured" else ":", color="0.4", lw=1.6, zorder=1
            )
            for end, name, marker in zip(ends, BACKBONES, "os", strict=True):
                axis.scatter(
                    end, place, 55, COLOURS[name], marker=marker, edgecolor="black", lw=0.7, zorder=2
                )
            change, middle = f"{row.MobileNetV3 / row.ResNet18 - 1:+.0%}", (sum(ends) / 2, place)
            axis.annotate(change, middle, (0, 6), textcoords="offset points", ha="center")
        axis.set_xlim(0, 1.12 * shown[BACKBONES].to_numpy().max())
        axis.set_xlabel(quantity)
    axes[0, 0].set_yticks(list(places.values()), [f"{method}\n({source})" for source, method in places])
    axes[0, 0].set_ylim(max(places.values()) + 0.6, -0.8)
    handles = [
        Line2D([], [], color="none", marker=marker, mfc=COLOURS[name], mec="black", label=name)
        for name, marker in zip(BACKBONES, "os", strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title or "From ResNet18 to MobileNetV3, per method: relative change above each line")
    return figure


def curves_data(results: pd.DataFrame) -> pd.DataFrame:
    """Every run's curves.csv averaged per epoch: run, model, seed, epoch, metric_loss, validation_mAP."""
    frames = []
    for row in results.itertuples():
        curves = pd.read_csv(row.folder / "curves.csv").groupby("epoch", as_index=False)
        means = curves[["metric_loss", "validation_mAP"]].mean()
        frames.append(means.assign(run=row.run, model=row.label, seed=row.seed))
    order = list(report.labels(results["run"]))
    together = pd.concat(frames, ignore_index=True)
    together = together.sort_values("run", key=lambda runs: runs.map(order.index), kind="stable")
    return together[["run", "model", "seed", "epoch", "metric_loss", "validation_mAP"]].reset_index(drop=True)


def learning_curves(data: pd.DataFrame, title: str = "") -> Figure:
    """A column per configuration from `curves_data`: training loss above, validation mAP below; a line per seed
    in colour, all other configurations behind it in grey. Up to seven columns, as leave the fewest places empty."""
    models = list(dict.fromkeys(data["model"]))
    count = len(models)
    across = count if count < 8 else min(range(4, 8), key=lambda columns: (-count % columns, -columns))
    blocks = -(-count // across)
    if count == 1:  # one run fills the width: loss left, validation right
        figure, axes = new_figure(1, 2, (10, 3.2))
        axes = axes.T
    else:
        figure, axes = new_figure(2 * blocks, across, (2.2 * across + 1, 3.5 * blocks + 0.6), sharex=True)
    for axis in axes.flat:
        axis.set_visible(False)
    names = {"metric_loss": "training loss", "validation_mAP": "validation mAP"}
    for (index, model), (line, column) in itertools.product(enumerate(models), enumerate(names)):
        axis = axes[2 * (index // across) + line, index % across]
        axis.set_visible(True)
        for (other, seed), rows in data.groupby(["model", "seed"], sort=False):
            axis.plot(rows["epoch"], rows[column], **_curve(model if other == model else None, seed))
        if data.loc[data["model"] == model, column].isna().all():
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="0.4")
        if line == 0:
            axis.set_title("" if across == 1 else model.replace("_", "\n", 1), fontsize=10)
        lowest = across == 1 or (line == 1 and index + across >= count)
        axis.set_xlabel("epoch" if lowest else "")
        axis.set_ylabel("" if index % across else names[column])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelleft=index % across == 0, labelbottom=line == 1 or across == 1)
    if count > 1:
        _curves_legend(figure, models, sorted(set(data["seed"])))
    figure.suptitle(title or ("Learning curves" + (f" of {models[0]}" if count == 1 else "")))
    return figure


def _curve(model: str | None, seed: int) -> dict:
    """The look of a line of ``model``, or of another configuration's in its panel."""
    if model is None:
        return {"color": "0.85", "lw": 0.8, "zorder": 1}
    marker = "os^Dv"[int(seed) % 5]
    return {"color": COLOURS[_backbone(model)], "lw": 1.5, "marker": marker, "ms": 3, "zorder": 2}


def _curves_legend(figure: Figure, models: list[str], seeds: list[int]) -> None:
    shown = [name for name in COLOURS if name in {_backbone(model) for model in models}]
    handles = [Line2D([], [], color=COLOURS[name], lw=1.5, label=name) for name in shown]
    handles.append(Line2D([], [], color="0.75", lw=0.8, label="the other configurations"))
    for seed in seeds if len(seeds) > 1 else []:
        style = _curve("", seed) | {"color": "black", "lw": 0}
        handles.append(Line2D([], [], label=f"seed {seed}", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _backbone(model: str) -> str:
    return next((name for name in BACKBONES if name.lower() in model.lower()), "other")


def search_tradeoff(data: pd.DataFrame) -> Figure:
    """Recall against speed of every kind of index, a panel per size, from benchmarks/search.py's table; beside each
    point its setting, in the legend the bytes a vector takes."""
    sizes = sorted(data["size"].unique())
    figure, axes = new_figure(1, len(sizes), (4.6 * len(sizes) + 0.6, 4.2), sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        for kind, rows in data[data["size"] == size].groupby("kind", sort=False):
            colour, marker = INDEXES[kind]
            label = f"{kind}, {rows['bytes_per_image'].iloc[0]:,.0f} bytes a vector"
            x, y = rows["queries_per_second"], rows["recall@10"]
            axis.plot(x, y, "-", color=colour, marker=marker, mec="black", mew=0.6, lw=1.2, label=label)
            for _, row in rows.dropna(subset="value").iterrows():
                text = {"textcoords": "offset points", "fontsize": 8, "path_effects": HALO}
                place = (row["queries_per_second"], row["recall@10"])
                offset, ha, va = ((3, 3), "left", "bottom") if kind == "hnsw" else ((-4, -4), "right", "top")
                axis.annotate(f"{row['value']:.0f}", place, offset, ha=ha, va=va, **text)
        axis.set(xscale="log", title=f"{size:,} vectors", xlabel="queries per second")
        axis.set(ylim=(0, 1.12), yticks=np.linspace(0, 1, 6))
        axis.legend(loc="lower left", fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("recall@10 against the exact search")
    figure.suptitle(
        f"Search in {search_conditions(data)}: right and up is better\n"
        "numbers: cells visited (ivfpq), candidates kept (hnsw)"
    )
    return figure


def search_conditions(data: pd.DataFrame) -> str:
    """What benchmarks/search.py measured on, from its table: "synthetic 128-d vectors, CPU, one thread"."""
    dimensions = " and ".join(f"{value}-d" for value in sorted(set(data["dimensions"])))
    threads = " or ".join("one" if value == 1 else str(value) for value in sorted(set(data["threads"])))
    return f"synthetic {dimensions} vectors, CPU, {threads} thread{'' if threads == 'one' else 's'}"
