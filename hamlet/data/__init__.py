"""Data sets for retrieval under one roof: ``load_dataset(name)`` gives splits, labels, captions and protocols."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hamlet import paths
from hamlet.data.dataset import DataError, Protocol, RetrievalDataset, Split, assemble, content_hash

__all__ = [
    "DataError",
    "Protocol",
    "RetrievalDataset",
    "Split",
    "decode_size",
    "list_datasets",
    "load_dataset",
]

SCENES_PROTOCOLS = {
    "default": Protocol("query", "gallery", "classes never seen in training, query against gallery"),
    "seen": Protocol(
        "seen_query", "seen_gallery", "new images of the training classes, query against gallery"
    ),
    "validation": Protocol("validation", None, "validation classes, leave-one-out"),
}


def decode_size(image_size: int) -> int:
    """Side of the decoded cache: 8/7 of the evaluation size (256 for 224), room for random crops."""
    return round(image_size * 8 / 7)


def _resized(native: np.ndarray, size: int) -> Iterator[np.ndarray]:
    from PIL import Image

    from hamlet.data import decode

    return (decode.fit(Image.fromarray(image), size) for image in native)


def _scenes(
    root: str | Path | None, size: int, limit: int | None, *, workers: int | None = None
) -> RetrievalDataset:
    """The embedded data set, rendered once at its native size; other sizes are resampled from that."""
    from hamlet.data import cache, scenes

    rows = scenes.plan(limit).sort_values("split", kind="stable").reset_index(drop=True)
    made_by = [
        *Path(scenes.__file__).parent.glob("scenes*.py"),
        *(paths.ROOT / "data" / "scenes").glob("*.yaml"),
    ]
    texts = [path.read_text(encoding="utf-8") for path in sorted(made_by)]
    parts = [np.__version__, *texts, rows.to_json(orient="records", lines=True)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    images, pixels = cache.cached(
        "scenes", key, len(rows), scenes.SIZE, lambda: scenes.render_all(rows, workers)
    )
    if size != scenes.SIZE:
        native, key = images, hashlib.sha256(f"{pixels} {cache.RECIPE}".encode()).hexdigest()
        images, _ = cache.cached("scenes", key, len(rows), size, lambda: _resized(native, size))
    digest = content_hash(rows, [f"{seed} {pixels}" for seed in rows.seed])
    return assemble(
        "scenes", rows, images, digest, scenes.class_names(), scenes.coarse_names(), SCENES_PROTOCOLS
    )


def _loaders() -> dict[str, Callable[..., RetrievalDataset]]:
    from hamlet.data import folder, grocery, public  # here, so that importing the package stays quick

    return {
        "scenes": _scenes,
        "grocery": grocery.load,
        "grocery_unseen": grocery.load_unseen,
        "folder": folder.load,
        "cifar10": public.cifar10,
        "flowers102": public.flowers102,
        "pets": public.pets,
    }


def list_datasets() -> list[str]:
    """Names that :func:`load_dataset` knows."""
    return list(_loaders())


def load_dataset(
    name: str, root: str | Path | None = None, *, size: int = 128, limit: int | None = None, **options: object
) -> RetrievalDataset:
    """Load a data set decoded to uint8 (N, size, size, 3), from its cache where there is one.

    name: one of ``list_datasets()``. root: folder to look in first (for "folder", the images themselves);
    then HAMLET_DATA, data/ and ../shared/data. size: pixels, 8..1024. limit: at most that many images per
    class and split, the first in order. options: grocery: verify, download, source; folder: split_by, seed,
    missing_captions; cifar10, flowers102, pets: download; scenes: workers. Raises DataError (a ValueError)
    with the file or value and the way out.
    """
    loaders = _loaders()
    if name not in loaders:
        raise DataError(f"unknown data set {name!r}; valid: {', '.join(loaders)}")
    for label, value, low, high in (("size", size, 8, 1024), ("limit", limit, 1, 1 << 31)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= value <= high
        if not whole and not (label == "limit" and value is None):
            raise DataError(f"{name}: {label} must be a whole number in {low}..{high}, got {value!r}")
    valid = [p.name for p in inspect.signature(loaders[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(valid)):
        raise DataError(f"{name}: unknown option {unknown[0]!r}; valid: {', '.join(valid) or 'none'}")
    if root is not None and not Path(root).expanduser().is_dir():
        raise DataError(f"{name}: root {str(root)!r} is not a folder")
    return loaders[name](root, int(size), limit if limit is None else int(limit), **options)
