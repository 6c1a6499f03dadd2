"""Figures made of images: queries with their nearest images, and the data set's contact sheet.

As in hamlet.artifact.figures, each is drawn from one tidy frame; the images come from the data set's decoded cache.
"""

import io
import json
import re
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from hamlet.artifact.figures import new_figure
from hamlet.data import RetrievalDataset
from hamlet.errors import HamletError

RIGHT, WRONG = "#009E73", "#D55E00"  # Okabe and Ito, as in hamlet.artifact.figures
LETTERS = 18  # of a class name that fit over an image
THUMBNAILS = "thumbnails.webp"  # of the images in a run's neighbours.parquet, beside it
LONGEST = 16_383  # pixels of a side that WebP allows


def pack(images: np.ndarray, names: Sequence[str]) -> bytes:
    """One WebP sheet of uint8 (N,s,s,3) ``images``, row by row, with their ``names`` (paths) in its XMP field."""
    images = np.asarray(images)
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1] != images.shape[2]
        or images.shape[3] != 3
    ):
        raise HamletError(
            f"thumbnails are uint8 of shape (N,s,s,3), not {images.dtype} of shape {images.shape}"
        )
    if not 0 < len(images) == len(names) == len(set(names)):
        raise HamletError(f"{len(images)} thumbnails need as many different names, not {len(set(names))}")
    count, side = images.shape[:2]
    across = int(np.ceil(np.sqrt(count)))
    if across * side > LONGEST:
        raise HamletError(f"{count} thumbnails of {side} px are too many for one sheet: make them smaller")
    sheet = np.zeros((-(-count // across) * across, side, side, 3), dtype=np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(-1, across, side, side, 3).swapaxes(1, 2).reshape(-1, across * side, 3)
    buffer, notes = io.BytesIO(), json.dumps({"side": side, "names": list(names)})
    Image.fromarray(sheet).save(buffer, format="WEBP", quality=85, method=6, xmp=notes.encode())
    return buffer.getvalue()


def unpack(sheet: bytes) -> dict[str, np.ndarray]:
    """The images of `pack` by name, uint8 (s,s,3), with WebP's loss. HamletError: not such a sheet."""
    try:
        image = Image.open(io.BytesIO(sheet))
        notes = json.loads(image.info["xmp"])
        pixels, side, names = np.asarray(image.convert("RGB")), notes["side"], notes["names"]
    except (UnidentifiedImageError, OSError, KeyError, ValueError, TypeError) as fault:
        raise HamletError(f"not a sheet of thumbnails as pictures.pack writes them: {fault!r}") from fault
    across = pixels.shape[1] // side
    tiles = pixels.reshape(-1, side, across, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return dict(zip(names, tiles, strict=False))


def run_dataset(results: pd.DataFrame) -> RetrievalDataset:
    """The data set as the runs of `report.load_results` saw it, from the decoded cache that they used."""
    from hamlet.artifact.run import load_data  # goes with the figures' own rendering of data sets

    record = results["result"].iloc[0]
    return load_data(record["run"]["dataset"], record["parameters"])


def neighbours_data(results: pd.DataFrame, run: str, queries: int = 8) -> pd.DataFrame:
    """The first seed's stored example queries of ``run`` with their nearest images, as neighbours.parquet has
    them; ``queries`` of them, evenly spread. KeyError names the runs that there are."""
    found = results[results["run"] == run].sort_values("seed")
    if found.empty:
        raise KeyError(f"no run {run!r}; there are {', '.join(sorted(set(results['run'])))}")
    rows = pd.read_parquet(found["folder"].iloc[0] / "neighbours.parquet")
    shown = rows["query_path"].unique()
    shown = shown[np.linspace(0, len(shown) - 1, min(queries, len(shown))).round().astype(int)]
    return rows[rows["query_path"].isin(shown)].reset_index(drop=True)


def _image(dataset: RetrievalDataset, path: str) -> np.ndarray:
    """The cached uint8 (S,S,3) image of a path, whichever split holds it."""
    for split in dataset.splits.values():
        if path in split.paths:
            return split.images[split.paths.index(path)]
    raise KeyError(f"{dataset.name} holds no image {path!r}: the results come from another version of it")


def _show(axis: plt.Axes, image: np.ndarray) -> None:
    axis.imshow(image, interpolation="antialiased")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, linewidth=0.5, color="0.3")


def retrieval_gallery(data: pd.DataFrame, dataset: RetrievalDataset, title: str = "") -> Figure:
    """Queries, two to a row, with their nearest images from `neighbours_data`: a solid green frame and a tick
    where the class is right, a dashed orange frame and a cross where it is wrong. Class names are never cut."""
    groups, ranks = list(data.groupby("query_path", sort=False)), int(data["rank"].max())
    rows = -(-len(groups) // 2)
    widths = ([1.0] * (ranks + 1) + [0.25]) * 2
    breaks = [
        max(wrapped(name).count("\n") for name in {*hits["class"], *hits["query_class"]})
        for _, hits in groups
    ]
    size = (15, 1.3 * rows + 0.12 * sum(map(max, breaks[::2], [*breaks[1::2], 0][:rows])) + 0.6)
    figure, axes = new_figure(rows, len(widths), size, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (path, hits) in enumerate(groups):
        cells = axes[index // 2, (ranks + 2) * (index % 2) :]
        cells[0].set_axis_on()
        _show(cells[0], _image(dataset, path))
        cells[0].set_title(wrapped(hits["query_class"].iloc[0]), fontsize=6.8, fontweight="bold")
        cells[0].set_ylabel("query", fontsize=7, labelpad=2)
        for axis, hit in zip(cells[1:], hits.sort_values("rank").to_dict("records"), strict=False):
            axis.set_axis_on()
            _show(axis, _image(dataset, hit["path"]))
            colour, line = (RIGHT, "-") if hit["correct"] else (WRONG, (0, (3, 2)))
            for spine in axis.spines.values():
                spine.set(linewidth=3, color=colour, linestyle=line)
            mark = "✓" if hit["correct"] else "✗"
            axis.set_title(f"{mark} {wrapped(hit['class'])}", fontsize=7, color=colour)
    figure.suptitle(
        title or "Queries (bold) and their nearest images: ✓ solid frame same class, ✗ dashed frame another"
    )
    return figure


def wrapped(name: str, letters: int = LETTERS) -> str:
    """The whole name in lines of at most ``letters``, broken after hyphens, underscores and spaces; only a longer
    word is broken within."""
    lines = [""]
    for word in re.findall(r"[^-_ ]*[-_ ]|[^-_ ]+", name):
        for part in (word[i : i + letters] for i in range(0, len(word), letters)):
            if len(lines[-1]) + len(part) > letters:
                lines.append("")
            lines[-1] += part
    return "\n".join(line.strip() for line in lines)


def contact_data(dataset: RetrievalDataset, coarse: int = 12, images: int = 8) -> pd.DataFrame:
    """Up to ``images`` images of each of ``coarse`` coarse classes, spread over fine classes and splits; columns
    coarse, class, split, path, caption. Nothing is drawn at random."""
    frames = []
    for split in dataset.splits.values():
        frame = pd.DataFrame({"split": split.name, "path": split.paths, "caption": split.captions})
        frame["coarse"] = [dataset.coarse_names[i] for i in split.coarse_labels]
        frames.append(frame.assign(**{"class": [dataset.class_names[i] for i in split.labels]}))
    every = pd.concat(frames).drop_duplicates("path")
    names = sorted(every["coarse"].unique())
    names = [names[i] for i in np.linspace(0, len(names) - 1, min(coarse, len(names))).round().astype(int)]
    every["turn"] = every.groupby("class").cumcount()  # one of each fine class before a second of any
    chosen = every[every["coarse"].isin(names)].sort_values(["coarse", "turn", "class"], kind="stable")
    return (
        chosen.groupby("coarse")
        .head(images)[["coarse", "class", "split", "path", "caption"]]
        .reset_index(drop=True)
    )


def contact_sheet(data: pd.DataFrame, dataset: RetrievalDataset, title: str = "") -> Figure:
    """A row per coarse class from `contact_data`, the fine class under each image."""
    groups = list(data.groupby("coarse", sort=False))
    across = max(len(rows) for _, rows in groups)
    figure, axes = new_figure(len(groups), across, (1.15 * across + 0.8, 1.3 * len(groups) + 0.5))
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (coarse, rows) in zip(axes, groups, strict=True):
        for axis, row in zip(line, rows.to_dict("records"), strict=False):
            axis.set_axis_on()
            _show(axis, _image(dataset, row["path"]))
            axis.set_xlabel(wrapped(row["class"]), fontsize=6.5, labelpad=2)
        line[0].set_ylabel(wrapped(coarse), fontsize=9, fontweight="bold")
    figure.suptitle(title or f"{dataset.name}: coarse classes (rows) and some of their fine classes")
    return figure
