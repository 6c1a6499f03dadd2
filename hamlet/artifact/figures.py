"""The figures, each drawn from one tidy frame that is stored beside it as CSV.

A function takes the frame and returns a matplotlib Figure whose label (`Figure.get_label`) is its alternative text;
`save_figure` writes it, `shown` puts it into a notebook. Nothing is told by hue alone: backbones are named beside what
is coloured and differ in lightness, controls are hatched, methods and kinds of index have a marker each. Colours: Okabe
and Ito, "Color universal design", 2008.
"""

import io
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from adjustText import adjust_text
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from hamlet.artifact import findings
from hamlet.artifact.paper import REPORTED_BACKBONES, backbone_of, expected_rows
from hamlet.artifact.results import ACCURACY
from hamlet.artifact.tables import COSTS, EFFICIENCY, fixed, rounded
from hamlet.paths import write_bytes

COLOURS = {"ResNet18": "#0072B2", "MobileNetV3": "#E69F00", "EfficientNetLite0": "#009E73", "other": "#999999"}
EDGE = ("axes fraction", "data")  # values stand in a column at the right edge, clear of every marker
LIMIT, RESOLUTIONS = 2_000_000, (150, 110, 80, 60)  # bytes; pixels per inch, best first
AREA = 9  # square points of a marker per million parameters
MARKERS = {"HAMLET": "o", "SPARSE": "s", "MACE": "^", "SpCa": "D", "DSCF": "v", "GeM": "P", "MLP": "X"}
# colour and marker of each kind of hamlet.search
INDEXES = {"flat": ("#000000", "o"), "ivfpq": ("#0072B2", "s"), "hnsw": ("#E69F00", "^"), "sparse": ("#999999", "D")}
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps text legible on what it crosses
REPORTED = "value in the report (other data, other machine)"
STYLE = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=1.05),
    **{"axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6, "pdf.fonttype": 42},
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "figure.dpi": 110},
}


def save_figure(figure: Figure, stem: Path, data: pd.DataFrame) -> list[Path]:
    """Write ``stem`` as .pdf, .png and .csv (floats at 6 significant digits), without dates or program names; both
    pictures carry the alternative text. The resolution is the highest of RESOLUTIONS that keeps a file below LIMIT."""
    written = []
    plain = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None, "Subject": figure.get_label()}}
    plain["png"] = {"Software": None, "Description": figure.get_label()}
    for end, metadata in plain.items():
        for dpi in RESOLUTIONS:
            content = _rendered(figure, format=end, dpi=dpi, bbox_inches="tight", metadata=metadata)
            if len(content) < LIMIT:
                break
        written.append(write_bytes(Path(f"{stem}.{end}"), content))
    return [*written, write_bytes(Path(f"{stem}.csv"), rounded(data, 6).to_csv(index=False).encode())]


def shown(figure: Figure) -> Image:
    """The figure for a notebook: a picture of at most 1,040 pixels across, with its alternative text."""
    dpi = min(100, 1040 / figure.get_figwidth())
    picture = _rendered(figure, format="jpeg", dpi=dpi, pil_kwargs={"quality": 88})
    return Image(picture, format="jpeg", alt=figure.get_label())


