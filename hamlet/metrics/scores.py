"""Scores of query blocks against gallery tiles: dense arrays (memory-mapped too), sparse codes, CUDA tensors.

Every source offers ``pairs`` (the exact float64 score of given pairs, by the definition in ``kernels``) and
``add_ahead`` (count, for a block of queries, the negatives ahead of each positive).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse
import torch

from . import dots, kernels

TILE, ROWS = 16384, 128  # one tile of float32 scores is at most 8 MB
WIDE = 400_000  # positives times dimensions from which a float64 product costs less than the close pairs


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
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(
            f"{name}: expected shape (rows, dimensions) with a dimension at least, got {tuple(values.shape)}"
        )
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


def error_bound(
    norms: np.ndarray, largest: float, dimensions: int, roundoff: float = 2.0**-24
) -> tuple[np.ndarray, float]:
    """(flat per query, slope): |matrix product - ``dots.dot`` s| <= flat + slope |s|, s either of the two.

    roundoff u: 2**-24 for a float32 product; twice 2**-53 for a float64 one, which errs no less than ``dot``.

    Each of the n - 1 additions, in whatever order, errs by at most u times a sum over some of the products
    (Higham, Accuracy and Stability of Numerical Algorithms, SIAM 2002, section 4.2). Such a sum is no larger
    than the positive or the negative products alone, and these come to (sum |q_i g_i| +- s) / 2; by
    Cauchy and Schwarz sum |q_i g_i| <= |q||g|. That is half the usual gamma_n |q||g| where s is small.
    """
    n = dimensions + 12  # 12: rounding of the products, of float64 input and of the bounds to float32
    gamma = n * roundoff / (1 - n * roundoff) * 1.001
    return gamma / 2 * norms * max(largest, 1e-30) + n * 2.0**-125, gamma / 2


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
        self.norms = np.sqrt(np.einsum("ij,ij->i", self.exact, self.exact))

    def _rows(self, index) -> np.ndarray:
        if self.direct and isinstance(index, slice):
            return np.asarray(self.gallery[index])
        return np.ascontiguousarray(self.gallery[index], dtype=self.raw_type)

    def pairs(self, ptr: np.ndarray, idx: np.ndarray) -> np.ndarray:
        """Exact scores of the pairs (query i, idx[ptr[i]:ptr[i+1]]), in units of the tiles."""
        out, of = np.empty(len(idx)), np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
        if self.direct:
            dots.dot_pairs(self.exact, of, np.asarray(self.gallery), idx, out)
        else:
            for t in range(0, len(idx), TILE):
                rows = self._rows(idx[t : t + TILE])
                dots.dot_pairs(self.exact, of[t:], rows, np.arange(len(rows)), out[t : t + TILE])
        return out * self.unit

    def add_ahead(self, lists: tuple, values: np.ndarray, ahead: np.ndarray, pool, threads: int) -> None:
        n, d = self.exact.shape
        kind, roundoff = (np.float64, 2 * 2.0**-53) if len(values) * d > n * WIDE else (np.float32, 2.0**-24)
        bound = error_bound(self.norms, self.largest * self.unit, d, roundoff)
        counter = Counter(lists, values, *bound, kind, ahead, pool, threads)
        query = self.exact.astype(kind)
        buffer = np.empty((min(ROWS, n), min(TILE, len(self.gallery))), kind)
        for first in range(0, len(self.gallery), TILE):
            raw = self._rows(slice(first, first + TILE))
            part = raw if raw.dtype == kind and self.unit == 1 else (raw * self.unit).astype(kind)
            for a in range(0, n, ROWS):
                b = min(a + ROWS, n)
                tile = buffer.reshape(-1)[: (b - a) * len(raw)].reshape(b - a, len(raw))
                np.matmul(query[a:b], part.T, out=tile)
                counter.add(a, tile, first, raw, self.exact[a:b], self.unit)


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
        exact = np.zeros(self.block.shape[0])
        counter = Counter(lists, values, exact, 0.0, np.float64, ahead, pool, threads)
        for a, tile in self.tiles():
            counter.add(a, tile, 0, self.raw, np.zeros((len(tile), 1)), 1.0)


class Counter:
    """The negatives ahead of each positive of a block of queries, tile by tile (see ``kernels.count_tile``)."""

    def __init__(self, lists, values, flat, slope, dtype, ahead, pool, threads):
        self.lists, self.values, self.flat, self.slope, self.ahead = lists, values, flat, slope, ahead
        self.pool, self.threads = pool, threads
        ptr, skip_ptr = lists[0], lists[2]
        b, most = len(flat), int(np.diff(ptr).max())
        entry = np.uint16 if 2 * most < 2**16 else np.uint32  # half the table stays in the cache
        self.grid = kernels.Grid(
            low=np.empty(b, dtype), scale=np.empty(b, dtype), top=np.empty(b, dtype),
            start=np.empty((b, kernels.bins_for(most) + 2), entry),
            next=np.empty(b, np.int64), skip_next=np.empty(b, np.int64),
        )  # fmt: skip
        kernels.lay_grid(ptr, skip_ptr, values, flat, slope, self.grid)

    def add(
        self, a: int, tile: np.ndarray, first: int, raw: np.ndarray, exact: np.ndarray, unit: float
    ) -> None:
        """Count one tile whose first row is query ``a`` of the block, its rows shared by the threads."""
        ptr, idx, skip_ptr, skip_idx = self.lists
        n, rows = len(tile), slice(a, a + len(tile))
        ptr, skip_ptr = ptr[a : a + n + 1], skip_ptr[a : a + n + 1]
        grid = kernels.Grid(*(part[rows] for part in self.grid))
        work = [(n * t // self.threads, n * (t + 1) // self.threads) for t in range(self.threads)]

        def share(bounds):
            kernels.count_tile(
                tile, *bounds, first, raw, exact, unit, self.flat[rows], self.slope,
                ptr, idx, skip_ptr, skip_idx, self.values, grid, self.ahead[a:],
            )  # fmt: skip

        list(self.pool.map(share, work) if self.threads > 1 else map(share, work))


def thread_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=threads, thread_name_prefix="hamlet-metrics")
