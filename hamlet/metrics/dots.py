"""The exact score of a pair of vectors, compiled: a float64 inner product summed in one fixed order."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

AHEAD = 4  # rows asked for before they are needed: a lone pair mostly waits for its row
LINE, LINES = 64, 16  # bytes of a cache line; lines asked for: beyond, the processor asks by itself


def compiled(function):
    """``njit`` with an on-disk cache where some cache folder is writable, without one otherwise."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba: "no locator available" (read-only install and no writable home)
        return njit(nogil=True)(function)


@intrinsic
def _eight_sums(typing, q, g, end):
    """The eight partial sums of ``dot`` over the first ``end`` entries, a multiple of 8, as a tuple.

    Written as one loop over vectors of eight: numba keeps eight scalar sums apart, at a third of the speed."""

    def build(context, builder, signature, args):
        wide = ir.VectorType(ir.DoubleType(), 8)
        total = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * 8))
        arrays = [(t.dtype, context.make_array(t)(context, builder, x).data)
                  for t, x in zip(signature.args[:2], args[:2], strict=True)]  # fmt: skip
        zero, eight = args[2].type(0), args[2].type(8)
        with cgutils.for_range_slice(builder, zero, args[2], eight) as (i, _):
            parts = []
            for kind, data in arrays:
                vector = ir.VectorType(context.get_data_type(kind), 8)
                place = builder.bitcast(builder.gep(data, [i]), vector.as_pointer())
                part = builder.load(place, align=kind.bitwidth // 8)
                parts.append(part if vector == wide else builder.fpext(part, wide))
            builder.store(builder.fadd(builder.load(total), builder.fmul(*parts)), total)
        total = builder.load(total)
        lanes = [builder.extract_element(total, ir.IntType(32)(k)) for k in range(8)]
        return context.make_tuple(builder, signature.return_type, lanes)

    return types.UniTuple(types.float64, 8)(q, g, end), build


@compiled
def dot(q, g):
    """Inner product in float64: eight interleaved partial sums, added pairwise. Same bits at every call.

    q (D,) float64, g (D,) float32 or float64, both contiguous."""
    end = q.shape[0] // 8 * 8
    a, b, c, d, e, f, h, k = _eight_sums(q, g, end)
    for i in range(end, q.shape[0]):
        a += q[i] * g[i]
    return ((a + e) + (c + h)) + ((b + f) + (d + k))


@intrinsic
def _ask_for(typing, array, index):
    """Have the processor fetch the cache line of ``array[index]``; no effect but on time."""

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(fetch, [place, *(ir.Constant(number, x) for x in (0, 3, 1))])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp), build


@compiled
def _ask_for_row(flat, row, dimensions):
    step = LINE // flat.itemsize
    for k in range(0, min(dimensions, LINES * step), step):
        _ask_for(flat, row * dimensions + k)


@compiled
def dot_pairs(query, query_rows, gallery, gallery_rows, out):
    """``out[i] = dot(query[query_rows[i]], gallery[gallery_rows[i]])``; gallery contiguous."""
    flat = gallery.reshape(-1)
    for i in range(out.shape[0]):
        if i + AHEAD < out.shape[0]:
            _ask_for_row(flat, gallery_rows[i + AHEAD], gallery.shape[1])
        out[i] = dot(query[query_rows[i]], gallery[gallery_rows[i]])


@compiled
def dot_rows(q, gallery, unit, rows, count, out):
    """``out[t] = dot(q, gallery[rows[t]]) * unit`` for t < count; gallery contiguous."""
    flat = gallery.reshape(-1)
    for t in range(count):
        if t + AHEAD < count:
            _ask_for_row(flat, np.int64(rows[t + AHEAD]), gallery.shape[1])
        out[t] = dot(q, gallery[rows[t]]) * unit