def _rendered(figure: Figure, **options) -> bytes:
    for text in figure.findobj(Text):  # no text is a formula: a class may be called cost_$5_$6
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def new_figure(rows: int, columns: int, size: tuple, title: str, told: str, **options) -> tuple[Figure, np.ndarray]:
    """A styled figure below its title, which begins its alternative text; ``told`` is the rest. pyplot forgets it at
    once, so that a notebook shows it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    plt.close(figure)
    figure.set_label(f"{title}. {told}")
    figure.suptitle(title, parse_math=False)
    return figure, axes


def _bars(axis: plt.Axes, rows: pd.DataFrame, value: str, low: str, high: str, reported: str, decimals: int) -> None:
    """Horizontal bars in table order, controls below a gap; whiskers, value, the report's as a diamond, and dots for
    the lowest and the highest seed where there are several."""
    places = np.arange(len(rows)) + 0.6 * (rows["group"] == "control").to_numpy()
    for place, (_, row) in zip(places, rows.iterrows(), strict=True):
        if pd.isna(row[value]):
            axis.text(0, place, " not run", va="center", style="italic", color="0.4")
            continue
        hatch = "////" if row["group"] == "control" else None
        axis.barh(place, row[value], 0.72, color=COLOURS[row["backbone"]], edgecolor="black", lw=0.6, hatch=hatch)
        if not pd.isna(row.get(low)):
            # a light edge, seen on hatching in grey too
            for colour, width in (("white", 3.3), ("black", 1.3)):
                whisker = {"color": colour, "lw": width, "marker": "|", "ms": 5, "mew": width}
                axis.plot([row[low], row[high]], [place, place], **whisker)
        if row.get("seeds", 0) > 1:
            dots = {"mfc": "white", "mec": "black", "mew": 0.7, "ms": 3, "zorder": 4, "gid": "seeds"}
            axis.plot([row["lowest_seed"], row["highest_seed"]], [place + 0.22] * 2, "o", **dots)
        axis.annotate(f"{row[value]:.{decimals}f}", (1, place), xycoords=EDGE, ha="right", va="center")
        if not pd.isna(row.get(reported)):
            axis.plot(row[reported], place, "D", mfc="white", mec="black", ms=5, zorder=5)
    axis.set_yticks(places, rows["model"])
    axis.set_ylim(places[-1] + 0.6, -0.6)
    ends = rows.reindex(columns=[value, high, reported]).to_numpy(dtype=float)
    axis.set_xlim(0, 1.3 * np.nanmax(ends, initial=1e-9))
    axis.tick_params(axis="y", length=0)


def _legend(figure: Figure, rows: pd.DataFrame, whisker: str) -> None:
    names = [name for name in COLOURS if name in set(rows["backbone"])]
    handles = [Patch(facecolor=COLOURS[name], edgecolor="black", label=name) for name in names]
    handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="control, not in the report"))
    handles.append(Line2D([], [], color="black", marker="|", label=whisker))
    if rows.filter(like="reported").notna().any(axis=None):
        handles.append(Line2D([], [], color="none", marker="D", mfc="white", mec="black", label=REPORTED))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def accuracy_bars(summary: pd.DataFrame, title: str) -> Figure:
    """A panel per metric from `tables.accuracy_summary`. Whiskers: 95% t interval over seeds where all runs have
    three or more, else 95% over queries (the legend says which); dots: the lowest and the highest seed."""
    measured = summary.dropna(subset="mean")
    over = "seed" if (measured["seeds"] > 2).all() else "query"
    rows = summary.assign(low=summary["mean"] - summary[f"{over}_half_width"])
    rows["high"] = summary["mean"] + summary[f"{over}_half_width"]
    best = measured[measured["metric"] == "mAP"].sort_values("mean", ascending=False).head(2)
    told = " and ".join(f"{row.model} ({row.mean:.3f})" for row in best.itertuples(index=False))
    told = f"Bars of mAP, P@1, P@5 and P@10 for {measured['run'].nunique()} rows; highest mAP: {told}."
    figure, axes = new_figure(1, len(ACCURACY), (13, 5.4), title, told, sharey=True)
    for axis, metric in zip(axes[0], ACCURACY, strict=True):
        _bars(axis, rows[rows["metric"] == metric], "mean", "low", "high", "reported", 3)
        axis.set_xlabel(metric)
    dots = "; dots: lowest and highest seed" if (measured["seeds"] > 1).any() else ""
    _legend(figure, rows, f"95% interval over {'seeds' if over == 'seed' else 'queries'}{dots}")
    return figure


def efficiency_bars(summary: pd.DataFrame, title: str) -> Figure:
    """Latency, memory, parameters and multiply-adds with such quartiles as were measured, from
    `tables.efficiency_summary`."""
    times = summary.dropna(subset="latency_ms").sort_values("latency_ms")
    ends = [f"{row.model} ({row.latency_ms:.1f} ms)" for row in times.iloc[[0, -1]].itertuples()] if len(times) else []
    told = f"Bars for {len(times)} rows, fastest and slowest: {', '.join(ends)}."
    figure, axes = new_figure(1, 4, (13, 5.4), title, told, sharey=True)
    for axis, (name, key) in zip(axes[0], COSTS.items(), strict=False):
        decimals = 1 if key in ("latency_ms", "memory_mb") else 2
        _bars(axis, summary, key, f"{key}_q25", f"{key}_q75", f"reported_{key}", decimals)
        axis.set_xlabel(name)
    apart = summary.filter(["memory_mb_q25"]).notna().any(axis=None)
    _legend(figure, summary, "quartiles over images" + (" (memory: over processes)" if apart else ""))
    return figure


def tradeoff_data(accuracy: pd.DataFrame, efficiency: pd.DataFrame) -> pd.DataFrame:
    """One row per source ("measured", "reported") and run, controls included: latency_ms and mAP with the ends of
    their intervals (quartiles over images, 95% over queries; equal where none is known), parameters_m, and pareto: no
    row of that source is at least as fast and as accurate and better in one."""
    identity = ["run", "model", "group", "backbone"]
    joined = accuracy[accuracy["metric"] == "mAP"].merge(efficiency)
    half, told = joined["query_half_width"], ("reported_latency_ms", "reported")
    joined = joined.assign(mAP_low=joined["mean"] - half, mAP_high=joined["mean"] + half)
    names = ["latency_ms", "mAP", "parameters_m", "latency_low", "latency_high", "mAP_low", "mAP_high"]
    columns = {
        "measured": ["latency_ms", "mean", "parameters_m", "latency_ms_q25", "latency_ms_q75", "mAP_low", "mAP_high"],
        "reported": [*told, "reported_parameters_m", *(told[0], told[0], told[1], told[1])],
    }
    frames = []
    for source, taken in columns.items():
        frame = joined[identity + taken].set_axis(identity + names, axis=1)
        frame = frame.dropna(subset=names[:3]).assign(source=source)
        time, quality = frame["latency_ms"].to_numpy(), frame["mAP"].to_numpy()
        as_good = (time <= time[:, None]) & (quality >= quality[:, None])
        frames.append(frame.assign(pareto=~(as_good & ~as_good.T).any(axis=1)))
    return rounded(pd.concat(frames, ignore_index=True))


def tradeoff(data: pd.DataFrame, title: str) -> Figure:
    """mAP against latency from `tradeoff_data`, measured and reported side by side on axes of their own."""
    sources = data["source"].unique()
    front = data[(data["source"] == "measured") & data["pareto"]].sort_values("latency_ms")["model"]
    told = "Scatter of mAP against inference time; measured Pareto front from fast to accurate: "
    figure, axes = new_figure(1, len(sources), (13, 6.4), title, f"{told}{', '.join(front)}.")
    for axis, source in zip(axes[0], sources, strict=True):
        rows = data[data["source"] == source].sort_values("latency_ms")
        line = rows[rows["pareto"]]
        axis.step(line["latency_ms"], line["mAP"], where="post", color="0.45", ls="--", lw=1.2, zorder=1)
        for row in rows.itertuples():
            style = {"marker": MARKERS.get(row.model.split("_")[0], "*"), "edgecolor": COLOURS[row.backbone]}
            style["facecolor"] = COLOURS[row.backbone] if row.pareto else "white"
            axis.scatter(row.latency_ms, row.mAP, AREA * row.parameters_m, linewidth=1.6, zorder=3, **style)
            bar = {"color": COLOURS[row.backbone], "lw": 0.8, "zorder": 2}
            axis.plot([row.latency_low, row.latency_high], [row.mAP] * 2, **bar)
            axis.plot([row.latency_ms] * 2, [row.mAP_low, row.mAP_high], **bar)
        axis.margins(0.2, 0.16)
        axis.set(xlabel="Inference time per image (ms)", ylabel="mAP")
        axis.set_title("Measured" if source == "measured" else "Reported (other data, other machine)")
    handles = [Patch(facecolor=COLOURS[name], label=name) for name in COLOURS if name in set(data["backbone"])]
    shapes = [name for name in MARKERS if data["model"].str.startswith(name).any()]
    grey = {"color": "none", "mfc": "white", "mec": "0.3"}
    handles += [Line2D([], [], **grey, marker=MARKERS[name], ms=7, label=name) for name in shapes]
    handles.append(Line2D([], [], color="0.45", ls="--", label="Pareto front (its points are filled)"))
    dot = {"color": "none", "marker": "o", "mfc": "0.8", "mec": "0.4"}
    handles += [Line2D([], [], **dot, ms=(AREA * size) ** 0.5, label=f"{size} M parameters") for size in (5, 25)]
    handles.append(Line2D([], [], color="0.3", lw=0.8, label="95% over queries; quartiles of the time"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.draw_without_rendering()
    for axis, source in zip(axes[0], sources, strict=True):
        _name_points(axis, data[data["source"] == source])
    return figure


def _name_points(axis: plt.Axes, rows: pd.DataFrame) -> None:
    """Name every point; adjustText moves the names apart and off the markers, in whole pixels so that a last bit moves
    nothing."""
    texts, points = [], rows[["latency_ms", "mAP"]].to_numpy()
    for (x, y), model in zip(points, rows["model"], strict=True):
        weight = "bold" if model.startswith("HAMLET") else "normal"
        at = {"fontsize": 8, "fontweight": weight, "path_effects": HALO, "zorder": 5, "parse_math": False}
        texts.append(axis.text(x, y, model.replace(" (", "\n("), in_layout=False, **at))
    radii = np.sqrt(AREA * rows["parameters_m"].to_numpy()) / 2 * axis.figure.dpi / 72
    corners = np.array([(0, 0), *itertools.product((-1, 0, 1), (-1, 0, 1))]) * radii[:, None, None]
    taken = axis.transData.inverted().transform((axis.transData.transform(points)[:, None] + corners).reshape(-1, 2))
    arrows = {"arrowstyle": "-", "color": "0.6", "lw": 0.6}
    options = {"target_x": points[:, 0], "target_y": points[:, 1], "expand": (1.2, 1.5), "iter_lim": 400}
    options |= {"force_text": (0.3, 0.5), "force_static": (0.2, 0.4)}
    adjust_text(texts, *taken.T, ax=axis, arrowprops=arrows, ensure_inside_axes=True, **options)
    for text in texts:
        pixels = np.round(axis.transData.transform(text.get_position()))
        text.set_position(axis.transData.inverted().transform(pixels))


def backbone_data(accuracy: pd.DataFrame, efficiency: pd.DataFrame) -> pd.DataFrame:
    """A method with both backbones, source and quantity a row: its values on ResNet18 and MobileNetV3."""
    joined = accuracy[accuracy["metric"] == "mAP"].merge(efficiency).rename(columns={"reported": "reported_mean"})
    joined["method"] = joined["model"].str.replace("_ResNet18|_MobileNetV3", "", regex=True)
    rows, sources = [], {"measured": "", "reported": "reported_"}
    for (quantity, key), source in itertools.product(({"mAP": "mean"} | EFFICIENCY).items(), sources):
        wide = joined.pivot(index="method", columns="backbone", values=sources[source] + key)
        wide = wide.reindex(joined["method"].unique(), columns=REPORTED_BACKBONES).dropna().reset_index()
        rows.append(wide.assign(source=source, quantity=quantity))
    order = ["method", "source", "quantity", *REPORTED_BACKBONES]
    return rounded(pd.concat(rows, ignore_index=True)[order].rename_axis(columns=None))


def backbones(data: pd.DataFrame, title: str) -> Figure:
    """What changing ResNet18 for MobileNetV3 does to each method, from `backbone_data`: a line per method,
    labelled with the relative change; the report's own pairs dotted below."""
    if data.empty:
        told = "No method was run on both of the report's backbones."
        figure, axes = new_figure(1, 1, (8, 1.4), title, told)
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0.5, 0.5, told, ha="center", va="center", transform=axes[0, 0].transAxes)
        return figure
    quantities, markers = data["quantity"].unique(), dict(zip(REPORTED_BACKBONES, "os", strict=True))
    rows = data.sort_values("source", kind="stable").groupby(["source", "method"], sort=False).groups
    places = {row: index + 0.6 * (row[0] == "reported") for index, row in enumerate(rows)}
    changes = data[(data["source"] == "measured") & (data["quantity"] == "mAP")]
    told = ", ".join(f"{row.method} {row.MobileNetV3 / row.ResNet18 - 1:+.0%}" for row in changes.itertuples())
    size = (13, 0.55 * len(places) + 2)
    figure, axes = new_figure(1, len(quantities), size, title, f"Measured change in mAP: {told}.", sharey=True)
    for axis, quantity in zip(axes[0], quantities, strict=True):
        part = data[data["quantity"] == quantity]
        for row in part.itertuples():
            place, ends = places[row.source, row.method], (row.ResNet18, row.MobileNetV3)
            line = "-" if row.source == "measured" else ":"
            axis.plot(ends, [place] * 2, line, color="0.4", lw=1.6, zorder=1)
            for end, (name, marker) in zip(ends, markers.items(), strict=True):
                axis.scatter(end, place, 55, COLOURS[name], marker=marker, edgecolor="black", lw=0.7, zorder=2)
            change, middle = f"{row.MobileNetV3 / row.ResNet18 - 1:+.0%}", (sum(ends) / 2, place)
            axis.annotate(change, middle, (0, 6), textcoords="offset points", ha="center")
        axis.set_xlim(0, 1.12 * part[REPORTED_BACKBONES].to_numpy().max(initial=1e-9))
        axis.set_xlabel(quantity)
    axes[0, 0].set_yticks(list(places.values()), [f"{method}\n({source})" for source, method in places])
    axes[0, 0].set_ylim(max(places.values()) + 0.6, -0.8)
    dot = {"color": "none", "mec": "black"}
    handles = [Line2D([], [], marker=markers[name], mfc=COLOURS[name], label=name, **dot) for name in markers]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def curves_data(results: pd.DataFrame) -> pd.DataFrame:
    """Every run's curves.csv averaged per epoch: run, model, seed, epoch, metric_loss, validation_mAP."""
    frames = []
    for row in results.itertuples():
        curves = pd.read_csv(row.folder / "curves.csv").groupby("epoch", as_index=False)
        means = curves[["metric_loss", "validation_mAP"]].mean()
        frames.append(means.assign(run=row.run, model=row.label, seed=row.seed))
    order = list(expected_rows(results["run"]))
    curves = pd.concat(frames).sort_values("run", key=lambda runs: runs.map(order.index), kind="stable")
    return rounded(curves[["run", "model", "seed", "epoch", "metric_loss", "validation_mAP"]])


