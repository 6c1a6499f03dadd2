"""Public metrics: what is measured, on which positives. Definitions stand in ``retrieval_metrics``."""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from . import kernels, relevance
from .relevance import ClassLabels, IndexLists, LabelSets
from .scores import Dense, Sparse, check_rows, thread_pool
from .torch_scores import TorchScores

Matrix = np.ndarray | torch.Tensor | scipy.sparse.sparray
REVISITED = {"easy": (("easy",), ("hard",)), "medium": (("easy", "hard"), ()), "hard": (("hard",), ("easy",))}


@dataclass(frozen=True)
class RetrievalResult:
    """``mean``: metric -> mean over the queries that have positives, and the counts "queries", "skipped";
    ``per_query``: metric -> float64 (Q,), NaN where skipped; "positives" is a count and never NaN."""

    mean: dict[str, float]
    per_query: dict[str, np.ndarray]


def _source(query: Matrix, gallery: Matrix | None):
    """Check both matrices and choose the code that scores them."""
    q, q_norm = check_rows(query, "query")
    g, g_norm = (q, q_norm) if gallery is None else check_rows(gallery, "gallery")
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"query has {q.shape[1]} dimensions, gallery {g.shape[1]}; expected the same")
    if torch.is_tensor(q) or torch.is_tensor(g):
        if not (torch.is_tensor(q) and torch.is_tensor(g) and q.device == g.device):
            raise ValueError(
                "query and gallery: one is on a CUDA device, the other is not; move both to one place"
            )
        return TorchScores(q, g, g_norm), len(q), len(g)
    if scipy.sparse.issparse(q) or scipy.sparse.issparse(g):
        return Sparse(scipy.sparse.csr_array(q), scipy.sparse.csr_array(g)), q.shape[0], g.shape[0]
    return Dense(q, g, g_norm), len(q), len(g)


def _block_lists(positives, exclude, cameras, alone: bool, begin: int, end: int) -> tuple:
    """(ptr, idx, skip_ptr, skip_idx) of queries begin..end: positives without skipped items, and those."""
    rows, cols = positives.pairs(begin, end)
    skip_rows, skip_cols = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    keep = np.ones(len(rows), bool)
    if alone:
        keep &= cols != rows + begin
        skip_rows.append(np.arange(end - begin))
        skip_cols.append(np.arange(begin, end))
    if cameras is not None:
        same = cameras[0][rows + begin] == cameras[1][cols]
        skip_rows.append(rows[same])
        skip_cols.append(cols[same])
        keep &= ~same
    for lists in exclude:
        r, c = lists.pairs(begin, end)
        skip_rows.append(r)
        skip_cols.append(c)
        width = max(cols.max(initial=0), c.max(initial=0)) + 1
        keep &= ~np.isin(rows * width + cols, r * width + c)
    skip = relevance.compress(np.concatenate(skip_rows), np.concatenate(skip_cols), end - begin)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(rows[keep], minlength=end - begin))]).astype(np.int64)
    return ptr, cols[keep], *skip


def _rank(source, queries: int, lists: Callable, step: int, threads: int | None, visit: Callable) -> None:
    """Call ``visit(begin, end, lists, values, ordered, ahead)`` per block: exact scores of the positives as
    listed, the same falling per query, and the increments of the negatives ahead (``count_tile``)."""
    if threads is not None and (int(threads) != threads or threads < 1):
        raise ValueError(f"threads: expected a whole number from 1, or None for torch's, got {threads!r}")
    threads = int(threads or torch.get_num_threads())
    with thread_pool(threads) as pool:
        for begin in range(0, queries, step := min(1024, step)):
            end = min(begin + step, queries)
            block = lists(begin, end)
            source.load(begin, end)
            values = source.pairs(block[0], block[1])
            ordered = _fall(block[0], values)
            ahead = np.zeros(len(ordered) + end - begin, np.int32)
            if len(ordered):
                source.add_ahead(block, ordered, ahead, pool, threads)
            visit(begin, end, block, values, ordered, ahead)


