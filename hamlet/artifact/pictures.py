"""Figures made of images: queries with their nearest images, and a contact sheet of the classes they met.

As in hamlet.artifact.figures, each is drawn from one tidy frame; the images are the thumbnails that a run keeps of its
example queries and what they found, so that no data set is needed to draw them.
"""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from hamlet.artifact.figures import new_figure
from hamlet.errors import HamletError

RIGHT, WRONG = "#009E73", "#D55E00"  # Okabe and Ito, as in hamlet.artifact.figures
LETTERS = 18  # of a class name that fit over an image
THUMBNAILS = "thumbnails.webp"  # of the images in a run's neighbours.parquet, beside it
SIDE = 96  # pixels of a thumbnail, at most


def pack(images: np.ndarray, names: Sequence[str]) -> bytes:
    """One WebP sheet of uint8 (N,s,s,3) ``images``, at most SIDE pixels each, their ``names`` (paths) in its XMP."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
        raise HamletError(f"thumbnails are uint8 of shape (N,s,s,3), not {images.dtype} of shape {images.shape}")
    if not 0 < len(images) == len(names) == len(set(names)):
        raise HamletError(f"{len(images)} thumbnails need as many different names, not {len(set(names))}")
    if images.shape[1] > SIDE:
        images = np.stack([Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS) for image in images])
    count, side = images.shape[:2]
    across = int(np.ceil(np.sqrt(count)))
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


def neighbours_data(results: pd.DataFrame, run: str) -> pd.DataFrame:
    """Eight of the first seed's stored example queries of ``run``, evenly spread, with their nearest images, as
    neighbours.parquet has them. HamletError names the runs that there are."""
    rows = pd.read_parquet(_folder(results, run) / "neighbours.parquet")
    shown = rows["query_path"].unique()
    shown = shown[np.linspace(0, len(shown) - 1, min(8, len(shown))).round().astype(int)]
    return rows[rows["query_path"].isin(shown)].reset_index(drop=True)


def contact_data(results: pd.DataFrame, run: str, classes: int = 32) -> pd.DataFrame:
    """One image of each class that a run's example queries met, at most ``classes`` of them evenly spread: class,
    path."""
    rows = pd.read_parquet(_folder(results, run) / "neighbours.parquet")
    queries = rows[["query_class", "query_path"]].set_axis(["class", "path"], axis=1)
    every = pd.concat([queries, rows[["class", "path"]]]).drop_duplicates("class").sort_values("class")
    chosen = np.linspace(0, len(every) - 1, min(classes, len(every))).round().astype(int)
    return every.iloc[chosen].reset_index(drop=True)


def thumbnails(results: pd.DataFrame, run: str) -> dict[str, np.ndarray]:
    """The images that the first seed of ``run`` keeps, by path; empty where it was stored without any."""
    sheet = _folder(results, run) / THUMBNAILS
    return unpack(sheet.read_bytes()) if sheet.is_file() else {}


def _folder(results: pd.DataFrame, run: str) -> Path:
    found = results[results["run"] == run].sort_values("seed")
    if found.empty:
        raise HamletError(f"no run {run!r}; there are {', '.join(sorted(set(results['run'])))}")
    return found["folder"].iloc[0]


def _show(axis: plt.Axes, image: np.ndarray | None) -> None:
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, linewidth=0.5, color="0.3")
    if image is None:
        axis.set_facecolor("0.9")
        axis.set_box_aspect(1)
        axis.text(0.5, 0.5, "no picture\nstored", transform=axis.transAxes, ha="center", va="center", fontsize=7)
    else:
        axis.imshow(image, interpolation="antialiased")


def retrieval_gallery(data: pd.DataFrame, images: dict[str, np.ndarray], title: str) -> Figure:
    """Queries, two to a row, with their nearest images from `neighbours_data`: a solid green frame and a tick
    where the class is right, a dashed orange frame and a cross where it is wrong. Class names are never cut."""
    groups, ranks = list(data.groupby("query_path", sort=False)), int(data["rank"].max())
    rows = -(-len(groups) // 2)
    lines = [max(wrapped(name).count("\n") for name in {*hits["class"], *hits["query_class"]}) for _, hits in groups]
    size = (15, 1.4 * rows + 0.14 * sum(map(max, lines[::2], [*lines[1::2], 0][:rows])) + 0.8)
    told = [f"{hits['query_class'].iloc[0]} {hits['correct'].sum()} of {len(hits)}" for _, hits in groups]
    told = f"Photographs in rows; right among the nearest, per query: {', '.join(told)}."
    widths = ([1.0] * (ranks + 1) + [0.25]) * 2
    figure, axes = new_figure(rows, len(widths), size, title, told, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (path, hits) in enumerate(groups):
        cells = axes[index // 2, (ranks + 2) * (index % 2) :]
        _show(cells[0], images.get(path))
        cells[0].set_title(wrapped(hits["query_class"].iloc[0]), fontsize=7.5, fontweight="bold")
        cells[0].set_ylabel("query", fontsize=8, labelpad=2)
        for axis, hit in zip(cells[1:], hits.sort_values("rank").to_dict("records"), strict=False):
            _show(axis, images.get(hit["path"]))
            colour, line = (RIGHT, "-") if hit["correct"] else (WRONG, (0, (3, 2)))
            axis.spines[:].set(linewidth=3, color=colour, linestyle=line)
            mark = "✓" if hit["correct"] else "✗"
            axis.set_title(f"{mark} {wrapped(hit['class'])}", fontsize=7.5, color=colour)
    figure.suptitle(f"{title}\nqueries in bold; ✓ solid frame: same class, ✗ dashed frame: another")
    return figure


def contact_sheet(data: pd.DataFrame, images: dict[str, np.ndarray], title: str) -> Figure:
    """An image of each class from `contact_data`, eight in a row, its name below."""
    rows, told = -(-len(data) // 8), f"Photographs of {len(data)} classes: {', '.join(data['class'])}."
    figure, axes = new_figure(rows, 8, (12.8, 2.0 * rows + 0.5), title, told)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, data.to_dict("records"), strict=False):
        _show(axis, images.get(row["path"]))
        axis.set_xlabel(wrapped(row["class"]), fontsize=9, labelpad=3)
    return figure


def wrapped(name: str) -> str:
    """The whole name in lines of at most LETTERS, broken after hyphens, underscores and spaces; only a longer word is
    broken within."""
    lines = re.findall(rf"(?s).{{1,{LETTERS}}}(?:(?<=[-_ ])|$)|.{{1,{LETTERS}}}", name)
    return "\n".join(line.strip() for line in lines)
