"""Compiled inner loops of the metrics: one linear pass over a block of scores, no sorting of the gallery.

The score of a pair is *defined* as a float64 inner product summed in one fixed order (``dot``), a function
of the two vectors alone. A float32 matrix product only filters: it differs from the true product by at
most ``gamma_n |q||g|`` (Higham, Accuracy and Stability of Numerical Algorithms, SIAM 2002, section 3.1,
valid for any order of summation), so a pair that lies further from a positive than that is decided, and
the few others are decided by ``dot``. Ranks therefore depend on no block shape, thread or gallery order.
"""

import numpy as np
from numba import njit


def compiled(function):
    """``njit`` with an on-disk cache where some cache folder is writable, without one otherwise."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba: "no locator available" (read-only install and no writable home)
        return njit(nogil=True)(function)


@compiled
def dot(q, g):
    """Inner product in float64: eight interleaved partial sums, added pairwise. Same bits at every call."""
    end = q.shape[0] // 8 * 8
    a = b = c = d = e = f = h = k = 0.0
    for i in range(0, end, 8):
        a += q[i] * g[i]
        b += q[i + 1] * g[i + 1]
        c += q[i + 2] * g[i + 2]
        d += q[i + 3] * g[i + 3]
        e += q[i + 4] * g[i + 4]
        f += q[i + 5] * g[i + 5]
        h += q[i + 6] * g[i + 6]
        k += q[i + 7] * g[i + 7]
    for i in range(end, q.shape[0]):
        a += q[i] * g[i]
    return ((a + e) + (c + h)) + ((b + f) + (d + k))


@compiled
def dot_pairs(query, query_rows, gallery, gallery_rows, out):
    """``out[i] = dot(query[query_rows[i]], gallery[gallery_rows[i]])``."""
    for i in range(out.shape[0]):
        out[i] = dot(query[query_rows[i]], gallery[gallery_rows[i]])


@compiled
def sparse_scores(q_ptr, q_col, q_val, post_ptr, post_row, post_val, out):
    """Scores (b, N) float64 of sparse queries over an inverted index; dimensions add in rising order."""
    for i in range(out.shape[0]):
        out[i, :] = 0
        for t in range(q_ptr[i], q_ptr[i + 1]):
            for p in range(post_ptr[q_col[t]], post_ptr[q_col[t] + 1]):
                out[i, post_row[p]] += np.float64(q_val[t]) * post_val[p]


@compiled
def class_lists(labels, rows, starts, order, ptr, idx):
    """Fill ``idx`` with each query's class members, leaving out gallery row ``rows[i]`` (-1: none)."""
    for i in range(labels.shape[0]):
        n = ptr[i]
        for t in range(starts[labels[i]], starts[labels[i] + 1]):
            if order[t] != rows[i]:
                idx[n] = order[t]
                n += 1


