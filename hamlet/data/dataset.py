"""What a retrieval data set is here: splits of uint8 images with labels and captions, and named protocols.

A protocol says which split asks (query) and which answers (gallery; ``None`` means leave-one-out within the
query split, as in Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016).
Every loader ends in :func:`assemble`, so all data sets hold to the same checks.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from hamlet.errors import DataError

Root = str | Path | None  # the folder that a person names; None: the usual places
ORDER = ("train", "validation", "query", "iconic")


@dataclass(frozen=True)
class Split:
    """One list of images.

    images: uint8 (N, size, size, 3), RGB, read-only memory map; labels, coarse_labels: int64 (N,), indices
    into ``class_names`` and ``coarse_names`` of the data set; captions, paths: N strings, paths relative to
    the data set's root; all_captions: N lists of at least one sentence, the first of which is the caption.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    coarse_labels: np.ndarray
    captions: list[str]
    paths: list[str]
    all_captions: list[list[str]] | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.all_captions is None:
            object.__setattr__(self, "all_captions", [[caption] for caption in self.captions])
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise DataError(f"split {self.name}: images must be uint8 (N, s, s, 3), got {shape}")
        columns = (self.images, self.labels, self.coarse_labels, self.captions, self.paths, self.all_captions)
        if len(lengths := {*map(len, columns)}) > 1 or lengths == {0}:
            raise DataError(f"split {self.name}: empty, or columns of unequal length {sorted(lengths)}")
        if self.labels.dtype != np.int64 or self.coarse_labels.dtype != np.int64:
            raise DataError(f"split {self.name}: labels must be int64")

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Protocol:
    """Split names of query and gallery; ``gallery=None`` is leave-one-out within the query split."""

    query: str
    gallery: str | None
    description: str


LEAVE_ONE_OUT = {
    "default": Protocol("query", None, "test images, leave-one-out"),
    "validation": Protocol("validation", None, "validation images, leave-one-out"),
}


@dataclass(frozen=True)
class RetrievalDataset:
    """Splits, protocols and where they came from; ``protocols["default"]`` is the headline.

    content_hash: hex SHA-256 of what was loaded (independent of ``size``); excluded: (path, reason) of every
    file or class that was found and not used.
    """

    name: str
    size: int
    content_hash: str
    class_names: list[str]
    coarse_names: list[str]
    splits: dict[str, Split]
    protocols: dict[str, Protocol]
    excluded: list[tuple[str, str]] = field(default_factory=list)

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def validation(self) -> Split:
        return self.splits["validation"]

    @property
    def query(self) -> Split:
        return self.splits[self.protocols["default"].query]

    @property
    def gallery(self) -> Split | None:
        """Gallery of the default protocol; None means leave-one-out on ``query``."""
        name = self.protocols["default"].gallery
        return None if name is None else self.splits[name]

    @property
    def has_classes(self) -> bool:
        """False where every training image is its own class (Flickr, COCO): nothing to learn classes from."""
        return len(np.unique(self.train.labels)) < len(self.train)


@dataclass
class Listing:
    """What a loader ``loader(root, limit, *, options...)`` returns: everything but decoded images.

    rows: one per image, the rows of a split adjacent, with the columns split, path, label, coarse_label and
    caption; optionally captions (a list of sentences, the first is ``caption``) and digest (hex SHA-256 of what
    the image is; by default of the file ``root / path``). pixels(rows, size): the images, as an iterable of
    uint8 (size, size, 3) or a finished array; None decodes the files. name None: the root's name and content.
    """

    name: str | None
    rows: pd.DataFrame
    class_names: Sequence[str]
    coarse_names: Sequence[str]
    protocols: dict[str, Protocol]
    root: Path | None = None
    pixels: Callable[[pd.DataFrame, int], np.ndarray | Iterable[np.ndarray]] | None = None
    excluded: list[tuple[str, str]] = field(default_factory=list)


