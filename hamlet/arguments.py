"""Arguments of the metrics, checked at the door, and what is relevant to a query as boolean CSR matrices.

Labels become Python integers and strings before they are compared: no data type can make two of them one. Every
error names the argument and the first wrong row.
"""

from numbers import Integral, Real

import numpy as np
import scipy.sparse
import torch

from hamlet.errors import HamletError

Csr = scipy.sparse.csr_array


def number(name: str, value, low: float, high: float) -> float:
    """A finite number from ``low`` to ``high``."""
    if isinstance(value, bool | np.bool) or not isinstance(value, Real) or not low <= value <= high:
        raise HamletError(f"{name}: expected a number from {low} to {high}, got {value!r}")
    return float(value)


def whole_number(name: str, value, least: int = 1) -> int:
    """A whole number from ``least``, below 2**31."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value < 2**31:
        raise HamletError(f"{name}: expected a whole number (an integer from {least}), got {value!r}")
    return int(value)


def cutoffs(ks) -> list[int]:
    """The k of P@k and R@k."""
    if isinstance(ks, str) or not hasattr(ks, "__len__") or not len(ks):
        raise HamletError(f"ks: expected several whole numbers such as (1, 5, 10), got {ks!r}")
    return [whole_number("ks", k) for k in ks]


def rows(values, name: str) -> tuple[np.ndarray | Csr | torch.Tensor, np.ndarray]:
    """A (rows, D) matrix, dense, sparse or on a card, and the norms of its rows, float64."""
    if torch.is_tensor(values):
        values = values.detach()
        if values.layout != torch.strided:
            part = values.to_sparse_coo().coalesce().cpu()
            values = Csr((part.values().double().numpy(), part.indices().numpy()), tuple(part.shape))
        elif not values.is_cuda:
            values = (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()
    if not torch.is_tensor(values) and not scipy.sparse.issparse(values):
        try:
            values = np.asarray(values)
        except ValueError:
            raise HamletError(f"{name}: expected rows of one length, (rows, dimensions)") from None
    kind = "c" if torch.is_tensor(values) and values.is_complex() else getattr(values.dtype, "kind", "f")
    if kind not in "fiub" and str(values.dtype) != "bfloat16":
        raise HamletError(f"{name}: expected real numbers, got dtype {values.dtype}")
    if values.ndim != 2 or values.shape[1] == 0:
        shape = tuple(values.shape)
        raise HamletError(f"{name}: expected shape (rows, dimensions) with a dimension at least, got {shape}")
    values = Csr(values) if scipy.sparse.issparse(values) else values
    norms, filled = np.empty(values.shape[0]), False
    for start in range(0, len(norms), step := max(1, 2**20 // values.shape[1])):
        part = values[start : start + step]
        part = part.cpu().double().numpy() if torch.is_tensor(part) else part.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            norms[start : start + step] = np.sqrt((part * part).sum(axis=1))
        filled |= (part != 0).sum() > 0
    if not (norms < 1e100).all():
        row = int(np.argmin(norms < 1e100))
        raise HamletError(f"{name}: row {row} holds NaN, infinity or values beyond 1e100; remove or fix it")
    if filled and norms.max() < 1e-100:
        raise HamletError(f"{name}: all norms are below 1e-100, where products vanish; scale the rows up")
    return values, norms


def embeddings(query, gallery) -> tuple:
    """Rows of both sides (leave-one-out: of the one), and per query its norm times the largest of the gallery."""
    q, norms = rows(query, "query")
    g, others = (q, norms) if gallery is None else rows(gallery, "gallery")
    if q.shape[1] != g.shape[1]:
        raise HamletError(f"query has {q.shape[1]} dimensions, gallery {g.shape[1]}; expected the same")
    if torch.is_tensor(q) != torch.is_tensor(g):
        raise HamletError("query and gallery: one is on a CUDA device, the other is not; move both there")
    return q, g, norms * others.max(initial=0)


def one_hot(query, gallery, names: tuple[str, str], of, several: bool = True) -> list[Csr]:
    """Labels of both sides as boolean matrices (rows, labels) with common columns; of: their scores."""
    if of.alone != (gallery is None):
        raise HamletError(f"{names[1]}: {'given without a gallery' if of.alone else 'missing for the gallery'}")
    sides = [_labels(query, names[0], of.shape[0], several)]
    sides += [] if of.alone else [_labels(gallery, names[1], of.shape[1], several)]
    if len(forms := sorted({form for form, flat, _ in sides if flat})) > 1:
        raise HamletError(f"{' and '.join(names)}: cannot compare {' with '.join(forms)}; pass the same kind")
    known = {label: column for column, label in enumerate(dict.fromkeys(x for side in sides for x in side[1]))}
    hot = []
    for _, flat, ends in sides:
        columns, size = np.array([known[label] for label in flat], np.int64), (len(ends) - 1, max(1, len(known)))
        hot.append(Csr((np.ones(len(flat), bool), columns, ends), size))
    return hot if len(hot) == 2 else hot * 2


def tree(fine: tuple, coarse: tuple, of) -> list[list[Csr]]:
    """``one_hot`` of (queries', gallery's) fine classes and of coarse ones, one a row."""
    both = {"fine": fine, "coarse": coarse}
    levels = [one_hot(*labels, (name, f"gallery_{name}"), of, several=False) for name, labels in both.items()]
    pairs = [np.concatenate([side.indices for side in hot]) for hot in levels]
    if len(np.unique(pairs[0])) != np.unique(pairs, axis=1).shape[1]:
        raise HamletError("coarse: one fine class lies in two coarse classes; expected a tree")
    return levels


def cameras(values, of) -> list[np.ndarray] | None:
    """Camera codes of queries and gallery, from one sequence in leave-one-out or a pair with a gallery."""
    if values is None:
        return None
    pair, names = ((values, None), ("cameras", "")) if of.alone else (values, ("cameras[0]", "cameras[1]"))
    if not isinstance(pair, tuple | list) or len(pair) != 2 or any(map(np.isscalar, pair)):
        raise HamletError("cameras: with a gallery, expected a pair (codes of the queries, codes of the gallery)")
    return [hot.indices for hot in one_hot(*pair, names, of, several=False)]


def difficulties(truth, shape: tuple[int, int]) -> dict[str, Csr]:
    """The revisited sets' ground truth, a dict of index lists per query, as "easy", "hard" and "junk" matrices."""
    keys = ("easy", "hard", "junk")
    if not isinstance(truth, list | tuple) or any(not isinstance(t, dict) or not {*keys} <= {*t} for t in truth):
        raise HamletError(f'query_labels: expected {shape[0]} dicts with "easy", "hard", "junk" index lists')
    out = {key: listed([t[key] for t in truth], shape, f"query_labels, {key}") for key in keys}
    where = np.argwhere(sum(matrix.astype(np.int8) for matrix in out.values()).toarray() > 1)
    if len(where):
        row, index = where[0]
        raise HamletError(f"query_labels: query {row} lists gallery index {index} twice among easy, hard, junk")
    return out


