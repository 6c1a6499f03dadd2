"""Data sets for retrieval under one roof: ``load_dataset(name)`` gives splits, labels, captions and protocols.

A data set is one file with a loader and one ``@register("name")`` line (see :class:`Listing` for what a loader
returns): in this folder, or in another package that names it in the entry point group ``hamlet.datasets``.
"""

import hashlib
import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np

from hamlet.data import cache, dataset, decode
from hamlet.data.dataset import LOADERS, Listing, Protocol, RetrievalDataset, Root, Split, register
from hamlet.errors import DataError

__all__ = [
    "DataError",
    "Listing",
    "Protocol",
    "RetrievalDataset",
    "Split",
    "decode_size",
    "identity_of",
    "list_datasets",
    "load_dataset",
    "register",
]


def decode_size(image_size: int) -> int:
    """Side of the decoded cache: 8/7 of the evaluation size (256 for 224), room for random crops."""
    return round(image_size * 8 / 7)


def _loaders() -> dict[str, Callable[..., Listing]]:
    """All loaders by name; modules and entry points are imported here, so that importing the package is quick."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="hamlet.datasets"):
        if entry.name not in LOADERS:
            try:
                loaded = entry.load()  # a loader, or a module that registers its loaders
                if callable(loaded):
                    register(entry.name)(loaded)
            except Exception as error:  # one broken package must not take the others away
                warnings.warn(f"data set {entry.name} ({entry.value}) cannot be used: {error!r}", stacklevel=3)
    return dict(sorted(LOADERS.items()))


def list_datasets() -> list[str]:
    """Names that :func:`load_dataset` knows, in alphabetical order."""
    return list(_loaders())


def _listed(name: str, root: Root, limit: int | None, options: dict) -> tuple[Listing, str, str]:
    """The checked and limited listing, the data set's name and its content hash."""
    loaders = _loaders()
    if name not in loaders:
        raise DataError(f"unknown data set {name!r}; valid: {', '.join(loaders)}")
    valid = [p.name for p in inspect.signature(loaders[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(valid)):
        raise DataError(f"{name}: unknown option {unknown[0]!r}; valid: {', '.join(valid) or 'none'}")
    if limit is not None:
        limit = _whole(f"{name}: limit", limit, 1, 1 << 31)
    if root is not None and not Path(root).expanduser().is_dir():
        raise DataError(f"{name}: root {str(root)!r} is not a folder; name the one that holds the images")
    listing = loaders[name](root, limit, **options)
    rows = listing.rows = dataset.limited(listing.rows, limit)
    if "digest" not in rows:
        rows["digest"] = cache.FileRecord(listing.root).hashes(rows.path.tolist())
    digest = dataset.content_hash(rows)
    own = re.sub(r"[^\w.-]+", "_", str(listing.root and listing.root.name)).strip("._") or "folder"
    return listing, listing.name or f"{own}-{digest[:8]}", digest


def _whole(label: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise DataError(f"{label} must be a whole number in {low}..{high}, got {value!r}")
    return int(value)


def identity_of(name: str, /, root: Root = None, *, limit: int | None = None, **options: object) -> tuple[str, str]:
    """``(RetrievalDataset.name, content_hash)`` without decoding, and without reading unchanged files again.

    `scenes` in full is not even rendered. Arguments and errors of :func:`load_dataset`.
    """
    return _listed(name, root, limit, options)[1:]


def load_dataset(
    name: str, /, root: Root = None, *, size: int = 128, limit: int | None = None, **options: object
) -> RetrievalDataset:
    """Load a data set decoded to uint8 (N, size, size, 3), from its cache where there is one.

    name: one of ``list_datasets()``. root: folder to look in first (for "folder", the images themselves);
    then HAMLET_DATA, data/ and ../shared/data. size: pixels, 8..1024. limit: at most that many images per
    class and split, the first in order. options: keywords of the data set's loader, such as verify and
    download (grocery) or split_by and name (folder). Raises DataError (a ValueError) with the file or value
    and the way out.
    """
    size = _whole(f"{name}: size", size, 8, 1024)
    listing, own_name, digest = _listed(name, root, limit, options)
    rows = listing.rows
    images = None if listing.pixels is None else listing.pixels(rows, size)
    if not isinstance(images, np.ndarray):
        key = hashlib.sha256("\n".join([decode.RECIPE, *rows.digest]).encode()).hexdigest()
        made = images or cache.decode_all(own_name, listing.root, rows.path.tolist(), size)
        images, _ = cache.cached(own_name, key, len(rows), size, made)
    return dataset.assemble(own_name, listing, images, digest)
