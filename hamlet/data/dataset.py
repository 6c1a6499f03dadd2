"""What a retrieval data set is here: splits of uint8 images with labels and captions, and named protocols.

A protocol says which split asks (query) and which answers (gallery; ``None`` means leave-one-out within the
query split, as in Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016).
Every loader ends in :func:`assemble`, so all data sets hold to the same checks.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from hamlet.errors import DataError

COLUMNS = ("split", "path", "label", "coarse_label", "caption")


@dataclass(frozen=True)
class Split:
    """One list of images.

    images: uint8 (N, size, size, 3), RGB, read-only memory map; labels, coarse_labels: int64 (N,), indices
    into ``class_names`` and ``coarse_names`` of the data set; captions, paths: N strings, paths relative to
    the data set's root.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    coarse_labels: np.ndarray
    captions: list[str]
    paths: list[str]

    def __post_init__(self) -> None:
        n, shape = len(self.paths), self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
            raise DataError(f"split {self.name}: images must be uint8 (N, s, s, 3), got {shape}")
        lengths = {len(self.images), len(self.labels), len(self.coarse_labels), len(self.captions)}
        if lengths != {n} or n == 0:
            raise DataError(f"split {self.name}: empty, or columns of unequal length {sorted(lengths | {n})}")
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


def limited(rows: pd.DataFrame, limit: int | None) -> pd.DataFrame:
    """The first ``limit`` rows of every (split, label), in order; all rows for None."""
    rows = rows if limit is None else rows.groupby(["split", "label"], sort=False).head(limit)
    return rows.reset_index(drop=True)


def content_hash(rows: pd.DataFrame, digests: Sequence[str]) -> str:
    """SHA-256 over the sorted (path, digest, label, coarse label, split, caption), one JSON line each."""
    columns = (rows.path, digests, rows.label, rows.coarse_label, rows.split, rows.caption)
    lines = sorted(
        json.dumps([str(p), str(d), int(a), int(b), str(s), str(c)])
        for p, d, a, b, s, c in zip(*columns, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_names(name: str, rows: pd.DataFrame, class_names: Sequence[str], coarse: Sequence[str]) -> None:
    for column, names in (("label", class_names), ("coarse_label", coarse)):
        values = rows[column].to_numpy()
        if len(values) == 0 or values.min() < 0 or values.max() >= len(names):
            raise DataError(f"{name}: {column} must lie in 0..{len(names) - 1} and there must be images")
        if len(set(names)) != len(names):
            raise DataError(f"{name}: two classes share a name in {sorted(names)}")
    if (rows.caption.str.strip() == "").any():
        raise DataError(f"{name}: empty caption for {rows.path[rows.caption.str.strip() == ''].iloc[0]}")


def assemble(
    name: str,
    rows: pd.DataFrame,
    images: np.ndarray,
    digest: str,
    class_names: Sequence[str],
    coarse_names: Sequence[str],
    protocols: Mapping[str, Protocol],
    excluded: Iterable[tuple[str, str]] = (),
) -> RetrievalDataset:
    """Cut ``images`` (N, s, s, 3), row i of which belongs to ``rows`` i, into splits and check everything.

    ``rows`` has the columns split, path, label, coarse_label, caption, with the rows of a split adjacent, so
    that each split stays a view of the memory map.
    """
    _check_names(name, rows, class_names, coarse_names)
    splits: dict[str, Split] = {}
    for split, part in rows.groupby("split", sort=False):
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
        )
    for key, protocol in protocols.items():
        if missing := {protocol.query, protocol.gallery} - set(splits) - {None}:
            raise DataError(
                f"{name}: protocol {key} needs the split(s) {sorted(missing)}, which hold no image"
            )
    excluded = list(excluded)
    if excluded:
        counts = Counter(reason.split(":")[0] for _, reason in excluded)
        listed = "; ".join(f"{n} x {reason}" for reason, n in counts.most_common())
        text = (
            f"{name}: {len(excluded)} left out ({listed}); first: {excluded[0][0]}; all in dataset.excluded"
        )
        warnings.warn(text, UserWarning, stacklevel=2)
    names = (list(class_names), list(coarse_names))
    return RetrievalDataset(name, images.shape[1], digest, *names, splits, dict(protocols), excluded)
