"""The figures, each drawn from one tidy frame that is stored beside it as CSV.

A function takes the frame and returns a matplotlib Figure; `save_figure` writes it as PDF and PNG with the
frame. Backbones are told apart by colour and marker, controls by hatching, values by direct labels, so that
every figure reads in grey. Colours: Okabe and Ito, "Color universal design", 2008.
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
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hamlet import report

COLOURS = {"ResNet18": "#0072B2", "MobileNetV3": "#E69F00", "other": "#999999"}
BACKBONES = ["ResNet18", "MobileNetV3"]
EDGE = ("axes fraction", "data")  # values stand in a column at the right edge, clear of every marker
LIMIT, RESOLUTIONS = 2_000_000, (150, 110, 80, 60)  # bytes; pixels per inch, best first
AREA = 9  # square points of a marker per million parameters
MARKERS = {"HAMLET": "o", "SPARSE": "s", "MACE": "^", "SpCa": "D", "DSCF": "v", "GeM": "P", "MLP": "X"}
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
            axis.plot([row[low], row[high]], [place, place], color="black", lw=1.3, marker="|", ms=5)
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
    three or more, else 95% over queries (the legend says which); dots: the lowest and the highest seed."""
    measured = summary.dropna(subset="mean")
    over = "seed" if (measured["seeds"] > 2).all() else "query"
    rows = summary.assign(low=summary["mean"] - summary[f"{over}_half_width"])
    rows["high"] = summary["mean"] + summary[f"{over}_half_width"]
    figure, axes = new_figure(1, len(report.ACCURACY), (13, 5.4), sharey=True)
    for axis, metric in zip(axes[0], report.ACCURACY, strict=True):
        shown = rows[rows["metric"] == metric]
        places = _bars(axis, shown, "mean", "low", "high", "reported", 3)
        for column in ("lowest_seed", "highest_seed"):
            axis.plot(shown[column], places + 0.22, "o", mfc="white", mec="black", mew=0.7, ms=3, zorder=4)
        axis.set_xlabel(metric)
    whisker = (
        "95% interval over " + ("seeds" if over == "seed" else "queries") + "; dots: lowest and highest seed"
    )
    _legend(figure, whisker)
    figure.suptitle(title or "Retrieval accuracy, measured: higher is better")
    return figure


