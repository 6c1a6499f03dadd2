"""Exact retrieval metrics in NumPy and torch: which items stand ahead of each positive, and means over queries.

No metric needs a full ranking: the positives are taken out of a block of float64 inner products, the rest is sorted,
and each positive is looked up in it. Two scores tie when they differ by at most ``TIE`` times the norm of the query and
the largest of the gallery. A matrix product's last bits depend on its shape; where they could decide whether two scores
tie, the query is measured again with sums of a fixed order: nothing depends on blocks, threads or order.
"""

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
BLOCK = 2**21  # scores that a thread holds at a time, 16 MB, used again and again: fresh memory would cost a tenth
TILE = 2**20  # gallery values converted to float64 at a time; a gallery of up to 8 tiles stays converted
MEAN = {"AP": "mAP", "trapezoidal-AP": "trapezoidal-mAP"}


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

    query (Q, D), gallery (N, D): finite real numbers, as NumPy, torch or sparse matrix; gallery None: leave-one-out,
    the query's own row dropped by its index. Normalise rows for cosine similarity.
    query_labels, gallery_labels: integers or strings, one per row; or several per row, as 0/1 matrix (rows, labels) or
    list of collections: positive when at least one is shared.
    exclude: gallery indices that count for nothing, a list per query, or a 0/1 matrix (Q, N).
    cameras: (query's, gallery's) codes, or one sequence in leave-one-out: positives from the query's own camera count
    for nothing (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015).
    threads: blocks of queries measured side by side, each on one core; None: torch's number.

    With ranks r_1 < ... < r_R of the R positives: AP = mean_i i / r_i (non-interpolated); P@k = hits in the first k
    / k; R@k = 1 if there is any; MAP@R = sum of i / r_i over r_i <= R, / R (Musgrave, Belongie, Lim, A Metric Learning
    Reality Check, ECCV 2020); R-precision = hits in the first R, / R; MRR = 1 / r_1. A negative that ties comes ahead.
    Queries without positives are NaN, left out of the mean and counted as "skipped".

    protocol "revisited" (Radenovic et al., Revisiting Oxford and Paris, CVPR 2018): query_labels is a dict per query
    with gallery indices "easy", "hard" and "junk"; gallery_labels stays None. Each difficulty has its own metrics,
    "easy/trapezoidal-AP" and so on; P@k divides by min(k, last positive's rank) as that benchmark does.
    Raises HamletError for an argument that does not fit, naming it and the first wrong row.
    """
    ks = arguments.cutoffs(ks)
    if protocol not in ("full", "revisited"):
        raise HamletError(f'protocol: expected "full" or "revisited", got {protocol!r}')
    scores = _Scores(query, gallery, exclude, threads)
    if protocol == "full":
        hot = arguments.one_hot(query_labels, gallery_labels, ("query_labels", "gallery_labels"), scores)
        seen = arguments.cameras(cameras, scores)
        skips = [lambda i: (hot[0][i] @ hot[1].T).toarray() & (seen[0][i, None] == seen[1])] if seen else []
        return scores.measure([hot], lambda *a: _precision(*a, ks), skips)
    if gallery_labels is not None or cameras is not None:
        raise HamletError("gallery_labels, cameras: the revisited protocol knows none; list images as junk")
    truth, mean, per_query = arguments.difficulties(query_labels, scores.shape), {}, {}
    items = scipy.sparse.eye_array(scores.shape[1], dtype=bool, format="csr")  # each with a label of its own
    for name, good in {"easy": ["easy"], "medium": ["easy", "hard"], "hard": ["hard"]}.items():
        hot, skips = (sum(truth[key] for key in good), items), [truth[key].__getitem__ for key in {*truth} - {*good}]
        result = scores.measure([hot], lambda *a: _precision(*a, ks, "trapezoidal-"), skips)
        mean |= {f"{name}/{key}": value for key, value in result.mean.items()}
        per_query |= {f"{name}/{key}": value for key, value in result.per_query.items()}
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

    H-AP = sum_k Hrank(k) / rank(k) / sum_k rel(k) over items k that share at least the coarse class, with Hrank(k) the
    sum of min(rel(k), rel(j)) over j = k and the relevant items before k (Ramzi et al., Hierarchical Average Precision
    Training for Pertinent Image Retrieval, ECCV 2022). rel is the paper's (l / L)**alpha / |items at level l|, L = 2:
    1 / F for the F items of the query's fine class, 0.5**alpha / C for the C others of its coarse class; ties: the less
    relevant ahead. With no others, H-AP is AP. Other arguments and errors as in ``retrieval_metrics``.
    """
    alpha = arguments.number("alpha", alpha, 0, 1e6)
    scores = _Scores(query, gallery, exclude, threads)
    levels = arguments.tree((fine, gallery_fine), (coarse, gallery_coarse), scores)

    def graded(groups, rest, tie, band) -> tuple[dict, np.ndarray]:
        size = [(own > -np.inf).sum(axis=1) for own in groups]
        rel = [level / np.maximum(n, 1) for level, n in zip((1, 0.5**alpha), size, strict=True)]
        edge = tie * np.where(rel[0] >= rel[1], -1, 1)[:, None]  # of two that tie, the less relevant first
        total, unsure = 0.0, False
        for own, other, weight, shift in zip(groups, groups[::-1], rel, (edge, -edge), strict=True):
            negatives, open_negatives = _ahead(rest, own - tie, band)
            others, open_others = _ahead(other[:, ::-1], own + shift, band)
            nth = np.arange(1, own.shape[1] + 1)
            hrank = nth * weight[:, None] + others * np.minimum(*rel)[:, None]
            rank = np.where(own > -np.inf, nth + others + negatives, np.inf)
            total += (hrank / rank).cumsum(axis=1)[:, -1]
            unsure = unsure | open_negatives | open_others
        mass = size[0] * rel[0] + size[1] * rel[1]
        return {"HAP": total / np.where(mass > 0, mass, np.nan), "positives": 1.0 * sum(size)}, unsure

    return scores.measure(levels, graded)


class _Scores:
    """Checked embeddings and their float64 inner products, block of queries by block."""

    def __init__(self, query: Matrix, gallery: Matrix | None, exclude, threads: int | None):
        self.threads = torch.get_num_threads() if threads is None else arguments.whole_number("threads", threads)
        q, g, norms = arguments.embeddings(query, gallery)
        self.sparse = scipy.sparse.issparse(q) or scipy.sparse.issparse(g)
        if self.sparse:
            q, g = scipy.sparse.csr_array(q, dtype=np.float64), scipy.sparse.csr_array(g, dtype=np.float64)
        elif g.shape[0] * g.shape[1] <= 8 * TILE:
            g = _float64(g)
        self.query, self.gallery, self.device = q, g, getattr(q, "device", "cpu")
        self.alone, self.shape = gallery is None, (q.shape[0], g.shape[0])
        self.skips = [] if exclude is None else [arguments.listed(exclude, self.shape, "exclude").__getitem__]
        # How far two ways to sum can differ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, 4.2) up
        # to 1,100 dimensions; above, half a tie, far beyond the usual error. Sparse products keep one order.
        band = 0.0 if self.sparse else min((4 * q.shape[1] + 8) * 2.0**-53, TIE / 2)
        self.tie, self.band = (np.maximum(norms, 1e-200) * part for part in (TIE, band))

    def block(self, index: np.ndarray, fixed: bool, out: torch.Tensor):
        """Scores (b, N) float64; fixed: each a function of its two vectors alone, as NumPy sums a row in one order."""
        if self.sparse:
            out[:, : self.shape[1]] = torch.from_numpy((self.query[index] @ self.gallery.T).toarray())
            return out.numpy()
        query = _float64(self.query[index])
        for start in range(0, self.shape[1], step := max(1, TILE // query.shape[1])):
            tile, part = _float64(self.gallery[start : start + step]), out[:, start : start + step]
            if fixed:
                tile = tile.cpu().numpy()
                part[:] = torch.from_numpy(np.stack([(tile * q).sum(axis=1) for q in query.cpu().numpy()]))
            else:
                torch.mm(query, tile.T, out=part)
        return out if torch.is_tensor(self.query) else out.numpy()

    def measure(self, groups: Sequence, evaluate: Callable, skips: Sequence[Callable] = ()) -> RetrievalResult:
        """``evaluate(scores of each group, of the rest, tie, band)`` for each block of queries, and means over all.

        groups: labels of queries and gallery, boolean CSR; an item is of the first group where it shares a label.
        skips: queries (b,) -> boolean (b, N), items that count for nothing."""
        (queries, items), before = self.shape, torch.get_num_threads()  # the pool has them, a product keeps to one
        step = min(max(BLOCK // max(items, 1), 32), 128)  # rows of the fastest product
        blocks, size = np.split(np.arange(queries), range(step, queries, step)), (step, max(items, 1))
        spare = [torch.empty(size, dtype=torch.float64, device=self.device) for _ in blocks[: self.threads]]

        def once(index: np.ndarray, fixed: bool, out: torch.Tensor) -> tuple[dict, np.ndarray]:
            scores = self.block(index, fixed, out[: len(index)])
            for skip in [*self.skips, *skips]:
                scores[skip(index).nonzero()] = -np.inf
            if self.alone:
                scores[np.arange(len(index)), index] = -np.inf
            own = [_take(scores, hot[index] @ gallery_hot.T) for hot, gallery_hot in groups]
            if torch.is_tensor(scores):
                scores = scores.sort(1).values
            else:
                scores.sort(axis=1)  # in place
            return evaluate(own, scores, self.tie[index, None], self.band[index, None] * (not fixed))

        def work(index: np.ndarray) -> dict[str, np.ndarray]:
            found, unsure = once(index, False, out := spare.pop())
            if unsure.any():
                for name, values in once(index[unsure], True, out)[0].items():
                    found[name][unsure] = values
            spare.append(out)
            return found

        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                parts = list(pool.map(work, blocks))
            finally:
                torch.set_num_threads(before)
        per_query = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        counted = per_query["positives"] > 0
        mean = {MEAN.get(k, k): v[counted].mean().item() if counted.any() else np.nan for k, v in per_query.items()}
        counts = {"queries": int(counted.sum()), "skipped": int((~counted).sum())}
        return RetrievalResult({k: v for k, v in mean.items() if k != "positives"} | counts, per_query)


def _precision(groups, rest, tie, band, ks, kind="") -> tuple[dict, np.ndarray]:
    """Metrics of a block of queries, and which of them rounding could change."""
    ahead, unsure = _ahead(rest, groups[0] - tie, band)
    here, nth = groups[0] > -np.inf, np.arange(1, ahead.shape[1] + 1)
    total, rank = here.sum(axis=1), np.where(here, nth + ahead, np.inf)

    def mean(values: np.ndarray, count) -> np.ndarray:
        return values.cumsum(axis=1)[:, -1] / np.where(total > 0, count, np.nan)  # in order: padding adds no bit

    precision, within = nth / rank, rank <= total[:, None]
    before = np.where(rank > 1, (nth - 1) / np.maximum(rank - 1, 1), 1) if kind else precision
    out = {f"{kind}AP": mean((precision + before) / 2, total), "R-precision": mean(within, total)}
    out |= {"MAP@R": mean(within * precision, total), "MRR": mean((nth == 1) / rank, 1), "positives": 1.0 * total}
    last = mean(np.where(nth == total[:, None], rank, 0), 1) if kind else np.inf
    for k in ks:
        hits = mean(rank <= k, 1)
        out |= {f"P@{k}": hits / np.minimum(k, last), f"R@{k}": np.minimum(hits, 1)}
    return out, unsure


def _take(scores, items: scipy.sparse.csr_array) -> np.ndarray:
    """Move items out of a block (-inf stays behind): (b, most), each row falling, filled up with -inf."""
    count = np.diff(items.indptr)
    cells = np.repeat(np.arange(len(count)), count), items.indices
    own = np.full((len(count), max(1, count.max(initial=0))), -np.inf)
    own[np.arange(own.shape[1]) < count[:, None]] = torch.as_tensor(scores[cells]).cpu().numpy()
    scores[cells] = -np.inf
    return np.sort(own, axis=1)[:, ::-1]


def _ahead(rivals, edges: np.ndarray, band: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the rivals (b, N), rising, reach each edge (b, P); the rows where one lies within ``band`` of it."""
    rivals = torch.as_tensor(rivals)
    below = torch.searchsorted(rivals, torch.from_numpy(edges - band).to(rivals.device))
    nearest = rivals.gather(1, below.clamp(max=rivals.shape[1] - 1)).cpu().numpy()
    ahead = rivals.shape[1] - below.cpu().numpy()
    return ahead, ((ahead > 0) & (nearest < edges + band)).any(axis=1)


def _float64(values) -> torch.Tensor:
    return values.double() if torch.is_tensor(values) else torch.from_numpy(np.require(values, np.float64, "CAW"))