def _fall(ptr: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` sorted downwards within each query's slice; one padded sort is faster than many small ones."""
    count = np.diff(ptr)
    place = np.repeat(np.arange(len(count)), count), np.arange(len(values)) - np.repeat(ptr[:-1], count)
    padded = np.full((len(count), count.max(initial=0)), np.inf)
    padded[place] = -values
    padded.sort(axis=1)
    return -padded[place]


def _names(ks) -> list[str]:
    """Of the rows of ``kernels.row_metrics``."""
    return ["AP", "R-precision", "MAP@R", "MRR", "positives", *(f"{m}@{k}" for k in ks for m in "PR")]


def _measure(
    source, queries: int, lists: Callable, step: int, ks, threads, trapezoidal=False
) -> RetrievalResult:
    names = _names(ks)
    out = np.empty((len(names), queries))
    sizes = np.asarray(ks, np.int64)

    def visit(begin, end, block, values, ordered, ahead):
        kernels.row_metrics(block[0], ahead, sizes, out[:, begin:end], trapezoidal)

    _rank(source, queries, lists, step, threads, visit)
    return _result(dict(zip(names, out, strict=True)))


def _result(per_query: dict[str, np.ndarray]) -> RetrievalResult:
    counted = per_query["positives"] > 0
    mean = {"m" + k if k.endswith("AP") else k: float(v[counted].mean()) if counted.any() else float("nan")
            for k, v in per_query.items() if k != "positives"}  # fmt: skip
    mean |= {"queries": int(counted.sum()), "skipped": int((~counted).sum())}
    return RetrievalResult(mean, per_query)


def _on_card(source, *labels) -> bool:
    """Whether a card can do all: one label a row, and Triton is there."""
    return (
        isinstance(source, TorchScores) and source.fused() and not any(map(relevance.is_label_sets, labels))
    )


def _check_lengths(query_labels, gallery_labels, queries: int, gallery: int) -> None:
    for labels, count, name in (
        (query_labels, queries, "query_labels"),
        (gallery_labels, gallery, "gallery_labels"),
    ):
        size = labels.shape[0] if hasattr(labels, "shape") else len(labels)
        if size != count:
            raise ValueError(f"{name}: {size} labels for {count} embeddings")


def _positives(query_labels, gallery_labels):
    if relevance.is_label_sets(query_labels) or relevance.is_label_sets(gallery_labels):
        return LabelSets(*relevance.label_sets(query_labels, gallery_labels))
    return ClassLabels(*relevance.class_codes(query_labels, gallery_labels))


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

    query (Q, D), gallery (N, D): real, finite; NumPy (any float or integer dtype and layout, memory-mapped
    too), torch on CPU or CUDA, or sparse (SciPy, torch), ranked without densifying. gallery None:
    leave-one-out, the query's own row dropped by its index. Normalise rows for cosine similarity.
    query_labels, gallery_labels: integers (64 bit exact) or strings, one per row; or several labels per row
    as multi-hot (rows, labels) or a list of collections: positive when at least one is shared.
    exclude: per query, gallery indices that count for nothing (list of lists, or boolean (Q, N) matrix).
    cameras: (query's, gallery's) codes, or one array in leave-one-out: positives from the query's own camera
    count for nothing (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015).

    With ranks r_1 < ... < r_R of the R positives: AP = mean_i i / r_i (non-interpolated); P@k = hits in the
    first k / k; R@k = 1 if there is any hit; MAP@R = sum of i / r_i over r_i <= R, / R (Musgrave, Belongie,
    Lim, A Metric Learning Reality Check, ECCV 2020); R-precision = hits in the first R / R; MRR = 1 / r_1.
    Ties are pessimistic: a negative that scores the same comes ahead. Queries without positives are NaN,
    left out of the mean and counted as "skipped". Ranks are those of the float64 inner product summed in a
    fixed order (``dots.dot``), whatever the block size, thread count or gallery order.

    protocol "revisited" (Radenovic et al., Revisiting Oxford and Paris, CVPR 2018): query_labels is the
    ground truth, one dict per query with gallery indices "easy", "hard" and "junk"; gallery_labels stays
    None. The metrics of each difficulty are named "easy/trapezoidal-AP", "medium/...", "hard/...", and
    P@k divides by min(k, last positive's rank) as that benchmark does.

    Raises ValueError for shapes that do not fit, NaN or infinity (naming the row), unknown protocols.
    """
    if not len(ks) or any(not isinstance(k, numbers.Real) or k % 1 or k < 1 for k in ks):
        raise ValueError(f"ks: expected whole numbers from 1, got {ks}")
    if protocol not in ("full", "revisited"):
        raise ValueError(f'protocol: expected "full" or "revisited", got {protocol!r}')
    source, queries, size = _source(query, gallery)
    excluded = [] if exclude is None else [IndexLists(exclude, queries, size, "exclude")]
    if gallery_labels is not None and (gallery is None or protocol == "revisited"):
        raise ValueError("gallery_labels: given without a gallery that they could belong to; leave them out")
    if cameras is not None and protocol == "revisited":
        raise ValueError("cameras: the revisited protocol knows none; list such images as junk")
    if protocol == "revisited":
        return _revisited(source, query_labels, queries, size, excluded, ks, threads, gallery is None)
    alone = gallery is None
    if not alone and gallery_labels is None:
        raise ValueError("gallery_labels: missing, though a gallery was given")
    labels = (query_labels, query_labels if alone else gallery_labels)
    _check_lengths(*labels, queries, size)
    if cameras is None and not excluded and min(queries, size) and _on_card(source, *labels):
        out = source.class_metrics(labels, alone, np.asarray(ks, np.int64))
        if out is not None:
            return _result(dict(zip(_names(ks), out, strict=True)))
    positives = _positives(*labels)
    if cameras is not None:
        cameras = relevance.class_codes(cameras)[0] if alone else relevance.class_codes(*cameras)
        cameras = (cameras, cameras) if alone else cameras
        if (given := tuple(map(len, cameras))) != (queries, size):
            raise ValueError(f"cameras: {given} codes for {queries} queries and {size} gallery rows")
    return _measure(
        source,
        queries,
        lambda begin, end: _block_lists(positives, excluded, cameras, alone, begin, end),
        positives.step(),
        ks,
        threads,
    )


def _revisited(source, truth, queries, size, excluded, ks, threads, alone) -> RetrievalResult:
    if len(truth) != queries or any("easy" not in t or "hard" not in t or "junk" not in t for t in truth):
        raise ValueError(f'query_labels: expected {queries} dicts with "easy", "hard", "junk" index lists')
    for i, t in enumerate(truth):
        indices = np.concatenate([np.unique(relevance.as_list(t[key])) for key in ("easy", "hard", "junk")])
        found, times = np.unique(indices, return_counts=True)
        if (times > 1).any():
            raise ValueError(
                f"query_labels: query {i} lists gallery index {found[times > 1][0]:.0f} twice among easy, hard, junk"
            )
    mean: dict[str, float] = {}
    per_query: dict[str, np.ndarray] = {}
    for name, (good, bad) in REVISITED.items():
        lists = [
            IndexLists(
                [[j for key in keys for j in relevance.as_list(t[key])] for t in truth], queries, size, name
            )
            for keys in (good, (*bad, "junk"))
        ]

        def block(begin, end, lists=lists):
            return _block_lists(lists[0], [lists[1], *excluded], None, alone, begin, end)

        result = _measure(source, queries, block, lists[0].step(), ks, threads, trapezoidal=True)
        for key, value in result.per_query.items():
            per_query[f"{name}/trapezoidal-AP" if key == "AP" else f"{name}/{key}"] = value
        for key, value in result.mean.items():
            mean[f"{name}/trapezoidal-mAP" if key == "mAP" else f"{name}/{key}"] = value
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
    """Hierarchical average precision over two levels: key "HAP", per query and averaged.

    H-AP = sum_k Hrank(k) / rank(k) / sum_k rel(k) over items k that share at least the coarse class, with
    Hrank(k) = sum of min(rel(k), rel(j)) over j = k and the relevant items ranked before k (Ramzi et al.,
    Hierarchical Average Precision Training for Pertinent Image Retrieval, ECCV 2022). rel is the paper's
    (l / L)**alpha / |items at level l|, L = 2: 1 / F for the F items of the query's fine class and
    0.5**alpha / C for the C others of its coarse class. Ties: the less relevant item comes ahead. With no
    other item in the coarse class, H-AP is AP. Other arguments and errors as in ``retrieval_metrics``.
    """
    source, queries, size = _source(query, gallery)
    alone = gallery is None
    sides = [(fine, queries, "fine"), (coarse, queries, "coarse")]
    sides += [] if alone else [(gallery_fine, size, "gallery_fine"), (gallery_coarse, size, "gallery_coarse")]
    for labels, count, name in sides:
        if labels is None or len(labels) != count:
            given = "none" if labels is None else len(labels)
            raise ValueError(f"{name}: expected a label for each of {count} embeddings, got {given}")
    fine_q, fine_g = np.split(_joint(fine, fine if alone else gallery_fine), [queries])
    coarse_q, coarse_g = np.split(_joint(coarse, coarse if alone else gallery_coarse), [queries])
    parents = np.unique(np.stack([np.r_[fine_q, fine_g], np.r_[coarse_q, coarse_g]]), axis=1)
    if len(np.unique(parents[0])) != parents.shape[1]:
        raise ValueError("coarse: one fine class lies in two coarse classes; expected a tree")
    positives = _positives(coarse_q, coarse_g)
    excluded = [] if exclude is None else [IndexLists(exclude, queries, size, "exclude")]
    out = {"HAP": np.full(queries, np.nan), "positives": np.zeros(queries)}

    def visit(begin, end, block, values, ordered, ahead):
        ptr, idx = block[:2]
        for i in range(end - begin):
            a, b = ptr[i], ptr[i + 1]
            if a == b:
                continue
            negatives = np.cumsum(ahead[a + i : b + i])
            same = fine_g[idx[a:b]] == fine_q[begin + i]
            count = max(1, int(same.sum())), max(1, int((~same).sum()))
            high, low = 1 / count[0], 0.5**alpha / count[1]
            rel = np.where(same, high, low)
            order = np.lexsort((rel, -values[a:b]))
            rel, same = rel[order], same[order]
            mixed = np.where(same, np.cumsum(~same), np.cumsum(same)) * min(high, low)
            hrank = mixed + np.where(same, np.cumsum(same), np.cumsum(~same)) * rel
            out["HAP"][begin + i] = (hrank / (np.arange(1, b - a + 1) + negatives)).sum() / rel.sum()
            out["positives"][begin + i] = b - a

    def lists(begin, end):
        return _block_lists(positives, excluded, None, alone, begin, end)

    _rank(source, queries, lists, positives.step(), threads, visit)
    result = _result(out)
    return RetrievalResult({"HAP": result.mean.pop("HAP", result.mean.pop("mHAP", None)), **result.mean}, out)


def _joint(first, second) -> np.ndarray:
    return np.concatenate(relevance.class_codes(first, second))
