"""Exact retrieval metrics in NumPy and torch: which items stand ahead of each positive, and means over queries.

No metric needs a full ranking: the positives are taken out of a block of float64 inner products, the rest is
sorted, and each positive is looked up in it. Two scores tie when they differ by at most ``TIE`` times the norm of
the query and the largest of the gallery. A matrix product's last bits depend on its shape; where a score lies so
close to the edge of a tie that they could decide, the query is measured again with sums of a fixed order. So
nothing depends on blocks, threads or order. ``hamlet.arguments`` checks labels and lists.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from hamlet import arguments
from hamlet.errors import HamletError

Matrix = np.ndarray | torch.Tensor | scipy.sparse.sparray
TIE = 1e-12
BLOCK = 2**21  # scores that a thread holds at a time: 16 MB
TILE = 2**20  # gallery values converted to float64 at a time; a gallery of up to 8 tiles stays converted
REVISITED = {"easy": (["easy"], ["hard"]), "medium": (["easy", "hard"], []), "hard": (["hard"], ["easy"])}


@dataclass(frozen=True)
class RetrievalResult:
    """``mean``: metric -> mean over the queries that have positives, and the counts "queries", "skipped";
    ``per_query``: metric -> float64 (Q,), NaN where skipped; "positives" is a count and never NaN."""

    mean: dict[str, float]
    per_query: dict[str, np.ndarray]


def retrieval_metrics(
    query: Matrix,
    query_labels,
    gallery: Matrix | None = None,
    gallery_labels=None,
    ks: Sequence[int] = (1, 5, 10),
    exclude=None,
    *,
    protocol: str = "full",
    cameras=None,
    threads: int | None = None,
) -> RetrievalResult:
    """Exact metrics of the full ranking of the gallery by inner product, per query and averaged.

    query (Q, D), gallery (N, D): finite real numbers, as NumPy, torch or sparse matrix; gallery None:
    leave-one-out, the query's own row dropped by its index. Normalise rows for cosine similarity.
    query_labels, gallery_labels: integers or strings, one per row; or several per row, as 0/1 matrix (rows,
    labels) or list of collections: positive when at least one is shared.
    exclude: gallery indices that count for nothing, a list per query, or a 0/1 matrix (Q, N).
    cameras: (query's, gallery's) codes, or one sequence in leave-one-out: positives from the query's own camera
    count for nothing (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015).
    threads: blocks of queries measured side by side, each on one core; None: torch's number.

    With ranks r_1 < ... < r_R of the R positives: AP = mean_i i / r_i (non-interpolated); P@k = hits in the first
    k / k; R@k = 1 if there is any hit; MAP@R = sum of i / r_i over r_i <= R, / R (Musgrave, Belongie, Lim, A
    Metric Learning Reality Check, ECCV 2020); R-precision = hits in the first R / R; MRR = 1 / r_1. A negative
    that ties comes ahead. Queries without positives are NaN, left out of the mean and counted as "skipped".

    protocol "revisited" (Radenovic et al., Revisiting Oxford and Paris, CVPR 2018): query_labels is a dict per
    query with gallery indices "easy", "hard" and "junk"; gallery_labels stays None. Each difficulty has its own
    metrics, "easy/trapezoidal-AP" and so on; P@k divides by min(k, last positive's rank) as that benchmark does.

    Raises HamletError for an argument that does not fit, naming it and the first wrong row.
    """
    ks = arguments.cutoffs(ks)
    if protocol not in ("full", "revisited"):
        raise HamletError(f'protocol: expected "full" or "revisited", got {protocol!r}')
    scores = _Scores(query, gallery, exclude, threads)
    if protocol == "full":
        hot = arguments.one_hot(query_labels, gallery_labels, ("query_labels", "gallery_labels"), scores)
        cameras = arguments.cameras(cameras, scores)
        return _result(scores.measure(lambda i: hot[0][i] @ hot[1].T, lambda *a: _precision(*a, ks), cameras))
    if gallery_labels is not None or cameras is not None:
        raise HamletError("gallery_labels, cameras: the revisited protocol knows none; list images as junk")
    truth, mean, per_query = arguments.difficulties(query_labels, scores.shape), {}, {}
    for name, (good, bad) in REVISITED.items():
        positives, skips = sum(truth[key] for key in good), [truth[key] for key in [*bad, "junk"]]
        found = scores.measure(positives.__getitem__, lambda *a: _precision(*a, ks, True), None, skips)
        result = _result(found)
        mean |= {f"{name}/{k.replace('mAP', 'trapezoidal-mAP')}": v for k, v in result.mean.items()}
        per_query |= {f"{name}/{'trapezoidal-AP' if k == 'AP' else k}": v for k, v in found.items()}
    return RetrievalResult(mean, per_query)


def hierarchical_metrics(
    query: Matrix,
    fine,
    coarse,
    gallery: Matrix | None = None,
    gallery_fine=None,
    gallery_coarse=None,
    *,
    alpha: float = 1.0,
    exclude=None,
    threads: int | None = None,
) -> RetrievalResult:
    """Hierarchical average precision over two levels, one fine and one coarse class a row: key "HAP".

    H-AP = sum_k Hrank(k) / rank(k) / sum_k rel(k) over items k that share at least the coarse class, with
    Hrank(k) = sum of min(rel(k), rel(j)) over j = k and the relevant items ranked before k (Ramzi et al.,
    Hierarchical Average Precision Training for Pertinent Image Retrieval, ECCV 2022). rel is the paper's
    (l / L)**alpha / |items at level l|, L = 2: 1 / F for the F items of the query's fine class and
    0.5**alpha / C for the C others of its coarse class. Ties: the less relevant item comes ahead. With no
    other item in the coarse class, H-AP is AP. Other arguments and errors as in ``retrieval_metrics``.
    """
    alpha = arguments.number("alpha", alpha, 0, 1e6)
    scores = _Scores(query, gallery, exclude, threads)
    fine, gallery_fine = arguments.one_hot(fine, gallery_fine, ("fine", "gallery_fine"), scores, several=False)
    hot = arguments.one_hot(coarse, gallery_coarse, ("coarse", "gallery_coarse"), scores, several=False)
    pairs = [np.concatenate([a.indices, b.indices]) for a, b in ((fine, gallery_fine), hot)]
    if len(np.unique(pairs[0])) != np.unique(pairs, axis=1).shape[1]:
        raise HamletError("coarse: one fine class lies in two coarse classes; expected a tree")

    def graded(block, index, rows, cols, tie, band) -> tuple[dict, np.ndarray]:
        same = fine.indices[index[rows]] == gallery_fine.indices[cols]
        near, far = (_take(block, rows[kept], cols[kept]) for kept in (same, ~same))
        size = [(x > -np.inf).sum(axis=1) for x in (near, far)]
        rel = [level / np.maximum(n, 1) for level, n in zip((1, 0.5**alpha), size, strict=True)]
        # of the two that tie, the less relevant first
        edge = tie * np.where(rel[0] >= rel[1], -1, 1)[:, None]
        rest, total, unsure = _rising(block), 0.0, False
        for own, other, weight, shift in ((near, far, rel[0], edge), (far, near, rel[1], -edge)):
            negatives, open_negatives = _ahead(rest, own - tie, band)
            others, open_others = _ahead(other[:, ::-1], own + shift, band)
            row, t = np.nonzero(own > -np.inf)
            hrank = (t + 1) * weight[row] + others[row, t] * np.minimum(*rel)[row]
            rank = t + 1 + others[row, t] + negatives[row, t]
            total += np.bincount(row, hrank / rank, len(index))
            unsure = unsure | open_negatives | open_others
        mass = size[0] * rel[0] + size[1] * rel[1]
        return {"HAP": total / np.where(mass > 0, mass, np.nan), "positives": 1.0 * sum(size)}, unsure

    return _result(scores.measure(lambda i: hot[0][i] @ hot[1].T, graded))


class _Scores:
    """Checked embeddings and their float64 inner products, block of queries by block."""

    def __init__(self, query: Matrix, gallery: Matrix | None, exclude, threads: int | None):
        self.threads = torch.get_num_threads() if threads is None else arguments.whole_number("threads", threads)
        q, norms = arguments.rows(query, "query")
        g, others = (q, norms) if gallery is None else arguments.rows(gallery, "gallery")
        if q.shape[1] != g.shape[1]:
            raise HamletError(f"query has {q.shape[1]} dimensions, gallery {g.shape[1]}; expected the same")
        if torch.is_tensor(q) != torch.is_tensor(g):
            raise HamletError("query and gallery: one is on a CUDA device, the other is not; move both there")
        self.sparse = scipy.sparse.issparse(q) or scipy.sparse.issparse(g)
        if self.sparse:
            q, g = scipy.sparse.csr_array(q, dtype=np.float64), scipy.sparse.csr_array(g, dtype=np.float64)
        elif torch.is_tensor(g) or g.size <= 8 * TILE:
            g = _float64(g)
        self.query, self.gallery, self.alone, self.shape = q, g, gallery is None, (q.shape[0], g.shape[0])
        self.kept = threading.local()
        self.norms = np.maximum(norms * others.max(initial=0), 1e-200)
        self.skips = [] if exclude is None else [arguments.listed(exclude, self.shape, "exclude")]
        # How far two ways to sum can differ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, 4.2) up
        # to 1,100 dimensions; above, half a tie, far beyond the usual error. Sparse products keep one order.
        self.band = 0.0 if self.sparse else min((4 * q.shape[1] + 8) * 2.0**-53, TIE / 2)

    def block(self, index: np.ndarray, fixed: bool = False):
        """Scores (b, N) float64; fixed: each a function of its two vectors alone, as NumPy sums a row in one order."""
        if self.sparse:
            return (self.query[index] @ self.gallery.T).toarray()
        if torch.is_tensor(self.query) and not fixed:
            return _float64(self.query[torch.from_numpy(index).to(self.query.device)]) @ self.gallery.T
        # one a thread: fresh memory would cost a tenth
        if not hasattr(self.kept, "out") or len(self.kept.out) < len(index):
            self.kept.out = np.empty((len(index), self.shape[1]))
        query, out = _float64(_numpy(self.query)[index]), self.kept.out[: len(index)]
        whole = self.gallery.dtype == np.float64 and not fixed
        for start in range(0, self.shape[1], step := max(1, self.shape[1] if whole else TILE // query.shape[1])):
            tile = np.ascontiguousarray(_float64(_numpy(self.gallery[start : start + step])))
            part = out[:, start : start + step]
            if fixed:
                part[:] = np.stack([(tile * q).sum(axis=1) for q in query])
            else:
                tile = tile if tile.flags.writeable else tile.copy()  # torch wants no memory map
                torch.mm(torch.from_numpy(query), torch.from_numpy(tile).T, out=torch.from_numpy(part))
        return out

    def measure(self, positives: Callable, evaluate: Callable, cameras=None, skips=()) -> dict:
        """Metric -> (Q,): ``evaluate(scores, queries, rows, cols of the positives, tie, band)`` for each block.

        positives(queries): boolean CSR (b, N); skips: the same over all queries, items that count for nothing."""
        most = 1024 if torch.is_tensor(self.query) else 128  # rows of the fastest product
        step = min(max(BLOCK // max(self.shape[1], 1), 32), most)

        def once(index: np.ndarray, fixed: bool) -> tuple[dict, np.ndarray]:
            scores, (rows, cols) = self.block(index, fixed), arguments.pairs(positives(index))
            for pairs in [arguments.pairs(matrix[index]) for matrix in [*self.skips, *skips]]:
                scores[pairs] = -np.inf
            if self.alone:
                scores[np.arange(len(index)), index] = -np.inf
            if cameras is not None:
                same = cameras[0][index[rows]] == cameras[1][cols]
                scores[rows[same], cols[same]] = -np.inf
            norms = self.norms[index, None]
            return evaluate(scores, index, rows, cols, norms * TIE, norms * (0.0 if fixed else self.band))

        def work(start: int) -> dict[str, np.ndarray]:
            index = np.arange(start, min(start + step, self.shape[0]))
            found, unsure = once(index, fixed=False)
            if unsure.any():
                for name, values in once(index[unsure], fixed=True)[0].items():
                    found[name][unsure] = values
            return found

        before = torch.get_num_threads()  # the pool makes the threads, a product keeps to its own
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                parts = list(pool.map(work, range(0, max(self.shape[0], 1), step)))
            finally:
                torch.set_num_threads(before)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _precision(scores, index, rows, cols, tie, band, ks, trapezoidal=False) -> tuple[dict, np.ndarray]:
    """Metrics of a block of queries, and which of them rounding could change."""
    own = _take(scores, rows, cols)
    ahead, unsure = _ahead(_rising(scores), own - tie, band)
    row, t = np.nonzero(own > -np.inf)
    total, rank = np.bincount(row, minlength=len(index)), t + 1 + ahead[row, t]
    some = np.where(total > 0, 1.0, np.nan)

    def mean(values: np.ndarray, count) -> np.ndarray:
        return np.bincount(row, values, len(index)) / (count * some)

    precision, first, within = (t + 1) / rank, t == 0, rank <= total[row]
    before = np.where(rank > 1, t / np.maximum(rank - 1, 1), 1) if trapezoidal else precision
    out = {"AP": mean((precision + before) / 2, total), "R-precision": mean(within, total)}
    out |= {"MAP@R": mean(within * precision, total), "MRR": mean(first / rank, 1), "positives": 1.0 * total}
    last = mean(rank * (t + 1 == total[row]), 1) if trapezoidal else np.inf
    for k in ks:
        hits = mean(rank <= k, 1)
        out |= {f"P@{k}": hits / np.minimum(k, last), f"R@{k}": np.minimum(hits, 1)}
    return out, unsure


def _take(scores, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Move items out of a block (-inf stays behind): (b, most), each row falling, filled up with -inf."""
    count = np.bincount(rows, minlength=len(scores))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    own = np.full((len(scores), max(1, count.max(initial=0))), -np.inf)
    cells = tuple(map(torch.from_numpy, (rows, cols))) if torch.is_tensor(scores) else (rows, cols)
    own[rows, place] = _numpy(scores[cells])
    scores[cells] = -np.inf
    return _rising(own)[:, ::-1]


def _rising(scores):
    """Each row sorted; NumPy's in place."""
    if torch.is_tensor(scores):
        return scores.sort(1).values
    scores.sort(axis=1)
    return scores


def _ahead(rivals, edges: np.ndarray, band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the rivals (b, N), rising, reach each edge (b, P); the rows where one lies within ``band`` of it."""
    size = rivals.shape[1]
    if not size:
        return np.zeros(edges.shape, np.int64), np.zeros(len(edges), bool)
    if torch.is_tensor(rivals):
        low, high = (torch.from_numpy(edges + side).to(rivals.device) for side in (-band, band))
        low, high = (_numpy(torch.searchsorted(rivals, x)) for x in (low, high))
        return size - low, (low != high).any(axis=1)
    below = np.zeros(edges.shape, np.int64)
    nearest = np.full(edges.shape, np.inf)
    for row, values, found, best in zip(rivals, edges - band, below, nearest, strict=True):
        found[:] = row.searchsorted(values)
        row.take(found, out=best, mode="clip")
    return size - below, ((below < size) & (nearest < edges + band)).any(axis=1)


def _numpy(values):
    return values.cpu().numpy() if torch.is_tensor(values) else values


def _float64(values):
    return values.double() if torch.is_tensor(values) else values.astype(np.float64, copy=False)


def _result(per_query: dict[str, np.ndarray]) -> RetrievalResult:
    counted = per_query["positives"] > 0
    mean = {k: v[counted].mean().item() if counted.any() else np.nan for k, v in per_query.items()}
    mean = {"mAP" if k == "AP" else k: v for k, v in mean.items() if k != "positives"}
    counts = {"queries": int(counted.sum()), "skipped": int((~counted).sum())}
    return RetrievalResult(mean | counts, per_query)
