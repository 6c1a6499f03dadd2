"""Compiled inner loops of the metrics: one linear pass over a block of scores, no sorting of the gallery.

The score of a pair is *defined* as a float64 inner product summed in one fixed order (``dots.dot``), a
function of the two vectors alone. A float32 matrix product only filters: it differs from the true product by
a bound that holds for any order of summation (``scores.error_bound``), so a pair that lies further from a
positive than that is decided, and the few others are decided by ``dot``. Ranks therefore depend on no block shape,
thread or gallery order. (Where a query has so many positives that most items lie close to one, the filter is a
float64 product.)

The work per gallery item does not grow with the number of positives: a query keeps one grid of bins over the
range of its positives for the whole gallery (``lay_grid``); an item's bin says which positives stand next to it.
"""

from collections import namedtuple

import numpy as np

from .dots import compiled, dot_rows

LOOK = 4  # positives that an item is compared with at once
ONE = np.uint64(1)  # unsigned indices spare the compiled code a check for negative ones
Grid = namedtuple("Grid", "low scale top start next skip_next")  # see lay_grid


@compiled
def sparse_scores(q_ptr, q_col, q_val, post_ptr, post_row, post_val, out):
    """Scores (b, N) float64 of sparse queries over an inverted index; dimensions add in rising order."""
    for i in range(out.shape[0]):
        out[i, :] = 0
        for t in range(q_ptr[i], q_ptr[i + 1]):
            for p in range(post_ptr[q_col[t]], post_ptr[q_col[t] + 1]):
                out[i, post_row[p]] += np.float64(q_val[t]) * post_val[p]


@compiled
def _first_at_most(values, bound, low):
    """First position from ``low`` on of the falling ``values`` that is <= bound; their length if none is."""
    high = values.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if values[middle] <= bound:
            high = middle
        else:
            low = middle + 1
    return low


@compiled
def _bin(score, low, scale, top):
    """Bin of a score: 0 below ``low``, rising to ``top``. It is monotone, so that no rounding in it matters."""
    return np.int32(min(max((score - low) * scale + type(top)(1), type(top)(0)), top))


@compiled
def bins_for(positives):
    """Number of bins: many per positive, so that few items share a bin with one, but within the cache."""
    return min(max(512, 4 * positives, min(16 * positives, 32768)), 2**22)


@compiled
def lay_grid(ptr, skip_ptr, values, flat, slope, grid):
    """Lay each query's bins from its lowest to its highest positive.

    ptr, values: the positives' exact scores, falling per query. A tile's score s is off by at most
    flat + slope |s|. Fills grid, one row per query: low, scale, top: bins 1 to top - 1 reach from the lowest
    positive to the highest; start: for each bin, twice the number of positives that surely beat all its items,
    plus 1 if another may lie in it; next, skip_next: the first positive and the first skipped item that no
    tile has passed.
    """
    real = grid.low.dtype.type
    for i in range(ptr.shape[0] - 1):
        v, start = values[ptr[i] : ptr[i + 1]], grid.start[i]
        grid.next[i], grid.skip_next[i] = ptr[i], skip_ptr[i]
        if v.shape[0] == 0:
            continue
        size = bins_for(v.shape[0])
        lowest = v[-1] - (flat[i] + slope * abs(v[-1]))
        width = v[0] + (flat[i] + slope * abs(v[0])) - lowest
        grid.low[i], grid.scale[i], grid.top[i] = lowest, size / max(width, 1e-30), size + 1
        low, scale, top, b = grid.low[i], grid.scale[i], grid.top[i], size + 1
        for t in range(v.shape[0]):
            margin = flat[i] + slope * abs(v[t])
            below, above = (
                _bin(real(v[t] - margin), low, scale, top),
                _bin(real(v[t] + margin), low, scale, top),
            )
            while b >= below:
                start[b] = 2 * t
                b -= 1
            for c in range(below, above + 1):
                start[c] |= 1
        start[: b + 1] = 2 * v.shape[0]


@compiled
def _leave_out(row, first, idx, at, end):
    """Take the items idx[at:end] that lie in this tile out of ``row``; returns the first that lies behind it."""
    while at < end and idx[at] < first + row.shape[0]:
        row[idx[at] - first] = -np.inf
        at += 1
    return at


