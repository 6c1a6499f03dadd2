"""Which gallery items are positives of a query, and which count for nothing.

Class labels, several labels per image, and explicit lists all become, block of queries by block, the
same two compressed lists (ptr, idx rising per query), so that the ranking code knows one form.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch

PAIRS = 2**20  # of a query and a positive held at a time, at some 100 bytes each


def as_numpy(values):
    return values.detach().cpu().numpy() if torch.is_tensor(values) else values


def class_codes(*labels) -> list[np.ndarray]:
    """Labels as int64 codes 0..C-1 common to all arguments. Integers of any size, or strings."""
    arrays = [np.asarray(as_numpy(x)) for x in labels]
    for x in arrays:
        if x.dtype.kind == "f" and not (
            np.isfinite(x).all() and (x == np.floor(x)).all() and (abs(x) <= 2**53).all()
        ):
            raise ValueError("labels: a float label is no integer within 2**53; pass integers or strings")
    if len({x.dtype.kind for x in arrays}) > 1:  # int64 beside uint64 would meet in float64 and collide
        if any(x.dtype.kind not in "iufb" for x in arrays):
            raise ValueError(f"labels: cannot compare {' with '.join(str(x.dtype) for x in arrays)}")
        arrays = [x.astype(np.int64) if x.dtype.kind in "fb" else x.astype(object) for x in arrays]
    codes = np.unique(np.concatenate(arrays), return_inverse=True)[1].astype(np.int64).ravel()
    return np.split(codes, np.cumsum([len(x) for x in arrays])[:-1])


def compress(rows: np.ndarray, cols: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, column) as (ptr int64 (count + 1,), idx int64), rows in order, repeats dropped."""
    width = int(cols.max(initial=0)) + 1
    key = np.unique(rows.astype(np.int64) * width + cols)
    return np.searchsorted(key, np.arange(count + 1) * width), key % width


class IndexLists:
    """Per-query gallery indices: a sequence of sequences, or a boolean (Q, N) matrix, dense or sparse."""

    def __init__(self, values, queries: int, gallery: int, name: str):
        values = as_numpy(values)
        if scipy.sparse.issparse(values) or (isinstance(values, np.ndarray) and values.dtype == bool):
            matrix = scipy.sparse.csr_array(values, copy=True)
            matrix.eliminate_zeros()
            matrix.sort_indices()
            if matrix.shape != (queries, gallery):
                raise ValueError(f"{name}: expected shape {(queries, gallery)}, got {matrix.shape}")
            self.ptr, self.idx = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
            return
        if len(values) != queries:
            raise ValueError(f"{name}: expected one list per query ({queries}), got {len(values)}")
        lists = [np.asarray(as_numpy(x)).reshape(-1) for x in values]
        for i, x in enumerate(lists):
            if len(x) and (x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= gallery):
                raise ValueError(f"{name}: query {i}: expected gallery indices 0..{gallery - 1}, got {x[:8]}")
        self.ptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        self.idx = np.concatenate([np.empty(0, np.int64), *map(np.sort, lists)]).astype(np.int64)

    def pairs(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        ptr = self.ptr[begin : end + 1]
        return np.repeat(np.arange(end - begin), np.diff(ptr)), self.idx[ptr[0] : ptr[-1]]

    def step(self) -> int:
        return max(1, PAIRS // max(1, int(np.diff(self.ptr).max(initial=0))))


class ClassLabels:
    """One class per image: positives are the gallery items of the query's class."""

    def __init__(self, query: np.ndarray, gallery: np.ndarray):
        self.query = query
        self.order = np.argsort(gallery, kind="stable")
        classes = int(max(query.max(initial=-1), gallery.max(initial=-1))) + 1
        self.starts = np.searchsorted(gallery[self.order], np.arange(classes + 1))

    def pairs(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        label = self.query[begin:end]
        count = self.starts[label + 1] - self.starts[label]
        ends = np.cumsum(count)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
        return np.repeat(np.arange(end - begin), count), self.order[
            np.repeat(self.starts[label], count) + within
        ]

    def step(self) -> int:
        return max(1, PAIRS // max(1, int(np.diff(self.starts).max(initial=0))))


class LabelSets:
    """Several labels per image, as CSR (images, labels): positive when at least one is shared."""

    def __init__(self, query: scipy.sparse.csr_array, gallery: scipy.sparse.csr_array):
        self.query, self.gallery_t = query, gallery.T.tocsr()

    def pairs(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        shared = self.query[begin:end] @ self.gallery_t
        shared.sort_indices()
        shared = shared.tocoo()
        return shared.row.astype(np.int64), shared.col.astype(np.int64)

    def step(self) -> int:
        return int(np.clip(2**22 // max(1, self.gallery_t.shape[1]), 16, 1024))


def label_sets(*labels) -> list[scipy.sparse.csr_array]:
    """Multi-hot matrices (dense or sparse, 0/1) or sequences of label collections, as CSR of int32 ones."""
    if all(
        scipy.sparse.issparse(x) or (np.ndim(as_numpy(x)) == 2 and not isinstance(x, list | tuple))
        for x in labels
    ):
        out = [scipy.sparse.csr_array(as_numpy(x) != 0).astype(np.int32) for x in labels]
        if len({x.shape[1] for x in out}) > 1:
            raise ValueError(f"labels: multi-hot matrices of unlike width {[x.shape[1] for x in out]}")
        return out
    known: dict = {}
    out = []
    for sets in labels:
        cols = [[known.setdefault(label, len(known)) for label in set(as_list(s))] for s in sets]
        ptr = np.concatenate([[0], np.cumsum([len(c) for c in cols])])
        out.append((np.array([c for part in cols for c in part], np.int64), ptr))
    return [
        scipy.sparse.csr_array((np.ones(len(c), np.int32), c, p), shape=(len(p) - 1, max(1, len(known))))
        for c, p in out
    ]


def as_list(values) -> list:
    values = as_numpy(values)
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def is_label_sets(labels) -> bool:
    """True for multi-hot matrices and sequences of collections; False for one label per image."""
    if scipy.sparse.issparse(labels) or torch.is_tensor(labels) or isinstance(labels, np.ndarray):
        return labels.ndim == 2
    return isinstance(labels, Sequence) and any(isinstance(x, set | frozenset | list | tuple) for x in labels)
