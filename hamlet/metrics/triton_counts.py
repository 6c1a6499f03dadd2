"""Metrics of class labels on an NVIDIA card: as ``kernels`` does it, in Triton, with nothing left to the host.

cuBLAS makes a tile of float32 scores; ``count_tile`` reads it once: a score's bin in its query's table says how
many positives surely beat it, or that one is too near to tell. The few scores that stay undecided are listed, and
``count_listed`` decides them by the exact score of ``dots.dot``, so that the results have the bits of the CPU's.
Without floating-point fusion (``EXACT``), since a fused multiply-add would round once where ``dots.dot`` rounds
twice. TRITON_INTERPRET=1 runs the same code on a CPU, slowly: the tests do.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from .scores import error_bound, power_of_two
from .torch_scores import scaled

TILE, COLUMNS = 2**24, 2**16  # scores in a tile, and gallery rows in it
BLOCK = 2**24  # entries of the tables of a block of queries
EXACT = {"enable_fp_fusion": False}
LOOK = tl.constexpr(4)  # positives that a score is compared with before it is listed


@triton.jit
def dot(query, rows, gallery, cols, mask, dimensions, PAIRS: tl.constexpr):
    """``dots.dot`` for PAIRS pairs (row of query (., D) float64, row of gallery (., D)): same order, same bits."""
    lanes = tl.arange(0, 8)
    q = query + (rows.to(tl.int64) * dimensions)[:, None] + lanes[None, :]
    g = gallery + (cols.to(tl.int64) * dimensions)[:, None] + lanes[None, :]
    total = tl.zeros((PAIRS, 8), tl.float64)
    end = dimensions // 8 * 8
    for i in range(0, end, 8):
        a = tl.load(q + i, mask=mask[:, None], other=0.0)
        total += a * tl.load(g + i, mask=mask[:, None], other=0.0).to(tl.float64)
    first = (lanes == 0)[None, :] & mask[:, None]
    for i in range(end, dimensions):
        a = tl.load(q + i, mask=first, other=0.0)
        total += a * tl.load(g + i, mask=first, other=0.0).to(tl.float64)
    low, high = tl.split(tl.permute(tl.reshape(total, (PAIRS, 2, 4)), (0, 2, 1)))
    low, high = tl.split(tl.permute(tl.reshape(low + high, (PAIRS, 2, 2)), (0, 2, 1)))
    low, high = tl.split(low + high)
    return low + high


@triton.jit
def pair_scores(query, gallery, cols, out, count, width, dimensions, unit, PAIRS: tl.constexpr):
    """out[n] = exact score of query n // width and gallery row cols[n], times unit[0]; cols < 0: left alone."""
    n = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    col = tl.load(cols + n, mask=n < count, other=-1)
    score = dot(query, n // width, gallery, col, col >= 0, dimensions, PAIRS)
    tl.store(out + n, score * tl.load(unit), mask=col >= 0)


@triton.jit
def blank(tile, cols, count, width, first, columns, SIZE: tl.constexpr):
    """Take the query itself and its positives, cols (rows, width), out of a tile of gallery rows first.."""
    n = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    col = tl.load(cols + n, mask=n < count, other=-1)
    inside = (col >= first) & (col < first + columns)
    tl.store(tile + (n // width) * columns + col - first, float("-inf"), mask=inside)


@triton.jit
def count_tile(
    tile,
    columns,
    low,
    scale,
    table,
    bins,
    values,
    positives,
    flat,
    slope,
    slots,
    listed,
    length,
    SIZE: tl.constexpr,
):
    """Count SIZE scores of one row of a tile (rows, columns) into slots; list those that stay undecided.

    low, scale (rows,): bin 1 begins at low, bins - 1 is the last; table (rows, bins): twice the number of
    positives that surely beat a bin's scores, plus 1 where another may be near; values (rows, positives) float64
    falling, filled up with -inf; flat (rows,), slope: the bound on |score - exact|; slots (rows, positives + 1):
    slot t counts the scores that exactly t positives beat; listed, length: places in the tile, how many.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    score = tl.load(tile + row * columns + column, mask=column < columns, other=float("-inf"))
    lowest = tl.load(low + row)
    above = score >= lowest  # what lies below stands behind all positives, and nothing asks for it
    place = tl.where(above, score - lowest, 0.0) * tl.load(scale + row)
    place = tl.minimum(place, (bins - 2).to(tl.float32)).to(tl.int32) + 1
    entry = tl.load(table + row * bins + place, mask=above, other=0).to(tl.int32)
    beaten = entry >> 1
    near = above & ((entry & 1) == 1)
    s = score.to(tl.float64)
    margin = tl.load(flat + row) + slope * tl.abs(s)
    sure = tl.zeros((SIZE,), tl.int32)
    maybe = tl.zeros((SIZE,), tl.int32)
    for k in tl.static_range(LOOK):
        there = near & (beaten + k < positives)
        value = tl.load(values + row * positives + beaten + k, mask=there, other=float("-inf"))
        sure += (value > s + margin).to(tl.int32)
        maybe += (value > s - margin).to(tl.int32)
    unsure = near & ((sure != maybe) | (maybe == LOOK))
    slot = slots + row * (positives + 1) + beaten + tl.where(near, sure, 0)
    tl.atomic_add(slot, 1, mask=above & (unsure == 0))
    chosen = unsure.to(tl.int32)
    begin = tl.atomic_add(length, tl.sum(chosen, 0))
    tl.store(listed + begin + tl.cumsum(chosen, 0) - 1, (row * columns + column).to(tl.int32), mask=unsure)


@triton.jit
def count_listed(
    listed, length, columns, first, query, gallery, dimensions, unit, values, positives, slots, STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Count what ``count_tile`` listed, by exact scores and a bisection of the positives (2**STEPS > positives)."""
    n = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    mask = n < length
    place = tl.load(listed + n, mask=mask, other=0).to(tl.int64)
    row = place // columns
    score = dot(query, row, gallery, first + place % columns, mask, dimensions, PAIRS) * tl.load(unit)
    begin = tl.zeros((PAIRS,), tl.int64)
    end = begin + positives
    for _ in tl.static_range(STEPS):
        middle = (begin + end) // 2
        going = mask & (begin < end)
        beats = tl.load(values + row * positives + middle, mask=going, other=float("-inf")) > score
        begin = tl.where(going & beats, middle + 1, begin)
        end = tl.where(going & (beats == 0), middle, end)
    tl.atomic_add(slots + row * (positives + 1) + begin, 1, mask=mask)


@triton.jit
def row_metrics(slots, counts, ks, out, queries, positives, kinds, SIZE: tl.constexpr, KINDS: tl.constexpr):
    """``kernels.row_metrics`` for SIZE queries: out (5 + 2 kinds, queries) float64, ks (kinds,)."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = i < queries
    count = tl.load(counts + i, mask=mask, other=0)
    total = count.to(tl.float64)
    which = tl.arange(0, KINDS)
    limit = tl.load(ks + which, mask=which < kinds, other=1)
    negatives = tl.zeros((SIZE,), tl.int64)
    ap = tl.zeros((SIZE,), tl.float64)
    at_r = tl.zeros((SIZE,), tl.float64)
    first = tl.zeros((SIZE,), tl.int64)
    within = tl.zeros((SIZE,), tl.int64)
    hits = tl.zeros((SIZE, KINDS), tl.int64)
    for t in range(positives):
        valid = mask & (t < count)
        negatives += tl.load(slots + i * (positives + 1) + t, mask=valid, other=0)
        rank = t + 1 + negatives
        precision = (t + 1) / rank.to(tl.float64) / tl.where(valid, total, 1.0)
        ap += tl.where(valid, precision, 0.0)
        early = valid & (rank <= count)
        at_r += tl.where(early, precision, 0.0)
        within += early.to(tl.int64)
        first = tl.where(t == 0, rank, first)
        hits += (valid[:, None] & (rank[:, None] <= limit[None, :])).to(tl.int64)
    none = tl.where(count > 0, 0.0, float("nan"))
    some = tl.where(count > 0, total, 1.0)
    tl.store(out + i, ap + none, mask=mask)
    tl.store(out + queries + i, within.to(tl.float64) / some + none, mask=mask)
    tl.store(out + 2 * queries + i, at_r + none, mask=mask)
    tl.store(out + 3 * queries + i, 1.0 / tl.maximum(first, 1).to(tl.float64) + none, mask=mask)
    tl.store(out + 4 * queries + i, total, mask=mask)
    place = out + (5 + 2 * which[None, :]) * queries + i[:, None]
    asked = mask[:, None] & (which < kinds)[None, :]
    tl.store(place, hits.to(tl.float64) / limit[None, :].to(tl.float64) + none[:, None], mask=asked)
    any_hit = (first[:, None] <= limit[None, :]).to(tl.float64) + none[:, None]
    tl.store(place + queries, any_hit, mask=asked)


def table_size(positives: int) -> int:
    return min(max(512, triton.next_power_of_2(8 * positives)), 16384)


def lay_tables(values: torch.Tensor, count: torch.Tensor, flat: torch.Tensor, slope: float) -> tuple:
    """(low, scale, table) of ``count_tile`` for values (rows, P) float64, falling, of which count (rows,) are."""
    (rows, most), size = values.shape, table_size(values.shape[1])
    there = torch.arange(most, device=values.device) < count[:, None]
    margin = flat[:, None] + slope * values.abs()
    below, above = ((values + sign * margin).float() for sign in (-1, 1))
    last = (count - 1).clamp(min=0)[:, None]
    low = below.gather(1, last).masked_fill(count[:, None] == 0, torch.inf)
    width = above[:, :1] - low
    scale = size / width.nan_to_num(1).clamp(min=1e-30)

    def bins(x):  # in float32 and without a fused operation: as ``count_tile`` has it
        return ((x - low) * scale).clamp(0, size).nan_to_num(0).int().long() + 1

    begin, end = (bins(x.masked_fill(~there, 0)) for x in (below, above))
    table = torch.zeros(2, rows, size + 3, dtype=torch.int32, device=values.device)
    one = there.int()
    table[0].scatter_add_(1, begin, one)
    table[1].copy_(table[0]).scatter_add_(1, end + 1, -one)
    table = table.cumsum(2, dtype=torch.int32)[:, :, : size + 2]
    table = 2 * (count[:, None].int() - table[0]) + (table[1] > 0)
    return low[:, 0], scale[:, 0], table.to(torch.int16 if 2 * most + 1 < 2**15 else torch.int32)


def class_metrics(
    query: torch.Tensor, gallery: torch.Tensor, largest: float, codes: tuple, alone: bool, ks: np.ndarray
) -> np.ndarray:
    """``kernels.row_metrics``' rows for class labels: out (5 + 2 len(ks), Q) float64.

    query (Q, D), gallery (N, D) on one device, largest the gallery's greatest norm; codes: class codes of the
    queries and of the gallery, int64 on that device; alone: leave-one-out, the query's own row counts for nothing.
    """
    device, (queries, dimensions), size = query.device, query.shape, len(gallery)
    gallery, unit = gallery.contiguous(), power_of_two(largest)
    factor = torch.tensor([unit], dtype=torch.float64, device=device)  # as a number it would become float32
    classes = int(torch.cat(codes).max()) + 1
    order = torch.argsort(codes[1], stable=True)
    starts = torch.searchsorted(codes[1][order], torch.arange(classes + 1, device=device))
    most = int((starts[1:] - starts[:-1]).max())
    limits = torch.from_numpy(ks).to(device)
    out = torch.empty(5 + 2 * len(ks), queries, dtype=torch.float64, device=device)
    width = max(1, most)
    step = max(1, BLOCK // max(width, table_size(width)))
    for begin in range(0, queries, step):
        rows = torch.arange(begin, min(begin + step, queries), device=device)
        label = codes[0][rows]
        exact = scaled(query[rows])
        norms = exact.square().sum(1).sqrt().cpu().numpy()
        flat, slope = error_bound(norms, largest * unit, dimensions)
        flat = torch.from_numpy(flat).to(device)
        place = starts[label][:, None] + torch.arange(width, device=device)
        there = place < starts[label + 1][:, None]
        cols = torch.where(there, order[place.clamp(max=size - 1)], -1)
        others = cols.masked_fill(cols == rows[:, None], -1) if alone else cols
        count = (others >= 0).sum(1)
        values = torch.full(cols.shape, -torch.inf, dtype=torch.float64, device=device)
        grid = (triton.cdiv(cols.numel(), 32),)
        pair_scores[grid](
            exact, gallery, others, values, cols.numel(), width, dimensions, factor, PAIRS=32, **EXACT
        )
        values = values.sort(1, descending=True).values
        slots = _count(exact, gallery, factor, cols, count, values, flat, slope)
        part = torch.empty(len(out), len(rows), dtype=torch.float64, device=device)
        row_metrics[(triton.cdiv(len(rows), 32),)](
            slots, count, limits, part, len(rows), width, len(ks), SIZE=32,
            KINDS=triton.next_power_of_2(len(ks)), num_warps=1, **EXACT,
        )  # fmt: skip
        out[:, begin : begin + len(rows)] = part
    return out.cpu().numpy()


def _count(exact, gallery, factor, cols, count, values, flat, slope) -> torch.Tensor:
    """slots (rows, P + 1) int32 of a block of queries, over the whole gallery."""
    device, dimensions, (rows, most) = exact.device, exact.shape[1], values.shape
    low, scale, table = lay_tables(values, count, flat, slope)
    slots = torch.zeros(rows, most + 1, dtype=torch.int32, device=device)
    plain = gallery.dtype == torch.float32 and factor == 1
    columns = min(len(gallery), COLUMNS)
    height = min(rows, max(1, TILE // columns))
    listed = torch.empty(height * columns, dtype=torch.int32, device=device)
    single = exact.float()
    for first in range(0, len(gallery), columns):
        raw = gallery[first : first + columns]
        part = raw if plain else (raw.double() * factor).float()
        for a in range(0, rows, height):
            b = min(a + height, rows)
            tile = single[a:b] @ part.T
            blank[(triton.cdiv((b - a) * most, 256),)](
                tile, cols[a:b], (b - a) * most, most, first, len(raw), SIZE=256
            )
            length = torch.zeros(1, dtype=torch.int32, device=device)
            count_tile[(b - a, triton.cdiv(len(raw), 1024))](
                tile, len(raw), low[a:b], scale[a:b], table[a:b], table.shape[1], values[a:b], most, flat[a:b], slope,
                slots[a:b], listed, length, SIZE=1024, **EXACT,
            )  # fmt: skip
            if left := int(length):
                count_listed[(triton.cdiv(left, 32),)](
                    listed, left, len(raw), first, exact[a:b], gallery, dimensions, factor, values[a:b], most,
                    slots[a:b], STEPS=most.bit_length(), PAIRS=32, **EXACT,
                )  # fmt: skip
    return slots