def efficiency_bars(summary: pd.DataFrame, title: str = "") -> Figure:
    """Latency with quartiles, peak memory, parameters and multiply-adds from `report.efficiency_summary`."""
    rows = summary.assign(none=np.nan)
    panels = [(name, key, f"reported_{key}") for name, key in report.EFFICIENCY.items()]
    panels.append(("Multiply-adds (G)", "macs_g", "none"))
    figure, axes = new_figure(1, len(panels), (13, 5.4), sharey=True)
    for axis, (name, key, reported) in zip(axes[0], panels, strict=True):
        low, high = ("latency_ms_q25", "latency_ms_q75") if key == "latency_ms" else ("none", "none")
        _bars(axis, rows, key, low, high, reported, 1 if key in ("latency_ms", "memory_mb") else 2)
        axis.set_xlabel(name)
    _legend(figure, "quartiles over images")
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
    """Name every point at the first of some places around it inside that covers no other name or point."""
    figure.draw_without_rendering()
    centres = axis.transData.transform(rows[["latency_ms", "mAP"]].to_numpy())
    radii = np.sqrt(AREA * rows["parameters_m"].to_numpy()) / 2
    pixels = radii * figure.dpi / 72
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, pixels, strict=True)]
    sides = [
        (-1, 1),
        (1, -1),
        (1, 0),
        (-1, 0),
        (0, 1),
        (0, -1),
        (1, 1),
        (-1, -1),
    ]  # the front never runs up-left
    for row, radius in zip(rows.itertuples(), radii, strict=True):
        for step, (dx, dy) in itertools.product(range(5), sides):
            label = axis.annotate(
                row.model,
                (row.latency_ms, row.mAP),
                (dx * (radius + 3 + 4 * step), dy * (radius + 3 + 8 * step)),
                textcoords="offset points",
                fontsize=8.5,
                fontweight="bold" if row.model.startswith("HAMLET") else None,
                ha={1: "left", -1: "right", 0: "center"}[dx],
                va={1: "bottom", -1: "top", 0: "center"}[dy],
                arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6} if step > 1 else None,
            )
            box = label.get_window_extent()
            within = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            if within and all(box.x1 < a or box.x0 > c or box.y1 < b or box.y0 > d for a, b, c, d in taken):
                break
            if (step, dx, dy) != (4, -1, -1):
                label.remove()
        taken.append((box.x0, box.y0, box.x1, box.y1))


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
    in colour, all other configurations behind it in grey."""
    models, across = list(dict.fromkeys(data["model"])), min(7, data["model"].nunique())
    blocks = -(-len(models) // across)
    if len(models) == 1:  # one run fills the width: loss left, validation right
        figure, axes = new_figure(1, 2, (10, 3.2))
        axes = axes.T
    else:
        figure, axes = new_figure(2 * blocks, across, (14, 3.7 * blocks), sharex=True)
    for axis in axes.flat:
        axis.set_visible(False)
    names = {"metric_loss": "training loss", "validation_mAP": "validation mAP"}
    for (index, model), (line, column) in itertools.product(enumerate(models), enumerate(names)):
        axis = axes[2 * (index // across) + line, index % across]
        axis.set_visible(True)
        for (other, seed), rows in data.groupby(["model", "seed"], sort=False):
            own = {"color": COLOURS[_backbone(model)], "lw": 1.5, "marker": "os^Dv"[int(seed) % 5], "ms": 2.5}
            style = {**own, "zorder": 2} if other == model else {"color": "0.85", "lw": 0.8, "zorder": 1}
            axis.plot(rows["epoch"], rows[column], **style)
        if data.loc[data["model"] == model, column].isna().all():
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="0.4")
        if line == 0:
            axis.set_title("" if across == 1 else model.replace("_", "\n", 1), fontsize=9)
        axis.set_xlabel("epoch" if line or across == 1 else "")
        axis.set_ylabel("" if index % across else names[column])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelleft=index % across == 0, labelbottom=line == 1 or across == 1)
    several = "Learning curves: a line per seed in colour, the other configurations in grey"
    figure.suptitle(title or (f"Learning curves of {models[0]}" if across == 1 else several))
    return figure


def _backbone(model: str) -> str:
    return next((name for name in BACKBONES if name.lower() in model.lower()), "other")


def search_tradeoff(data: pd.DataFrame) -> Figure:
    """Recall against speed of every kind of index, a panel per size, from benchmarks/search.py's table; beside each
    point its setting, in the legend the bytes an image takes."""
    sizes = sorted(data["size"].unique())
    looks = {
        "flat": ("#000000", "o"),
        "ivfpq": ("#0072B2", "s"),
        "hnsw": ("#E69F00", "^"),
        "sparse": ("#999999", "D"),
    }
    figure, axes = new_figure(1, len(sizes), (4.6 * len(sizes) + 0.6, 4), sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        for kind, rows in data[data["size"] == size].groupby("kind", sort=False):
            colour, marker = looks[kind]
            label = f"{kind}, {rows['bytes_per_image'].iloc[0]:,.0f} bytes an image"
            x, y = rows["queries_per_second"], rows["recall@10"]
            axis.plot(x, y, "-", color=colour, marker=marker, mec="black", mew=0.6, lw=1.2, label=label)
            for row in rows.dropna(subset="value").itertuples():
                place = (row.queries_per_second, row[data.columns.get_loc("recall@10") + 1])
                axis.annotate(f"{row.value:.0f}", place, (5, -10), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", title=f"{size:,} images", xlabel="queries per second")
        axis.set_ylim(0, 1.05)
        axis.legend(loc="lower left", fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("recall@10 against the exact search")
    figure.suptitle("Right and up is better; numbers: cells visited (ivfpq), candidates kept (hnsw)")
    return figure