LOADERS: dict[str, Callable[..., Listing]] = {}


def register(name: str) -> Callable[[Callable[..., Listing]], Callable[..., Listing]]:
    """``@register("name")`` above a loader makes it known to ``load_dataset``."""

    def keep(loader: Callable[..., Listing]) -> Callable[..., Listing]:
        if (known := LOADERS.get(name)) is not None and known.__module__ != loader.__module__:
            raise DataError(f"data set {name!r} is registered already, by {known.__module__}; choose another name")
        LOADERS[name] = loader
        return loader

    return keep


def limited(rows: pd.DataFrame, limit: int | None) -> pd.DataFrame:
    """The first ``limit`` rows of every (split, label), in order; all rows for None."""
    rows = rows if limit is None else rows.groupby(["split", "label"], sort=False).head(limit)
    return rows.reset_index(drop=True)


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with those of each split adjacent, the splits in ORDER, the order within a split kept."""
    return rows.sort_values("split", key=lambda split: split.map(ORDER.index), kind="stable", ignore_index=True)


def content_hash(rows: pd.DataFrame) -> str:
    """SHA-256 over the sorted (path, digest, label, coarse label, split, captions), one JSON line each."""
    words = rows.captions.map("\n".join) if "captions" in rows else rows.caption
    columns = (rows.path, rows.digest, rows.label, rows.coarse_label, rows.split, words)
    lines = sorted(
        json.dumps([str(p), str(d), int(a), int(b), str(s), str(c)]) for p, d, a, b, s, c in zip(*columns, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check(name: str, listing: Listing) -> None:
    rows = listing.rows
    for column, names in (("label", listing.class_names), ("coarse_label", listing.coarse_names)):
        values = rows[column].to_numpy()
        if len(values) == 0 or values.min() < 0 or values.max() >= len(names):
            raise DataError(f"{name}: {column} must lie in 0..{len(names) - 1} and there must be images")
        if len(set(names)) != len(names):
            raise DataError(f"{name}: two classes share a name in {sorted(names)}")
    if (rows.caption.str.strip() == "").any():
        raise DataError(f"{name}: empty caption for {rows.path[rows.caption.str.strip() == ''].iloc[0]}")
    for key, protocol in listing.protocols.items():
        if missing := {protocol.query, protocol.gallery} - set(rows.split) - {None}:
            raise DataError(f"{name}: protocol {key} needs the split(s) {sorted(missing)}, which hold no image")


def assemble(name: str, listing: Listing, images: np.ndarray, digest: str) -> RetrievalDataset:
    """Cut ``images`` (N, s, s, 3), row i of which belongs to the listing's row i, into splits; check everything.

    Each split stays a view of the memory map. Says in one warning how much was left out and why.
    """
    _check(name, listing)
    splits: dict[str, Split] = {}
    for split, part in listing.rows.groupby("split", sort=False):
        start, stop = part.index[0], part.index[-1] + 1
        if stop - start != len(part):
            raise DataError(f"{name}: the rows of split {split} are not adjacent")
        splits[split] = Split(
            name=split,
            images=images[start:stop],
            labels=part.label.to_numpy(dtype=np.int64),
            coarse_labels=part.coarse_label.to_numpy(dtype=np.int64),
            captions=part.caption.tolist(),
            paths=part.path.tolist(),
            all_captions=part.captions.tolist() if "captions" in part else None,
        )
    excluded = listing.excluded
    if excluded:
        counts = Counter(reason.split(":")[0] for _, reason in excluded)
        listed = "; ".join(f"{n} x {reason}" for reason, n in counts.most_common())
        text = f"{name}: {len(excluded)} left out ({listed}); first: {excluded[0][0]}; all in dataset.excluded"
        warnings.warn(text, UserWarning, stacklevel=3)
    names = (list(listing.class_names), list(listing.coarse_names))
    return RetrievalDataset(name, images.shape[1], digest, *names, splits, dict(listing.protocols), excluded)