@compiled
def _count_far(bins, start, slots, close):
    """Count the items whose bin no positive comes near; list the others in ``close``, returning how many.

    Here and below nothing branches on a score: such branches cannot be predicted."""
    found = np.uint64(0)
    for j in range(bins.shape[0]):
        entry = np.uint64(start[np.uint32(bins[j])])
        slots[entry >> ONE] += np.uint32(ONE - (entry & ONE))
        close[found] = j
        found += entry & ONE
    return found


@compiled
def _count_close(row, bins, start, near, flat, slope, slots, close, found):
    """Count the close items that stand clear of every positive; keep the others in ``close``."""
    left = np.uint64(0)
    for t in range(found):
        j = close[t]
        s, p = np.float64(row[j]), np.uint64(start[np.uint32(bins[j])]) >> ONE
        margin = flat + slope * abs(s)
        sure = maybe = np.uint64(0)
        for k in range(np.uint64(LOOK)):
            sure += np.uint64(near[p + k] > s + margin)
            maybe += np.uint64(near[p + k] > s - margin)
        unsure = np.uint64((sure != maybe) | (maybe == np.uint64(LOOK)))
        slots[p + sure] += np.uint32(ONE - unsure)
        close[left] = j
        left += unsure
    return left


@compiled
def _count_exact(exact, bins, start, near, slots, close, found):
    """Count the items that were left, by their exact scores."""
    for t in range(found):
        p, beaten = np.uint64(start[np.uint32(bins[close[t]])]) >> ONE, np.uint64(0)
        for k in range(np.uint64(LOOK)):
            beaten += np.uint64(near[p + k] > exact[t])
        p += beaten
        if beaten == np.uint64(LOOK):
            p = np.uint64(_first_at_most(near[:-LOOK], exact[t], np.int64(p)))
        slots[p] += 1


@compiled
def count_tile(
    tile, begin, end, first, raw, query, unit, flat, slope, ptr, idx, skip_ptr, skip_idx, values, grid, ahead
):
    """Add one tile's negatives to ``ahead``.

    tile (b, n) float32 or float64 scores of gallery rows first.. (overwritten where not negative); raw
    (n, D) and query (b, D): what ``dot`` decides by, times ``unit``; flat (b,), slope: bound on |tile - dot|,
    0 if the tile is exact; ptr, idx: positives; skip_*: items that count for nothing, both rising per query;
    values, grid: see lay_grid; ahead: slot ptr[i] + i + t counts the negatives of query i that beat or tie
    positives t, t + 1, ... Tiles come in rising order. Rows begin..end of the block are done (threads share
    a block by rows).
    """
    n, most = tile.shape[1], 0
    for i in range(begin, end):
        most = max(most, ptr[i + 1] - ptr[i])
    bins, close, exact = np.empty(n, np.int32), np.empty(n + 1, np.uint32), np.empty(n)
    table = np.empty(bins_for(most) + 2, grid.start.dtype)
    tables = table, np.empty(most + LOOK), np.empty(most + 1, np.uint32)
    for i in range(begin, end):
        total, row = ptr[i + 1] - ptr[i], tile[i]
        if total == 0:
            continue
        grid.next[i] = _leave_out(row, first, idx, grid.next[i], ptr[i + 1])
        grid.skip_next[i] = _leave_out(row, first, skip_idx, grid.skip_next[i], skip_ptr[i + 1])
        low, scale, top = grid.low[i], grid.scale[i], grid.top[i]
        # Copied in order, a query's tables are in the cache before they are read out of order.
        start, near, slots = (
            tables[0][: bins_for(total) + 2],
            tables[1][: total + LOOK],
            tables[2][: total + 1],
        )
        start[:] = grid.start[i, : start.shape[0]]
        near[:total], near[total:], slots[:] = values[ptr[i] : ptr[i + 1]], -np.inf, 0
        for j in range(n):  # a loop of its own: the compiler turns it into vector instructions
            bins[j] = _bin(row[j], low, scale, top)
        found = _count_far(bins, start, slots, close)
        found = _count_close(row, bins, start, near, flat[i], slope, slots, close, found)
        if slope > 0:
            dot_rows(query[i], raw, unit, close, found, exact)
        else:
            for t in range(found):
                exact[t] = row[close[t]]
        _count_exact(exact, bins, start, near, slots, close, found)
        ahead[ptr[i] + i : ptr[i + 1] + i + 1] += slots


@compiled
def row_metrics(ptr, ahead, ks, out, trapezoidal):
    """Metrics of each query from ``ahead`` (see count_tile) into out (5 + 2 len(ks), b).

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