@compiled
def _first_at_most(values, bound, low, high):
    """First position in [low, high) of the falling ``values`` that is <= bound; high if there is none."""
    while low < high:
        middle = (low + high) >> 1
        if values[middle] <= bound:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def count_above(
    tile, begin, end, first, raw, query, unit, noise, ptr, idx, skip_ptr, skip_idx, values, ahead
):
    """Add one tile's negatives to ``ahead``.

    tile (b, n) float32 or float64 scores of gallery rows first.. (overwritten where not negative); raw
    (n, D) and query (b, D): what ``dot`` decides by, times ``unit``; noise (b,): bound on |tile - dot|, 0 if
    the tile is exact; ptr, idx: positives; skip_*: items that count for nothing; values: the positives'
    exact scores, falling per query; ahead: slot ptr[i] + i + t counts the negatives of query i that beat
    or tie positives t, t+1, ... Rows begin..end of the block are done (threads share a block by rows).

    Each row is binned between the lowest and the highest positive. Bins within ``noise`` of a positive are
    looked at item by item; every other bin is counted whole. Binning is monotone in the score, so that no
    rounding in it matters.
    """
    n = tile.shape[1]
    bins, chosen = np.empty(n, np.int32), np.empty(n + 1, np.int32)
    for i in range(begin, end):
        v, row, slot = values[ptr[i] : ptr[i + 1]], tile[i], ptr[i] + i
        if v.shape[0] == 0:
            continue
        for t in range(ptr[i], ptr[i + 1]):
            if first <= idx[t] < first + n:
                row[idx[t] - first] = -np.inf
        for t in range(skip_ptr[i], skip_ptr[i + 1]):
            if first <= skip_idx[t] < first + n:
                row[skip_idx[t] - first] = -np.inf
        size = 512
        while size < 16 * v.shape[0] and size < n:
            size *= 2
        margin, real = noise[i], row.dtype.type
        low, zero, one, top = real(v[-1] - margin), real(0), real(1), real(size + 1)
        scale = real(size / max(v[0] + margin - (v[-1] - margin), 1e-30))
        count, reach = np.zeros(size + 2, np.int32), np.zeros(size + 3, np.int32)
        better, near = np.zeros(size + 3, np.int32), np.zeros(size + 2, np.uint8)
        for t in range(v.shape[0]):
            below = np.int32(min(max((real(v[t] - margin) - low) * scale + one, zero), top))
            above = np.int32(min(max((real(v[t] + margin) - low) * scale + one, zero), top))
            better[below] += 1
            reach[above] += 1
            near[below : above + 1] = 1
        for j in range(n):  # a loop of its own: the compiler turns it into vector instructions
            bins[j] = np.int32(min(max((row[j] - low) * scale + one, zero), top))
        found = 0
        for j in range(n):
            b = bins[j]
            count[b] += 1
            chosen[found] = j
            found += near[b]
        for b in range(size + 1, 0, -1):  # bin 0 lies below every positive
            if near[b] == 0:
                ahead[slot + better[b + 1]] += count[b]
            better[b] += better[b + 1]  # positives that beat all of bin b - 1 and lower
            reach[b] += reach[b + 1]  # positives that may be in bin b or higher
        for t in range(found):
            s, b = np.float64(row[chosen[t]]), bins[chosen[t]]
            high, last = better[b + 1], reach[b]
            if last - high > 16:
                high = _first_at_most(v, s + margin, high, last)
                unsure = margin > 0 and high < last and v[high] >= s - margin
            else:  # few positives near: comparing with each, without branches, is faster
                unsure = False
                for p in range(high, last):
                    high += s < v[p]
                    unsure |= abs(s - v[p]) <= margin
                unsure &= margin > 0
            if unsure:
                s = dot(query[i], raw[chosen[t]]) * unit
                high = _first_at_most(v, s, better[b + 1], last)
            ahead[slot + high] += 1


@compiled
def row_metrics(ptr, ahead, ks, out, trapezoidal):
    """Metrics of each query from ``ahead`` (see count_above) into out (5 + 2 len(ks), b).

    Rows: AP, R-precision, MAP@R, MRR, positives, then P@k and R@k for each k; NaN without positives.
    On return, ``ahead`` holds at slot ptr[i] + i + t the number of negatives ahead of positive t.
    """
    for i in range(ptr.shape[0] - 1):
        total = ptr[i + 1] - ptr[i]
        out[:, i] = 0 if total else np.nan
        out[4, i] = total
        negatives = 0
        for t in range(total):
            negatives += ahead[ptr[i] + i + t]
            ahead[ptr[i] + i + t] = negatives
            rank = t + 1 + negatives
            precision = (t + 1) / rank
            before = 1.0 if rank == 1 else t / (rank - 1)
            out[0, i] += ((precision + before) / 2 if trapezoidal else precision) / total
            if rank <= total:
                out[1, i] += 1
                out[2, i] += precision / total
            if t == 0:
                out[3, i] = 1 / rank
            for k in range(ks.shape[0]):
                out[5 + 2 * k, i] += rank <= ks[k]
                if t == 0 and rank <= ks[k]:
                    out[6 + 2 * k, i] = 1
        if total:
            out[1, i] /= total
        for k in range(ks.shape[0]):  # the revisited protocol looks no further than the last positive
            out[5 + 2 * k, i] /= min(ks[k], total + negatives) if trapezoidal and total else ks[k]
