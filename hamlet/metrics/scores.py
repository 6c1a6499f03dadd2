"""Scores of query blocks against gallery tiles: dense arrays (memory-mapped too), sparse codes, CUDA tensors.

Every source offers ``pairs`` (the exact float64 score of given pairs, by the definition in ``kernels``) and
``add_ahead`` (count, for a block of queries, the negatives ahead of each positive).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse
import torch

from . import kernels

TILE, ROWS = 16384, 128  # one tile of float32 scores is at most 8 MB
UNIT_ROUNDOFF = 2.0**-24  # of float32


def check_rows(values, name: str) -> tuple[np.ndarray | torch.Tensor, float]:
    """Check a (rows, D) matrix, dense or sparse; returns it as NumPy array, CSR or CUDA tensor, and its
    largest row norm.

    Accepts float16, bfloat16, float32, float64 and integers. Raises ValueError for another shape and, with
    the first such row, for NaN and infinity.
    """
    if torch.is_tensor(values):
        values = values.detach()
        if values.layout != torch.strided:
            part = values.to_sparse_coo().coalesce().cpu()
            place = part.indices().numpy()
            values = scipy.sparse.csr_array((part.values().double().numpy(), place), shape=tuple(part.shape))
        elif values.device.type != "cuda":
            wide = values.cpu().float() if values.dtype == torch.bfloat16 else values.cpu()
            values = wide.numpy()
    if not torch.is_tensor(values):
        values = values.tocsr() if scipy.sparse.issparse(values) else np.asarray(values)
        if values.dtype.kind not in "fiub" and values.dtype.name != "bfloat16":
            raise ValueError(f"{name}: expected real numbers, got dtype {values.dtype}")
    if values.ndim != 2:
        raise ValueError(f"{name}: expected a matrix (rows, dimensions), got shape {tuple(values.shape)}")
    largest = 0.0
    for start in range(0, values.shape[0], TILE):
        part = values[start : start + TILE]
        if torch.is_tensor(part):
            square = part.double().square().sum(1).cpu().numpy()
        elif scipy.sparse.issparse(part):
            square = np.asarray(part.astype(np.float64).multiply(part.astype(np.float64)).sum(1)).ravel()
        else:
            square = np.einsum("ij,ij->i", part, part, dtype=np.float64, casting="unsafe")
        if not np.isfinite(square).all():
            row = start + int(np.argmin(np.isfinite(square)))
            raise ValueError(
                f"{name}: row {row} holds NaN, infinity or values beyond 1e150; remove or fix it"
            )
        largest = max(largest, float(square.max(initial=0)) ** 0.5)
    return values, largest


def power_of_two(size: float) -> float:
    """1 for ordinary sizes, otherwise the power of two that brings ``size`` near 1 (an exact scaling)."""
    return 1.0 if size == 0 or 2.0**-30 < size < 2.0**30 else 2.0 ** -np.frexp(size)[1]


def error_bound(norms: np.ndarray, largest: float, dimensions: int) -> np.ndarray:
    """Bound on |float32 product - float64 product| per query: gamma_n |q||g|, and underflow."""
    n = dimensions + 8  # 8: rounding of float64 input to float32, of the bounds themselves, of ``dot``
    gamma = n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)
    return gamma * norms * max(largest, 1e-30) * 1.001 + n * 2.0**-125


class Dense:
    """NumPy arrays; the gallery is read in tiles and may be memory-mapped, of any layout and dtype."""

    def __init__(self, query: np.ndarray, gallery: np.ndarray, gallery_norm: float):
        self.query, self.gallery = query, gallery
        self.raw_type = np.float64 if gallery.dtype.kind in "iu" or gallery.dtype.itemsize > 4 else np.float32
        self.unit, self.largest = power_of_two(gallery_norm), gallery_norm
        self.direct = gallery.dtype == self.raw_type and gallery.flags.c_contiguous and gallery.flags.aligned

    def load(self, begin: int, end: int) -> None:
        """Take queries begin..end: scaled by a power of two each, which changes no ranking."""
        q = np.ascontiguousarray(self.query[begin:end], dtype=np.float64)
        size = np.abs(q).max(axis=1, initial=0)
        self.exact = np.ldexp(q, -np.frexp(size)[1][:, None])
        self.approximate = self.exact.astype(np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", self.exact, self.exact))
        self.noise = error_bound(norms, self.largest * self.unit, q.shape[1])

    def _rows(self, index) -> np.ndarray:
        if self.direct and isinstance(index, slice):
            return np.asarray(self.gallery[index])
        return np.ascontiguousarray(self.gallery[index], dtype=self.raw_type)

    def pairs(self, ptr: np.ndarray, idx: np.ndarray) -> np.ndarray:
        """Exact scores of the pairs (query i, idx[ptr[i]:ptr[i+1]]), in units of the tiles."""
        out, of = np.empty(len(idx)), np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
        if self.direct:
            kernels.dot_pairs(self.exact, of, np.asarray(self.gallery), idx, out)
        else:
            for t in range(0, len(idx), TILE):
                rows = self._rows(idx[t : t + TILE])
                kernels.dot_pairs(self.exact, of[t:], rows, np.arange(len(rows)), out[t : t + TILE])
        return out * self.unit

    def add_ahead(self, lists: tuple, values: np.ndarray, ahead: np.ndarray, pool, threads: int) -> None:
        buffer = np.empty((min(ROWS, len(self.exact)), min(TILE, len(self.gallery))), np.float32)
        for first in range(0, len(self.gallery), TILE):
            raw = self._rows(slice(first, first + TILE))
            single = (
                raw if raw.dtype == np.float32 and self.unit == 1 else (raw * self.unit).astype(np.float32)
            )
            for a in range(0, len(self.exact), ROWS):
                b = min(a + ROWS, len(self.exact))
                tile = buffer.reshape(-1)[: (b - a) * len(raw)].reshape(b - a, len(raw))
                np.matmul(self.approximate[a:b], single.T, out=tile)
                count_block(
                    tile, first, raw, self.exact[a:b], self.unit, self.noise[a:b], lists,
                    a, values, ahead, pool, threads,
                )  # fmt: skip


class Sparse:
    """CSR codes: an inverted index gives all scores of a query in float64, exact by definition."""

    unit, raw = 1.0, np.zeros((1, 1))

    def __init__(self, query: scipy.sparse.csr_array, gallery: scipy.sparse.csr_array):
        self.query, self.postings = query, gallery.tocsc()
        self.n = gallery.shape[0]
        self.query.sum_duplicates()
        self.postings.sum_duplicates()

    def load(self, begin: int, end: int) -> None:
        self.block = self.query[begin:end]

    def tiles(self):
        rows = max(1, min(ROWS, 2**20 // max(self.n, 1)))
        for a in range(0, self.block.shape[0], rows):
            part = self.block[a : a + rows]
            tile = np.empty((part.shape[0], self.n))
            post = self.postings
            kernels.sparse_scores(
                part.indptr, part.indices, part.data, post.indptr, post.indices, post.data, tile
            )
            yield a, tile

    def pairs(self, ptr: np.ndarray, idx: np.ndarray) -> np.ndarray:
        out = np.empty(len(idx))
        for a, tile in self.tiles():
            for i in range(len(tile)):
                part = slice(ptr[a + i], ptr[a + i + 1])
                out[part] = tile[i, idx[part]]
        return out

    def add_ahead(self, lists: tuple, values: np.ndarray, ahead: np.ndarray, pool, threads: int) -> None:
        for a, tile in self.tiles():
            none, zero = np.zeros((len(tile), 1)), np.zeros(len(tile))
            count_block(tile, 0, self.raw, none, 1.0, zero, lists, a, values, ahead, pool, threads)


def count_block(tile, first, raw, exact, unit, noise, lists, a, values, ahead, pool, threads) -> None:
    """``kernels.count_above`` on one tile whose first row is query ``a`` of the block, by threads."""
    ptr, idx, skip_ptr, skip_idx = lists
    n = len(tile)
    ptr, skip_ptr = ptr[a : a + n + 1], skip_ptr[a : a + n + 1]
    work = [(n * t // threads, n * (t + 1) // threads) for t in range(threads)]

    def share(bounds):
        kernels.count_above(
            tile, *bounds, first, raw, exact, unit, noise, ptr, idx, skip_ptr, skip_idx, values, ahead[a:]
        )

    list(pool.map(share, work) if threads > 1 else map(share, work))


def thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="hamlet-metrics")