def listed(values, shape: tuple[int, int], name: str) -> Csr:
    """Gallery indices of each query, as lists or as a 0/1 matrix, as a boolean (Q, N) matrix."""
    if _is_matrix(values):
        matrix = _indicator(values, name)
        if matrix.shape != shape:
            raise HamletError(f"{name}: expected index lists or a 0/1 matrix of shape {shape}, got {matrix.shape}")
        return matrix
    lists = _items(values, name, shape[0])
    for i, x in enumerate(lists):
        if not isinstance(x, list) or not all(type(j) is int and 0 <= j < shape[1] for j in x):
            raise HamletError(f"{name}: query {i}: expected gallery indices 0..{shape[1] - 1}, got {x!s:.50}")
        if len(x) == shape[1] > len({*x}):
            raise HamletError(f"{name}: query {i} repeats indices; pass a 0/1 mask as an array")
    flat, ends = [j for x in lists for j in sorted({*x})], np.cumsum([0, *(len({*x}) for x in lists)])
    return Csr((np.ones(len(flat), bool), np.array(flat, np.int64), ends), shape)


def _labels(values, name: str, count: int, several: bool) -> tuple[str, list, np.ndarray]:
    """(kind of labels, all of them as Python objects, where each row's begin)."""
    if _is_matrix(values):
        if not several or values.shape[1] == 1:
            wanted = "pass one column, labels[:, 0], for one label a row"
            raise HamletError(f"{name}: shape {tuple(values.shape)}; {wanted}")
        hot = _indicator(values, name)
        _same_length(hot.shape[0], count, name)
        return f"a 0/1 matrix of {hot.shape[1]} labels", hot.indices.tolist(), hot.indptr
    items = flat = _items(values, name, count)
    ends = np.arange(count + 1)
    if sets := any(isinstance(x, list) for x in items):
        for i, x in enumerate(items):
            if not several or not isinstance(x, list) or any(isinstance(y, list) for y in x) or len({*x}) < len(x):
                wanted = "in every row a collection of distinct labels" if several else "one label a row"
                raise HamletError(f"{name}: row {i} is {x!s:.50}; expected {wanted} (a 0/1 matrix as an array)")
        flat, ends = [label for x in items for label in x], np.cumsum([0, *map(len, items)])
    kind = next((k for k in (str, bytes) if flat and isinstance(flat[0], k)), int)
    exact = 2 / _spacing(values)  # from here on a float stands for several integers
    for i, x in enumerate(flat):
        whole_float = kind is int and isinstance(x, float) and x.is_integer() and abs(x) < exact
        if not (isinstance(x, kind) or whole_float):
            row = np.searchsorted(ends, i, "right") - 1
            wanted = "integers that their type holds exactly, or strings alone"
            raise HamletError(f"{name}: row {row} is {x!s:.50}; expected {wanted}")
    return f"{'sets of' if sets else 'single'} labels ({kind.__name__})", flat, ends