def learning_curves(data: pd.DataFrame, title: str) -> Figure:
    """A column per configuration from `curves_data`: training loss above, validation mAP below; a line per seed
    in colour, all other configurations behind it in grey."""
    models = list(dict.fromkeys(data["model"]))
    across = min(5, len(models))
    blocks = -(-len(models) // across)
    last = data[data["epoch"] == data["epoch"].max()].groupby("model")["validation_mAP"].mean()
    told = f"{last.idxmax()} ends highest" if last.notna().any() else "validation was not recorded"
    told = f"Lines of training loss and validation mAP over epochs for {len(models)} configurations; {told}."
    size = (max(7.0, 2.3 * across + 1), 3.5 * blocks + 0.6)  # the legend needs seven inches
    figure, axes = new_figure(2 * blocks, across, size, title, told, sharex=True)
    names = {"metric_loss": "training loss", "validation_mAP": "validation mAP"}
    for (index, model), (line, column) in itertools.product(enumerate(models), enumerate(names)):
        axis = axes[2 * (index // across) + line, index % across]
        for (other, seed), rows in data.groupby(["model", "seed"], sort=False):
            own = {"color": COLOURS[backbone_of(model)], "lw": 1.5, "marker": "os^Dv"[seed % 5], "ms": 3, "zorder": 2}
            look = own if other == model else {"color": "0.85", "lw": 0.8, "zorder": 1}
            axis.plot(rows["epoch"], rows[column], **look)
        if data.loc[data["model"] == model, column].isna().all():
            axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="0.4")
        axis.set_title(model.replace("_", "\n", 1) if line == 0 else "", fontsize=10)
        axis.set_xlabel("epoch" if line == 1 and index + across >= len(models) else "")
        axis.set_ylabel("" if index % across else names[column])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelleft=index % across == 0, labelbottom=line == 1)
    for axis in axes.flat:
        axis.set_visible(axis.has_data())
    backbones = dict.fromkeys(backbone_of(model) for model in models)
    handles = [Line2D([], [], color=COLOURS[name], lw=1.5, label=name) for name in backbones]
    handles.append(Line2D([], [], color="0.75", lw=0.8, label="the other configurations"))
    for seed in sorted(set(data["seed"])):
        handles.append(Line2D([], [], color="black", lw=0, marker="os^Dv"[seed % 5], ms=3, label=f"seed {seed}"))
    ncols = min(len(handles), max(3, 3 * across))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    return figure


def ablation(data: pd.DataFrame, title: str) -> Figure:
    """What each part is worth, from `claims.comparisons` with ``ablation``: the difference in mAP of HAMLET in full
    minus each row, with its intervals over queries (thick) and classes (thin); right of zero the part helps."""
    rows = data.iloc[::-1].reset_index(drop=True)
    told = [f"{row.second} {row.difference:+.3f}" for row in data.dropna(subset="difference").itertuples()]
    told = f"HAMLET's mAP minus that of: {', '.join(told) or 'no run yet'}."
    figure, axes = new_figure(1, 1, (10, 0.42 * len(rows) + 1.6), title, told)
    axis = axes[0, 0]
    axis.axvline(0, color="0.6", lw=1)
    for place, row in enumerate(rows.itertuples()):
        if pd.isna(row.difference):
            axis.annotate("not run", (0.02, place), xycoords=EDGE, va="center", style="italic", color="0.4")
            continue
        axis.plot([row.low_classes, row.high_classes], [place] * 2, color="#0072B2", lw=1)
        axis.plot([row.low, row.high], [place] * 2, color="#0072B2", lw=3.5)
        filled = "#0072B2" if findings.shows(row, row.p_holm) else "white"
        axis.plot(row.difference, place, "o", mfc=filled, mec="black", ms=7)
        axis.annotate(f"{row.difference:+.4f}", (1.01, place), xycoords=EDGE, va="center")
    others = {first: f"{first}\n" for first in data["first"][1:] if first != data["first"].iloc[0]}
    names = [f"{others.get(row.first, '')}minus {row.second}" for row in rows.itertuples()]
    axis.set_yticks(range(len(rows)), names)
    axis.set(xlabel="difference in mAP (right of zero: HAMLET in full is better)", ylim=(-0.7, len(rows) - 0.3))
    wide = {"queries": 3.5, "classes": 1}
    handles = [Line2D([], [], color="#0072B2", lw=lw, label=f"95% over {of} (and seeds)") for of, lw in wide.items()]
    told = "Holm p < 0.05 and the interval clear of 0 (else open)"
    handles.append(Line2D([], [], color="none", marker="o", mfc="#0072B2", mec="black", label=told))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def captions_quality(data: pd.DataFrame, title: str) -> Figure:
    """A panel each for mAP, hierarchical AP and mAP of search by words, from `tables.text_table`: for each kind of text
    a dot, the mean, on a line from its lowest to its highest seed; the axes need not begin at zero."""
    panels = {"mAP": "mAP, photo to photos", "HAP": "hierarchical AP", "Words mAP": "mAP, sentence to photos"}
    values = data[[*panels]].apply(pd.to_numeric, errors="coerce")
    told = ", ".join(f"{what} {value:.3f}" for what, value in zip(data["Text"], values["mAP"], strict=True))
    told, size = f"mAP: {told or 'nothing measured yet'}.", (13, 0.4 * len(data) + 1.5)
    figure, axes = new_figure(1, len(panels), size, title, told, sharey=True)
    for axis, (name, label) in zip(axes[0], panels.items(), strict=True):
        axis.plot(values[name], range(len(data)), "o", color="#0072B2", mec="black", ms=8)
        for place, (value, ends) in enumerate(zip(values[name], data[f"{name} by seed"], strict=True)):
            if ends:
                axis.plot([float(end) for end in ends.split(" to ")], [place] * 2, color="#0072B2")
            axis.annotate(fixed([value], 3)[0] or "none", (1.03, place), xycoords=EDGE, va="center")
        axis.set_xlabel(label if len(data) else f"{label}: nothing measured yet")
        axis.margins(x=0.1)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.grid(axis="y", color="0.9")
    axes[0, 0].set_yticks(range(len(data)), data["Text"])
    axes[0, 0].set_ylim(len(data) - 0.4, -0.6)
    return figure


def search_tradeoff(data: pd.DataFrame) -> Figure:
    """Recall against speed of every kind of index, a panel per size, from benchmarks/search.py's table; beside each
    point its setting, in the legend the bytes a vector takes."""
    sizes = sorted(data["size"].unique())
    title = f"Search in {search_conditions(data)}: right and up is better"
    figure, axes = new_figure(1, len(sizes), (4.6 * len(sizes) + 0.6, 4.2), title, "A line per kind.", sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        for kind, rows in data[data["size"] == size].groupby("kind", sort=False):
            colour, marker = INDEXES[kind]
            label = f"{kind}, {rows['bytes_per_image'].iloc[0]:,.0f} bytes a vector"
            x, y = rows["queries_per_second"], rows["recall@10"]
            axis.plot(x, y, "-", color=colour, marker=marker, mec="black", mew=0.6, lw=1.2, label=label)
            offset, ha, va = ((3, 3), "left", "bottom") if kind == "hnsw" else ((-4, -4), "right", "top")
            text = {"textcoords": "offset points", "fontsize": 8, "path_effects": HALO, "ha": ha, "va": va}
            for *place, value in zip(x, y, fixed(rows["value"], 0), strict=True):
                axis.annotate(value, place, offset, **text)
        axis.set(xscale="log", title=f"{size:,} vectors", xlabel="queries per second", ylim=(0, 1.12))
        axis.set_yticks(np.linspace(0, 1, 6))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        axis.legend(loc="lower left", fontsize=8, frameon=False)
    axes[0, 0].set_ylabel("recall@10 against the exact search")
    figure.suptitle(f"{title}\nnumbers: cells visited (ivfpq), candidates kept (hnsw)")
    return figure


def search_conditions(data: pd.DataFrame) -> str:
    """What benchmarks/search.py measured on, from its table: "synthetic 128-d vectors, CPU, one thread"."""
    dimensions = " and ".join(f"{value}-d" for value in sorted(set(data["dimensions"])))
    threads = " or ".join("one" if value == 1 else str(value) for value in sorted(set(data["threads"])))
    return f"synthetic {dimensions} vectors, CPU, {threads} thread{'' if threads == 'one' else 's'}"