def _items(values, name: str, count: int) -> list:
    """A sequence as Python objects, one for each row; collections in it as lists."""
    if np.ma.is_masked(values):
        raise HamletError(f"{name}: some labels are masked; fill them or drop these rows")
    values = plain(values.to_numpy() if hasattr(values, "to_numpy") else values)
    if not isinstance(values, list):
        raise HamletError(f"{name}: expected one for each of {count} rows, got {type(values).__name__}")
    _same_length(len(values), count, name)
    return values


def plain(value):
    """Arrays, tensors and collections, one in the other, as lists of Python objects."""
    if isinstance(value, list | tuple | set | frozenset) or getattr(value, "dtype", None) == np.object_:
        return [plain(x) for x in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def _same_length(given: int, count: int, name: str) -> None:
    if given != count:
        raise HamletError(f"{name}: {given} for {count} rows; expected one each")


def _spacing(values) -> float:
    """Distance from 1 to the next number of this type; of Python's floats where there is no other."""
    if torch.is_tensor(values):
        return torch.finfo(values.dtype).eps if values.is_floating_point() else 2.0**-52
    kind = getattr(getattr(values, "dtype", None), "numpy_dtype", getattr(values, "dtype", None))
    return float(np.finfo(kind).eps) if getattr(kind, "kind", "") == "f" else 2.0**-52


def _is_matrix(values) -> bool:
    return scipy.sparse.issparse(values) or getattr(values, "ndim", 0) == 2


def _indicator(values, name: str) -> Csr:
    """A 0/1 matrix, dense or sparse, as booleans."""
    values = values.detach().cpu().to_dense().numpy() if torch.is_tensor(values) else values
    values = values if scipy.sparse.issparse(values) else np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise HamletError(f"{name}: expected a matrix of 0 and 1, got dtype {values.dtype}")
    values = Csr(values)
    wrong = np.flatnonzero((values.data != 0) & (values.data != 1))
    if len(wrong):
        row = np.searchsorted(values.indptr, wrong[0], "right") - 1
        raise HamletError(f"{name}: row {row} holds {values.data[wrong[0]]}; expected 0 and 1 alone")
    values = values.astype(bool)
    values.eliminate_zeros()
    return values
