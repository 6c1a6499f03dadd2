"""The same counting in torch operators, for embeddings that live on a CUDA device (any device works)."""

import importlib.util
import warnings

import numpy as np
import torch

from . import relevance
from .scores import error_bound, power_of_two

TILE, ROWS, PAIRS = 32768, 512, 65536


def dot_rows(q: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``dots.dot`` row by row: the same sums in the same order, hence the same bits."""
    lanes = torch.zeros(len(q), 8, dtype=torch.float64, device=q.device)
    end = q.shape[1] // 8 * 8
    for i in range(0, end, 8):
        lanes += q[:, i : i + 8] * g[:, i : i + 8].double()
    for i in range(end, q.shape[1]):
        lanes[:, 0] += q[:, i] * g[:, i].double()
    a, b, c, d, e, f, h, k = lanes.unbind(1)
    return ((a + e) + (c + h)) + ((b + f) + (d + k))


def count_at_most(rising: torch.Tensor, rows: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """How many entries of ``rising[rows[i]]``, which rise, are <= bound[i]: a bisection for all i at once."""
    found, step = torch.zeros_like(rows), 1 << (rising.shape[1].bit_length() - 1)
    while step:
        probe = (found + step).clamp(max=rising.shape[1])
        found = torch.where(rising[rows, probe - 1] <= bound, probe, found)
        step //= 2
    return found


def unsure_intervals(maybe: torch.Tensor, sure: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds, passed) of the scores that a filter cannot decide; maybe, sure (rows, P) float32, both rising.

    A score s surely beats or ties the positives with sure <= s, and none but those with maybe <= s. bounds
    (rows, 2 P) are the begins and ends of disjoint intervals, rising (infinity fills up): with an odd number of
    them <= s the score is unsure, with 2 j it passes exactly the passed[:, j] lowest positives.
    """
    rows, most = maybe.shape
    edge = torch.ones(rows, 1, dtype=torch.bool, device=maybe.device)
    apart = maybe[:, 1:] > sure[:, :-1]  # intervals that touch become one
    begins = maybe.masked_fill(~torch.cat([edge, apart], 1), torch.inf)
    last = torch.cat([apart, edge], 1)
    ends = sure.masked_fill(~last, torch.inf)
    place = torch.arange(1, most + 1, device=maybe.device).expand(rows, most)
    passed = place.masked_fill(~last, most).sort(1).values
    return torch.cat([begins, ends], 1).sort(1).values, torch.nn.functional.pad(passed, (1, 0))


def scaled(rows: torch.Tensor) -> torch.Tensor:
    """Rows as float64, each times the power of two that brings its largest value into [0.5, 1): nothing rounds.

    The factors are written as bits: a card's power function need not be exact."""
    rows = rows.double()
    exponent = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent.long()
    half = exponent.div(2, rounding_mode="floor")  # in two steps, as 2**1074 is no float64
    for step in (half, exponent - half):
        rows = rows * ((1023 - step) << 52).view(torch.float64)
    return rows


class TorchScores:
    def __init__(self, query: torch.Tensor, gallery: torch.Tensor, gallery_norm: float):
        self.query, self.gallery, self.largest = query, gallery, gallery_norm
        self.unit = power_of_two(gallery_norm)

    def fused(self) -> bool:
        """Whether the kernels of ``triton_counts`` can run: on a card, where Triton came with torch."""
        return self.query.is_cuda and importlib.util.find_spec("triton") is not None

    def class_metrics(self, labels: tuple, alone: bool, ks: np.ndarray) -> np.ndarray | None:
        """``triton_counts.class_metrics``; None, with a warning, where this card does not run it."""
        from . import triton_counts

        on_device = [torch.is_tensor(x) and x.device == self.query.device for x in labels]
        if all(on_device) and labels[0].dtype == labels[1].dtype and not labels[0].is_floating_point():
            codes = torch.unique(torch.cat([x.flatten() for x in labels]), return_inverse=True)[1]
            codes = codes.split([len(x) for x in labels])
        else:
            codes = tuple(torch.from_numpy(c).to(self.query.device) for c in relevance.class_codes(*labels))
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would break the error bound
        try:
            return triton_counts.class_metrics(self.query, self.gallery, self.largest, codes, alone, ks)
        except Exception as error:  # whatever a new card or driver brings: the other code gives the same bits
            warnings.warn(f"slower operators take over, the Triton kernels failed: {error!r}", stacklevel=4)
            return None
        finally:
            torch.set_float32_matmul_precision(precision)

    def load(self, begin: int, end: int) -> None:
        self.exact = scaled(self.query[begin:end])
        norms = self.exact.square().sum(1).sqrt().cpu().numpy()
        flat, self.slope = error_bound(norms, self.largest * self.unit, self.exact.shape[1])
        self.flat = torch.from_numpy(flat).to(self.exact.device)

    def _pairs(self, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        parts = zip(rows.split(PAIRS), cols.split(PAIRS), strict=True)
        return torch.cat([dot_rows(self.exact[r], self.gallery[c]) for r, c in parts]) * self.unit

    def pairs(self, ptr: np.ndarray, idx: np.ndarray) -> np.ndarray:
        rows = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
        device = self.exact.device
        return self._pairs(torch.from_numpy(rows).to(device), torch.from_numpy(idx).to(device)).cpu().numpy()

    def add_ahead(self, lists: tuple, values: np.ndarray, ahead: np.ndarray, pool, threads: int) -> None:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would break the error bound
        try:
            for a in range(0, len(self.exact), ROWS):
                self._add_rows(a, min(a + ROWS, len(self.exact)), lists, values, ahead)
        finally:
            torch.set_float32_matmul_precision(precision)

    def _add_rows(self, a: int, b: int, lists: tuple, values: np.ndarray, ahead: np.ndarray) -> None:
        ptr, idx, skip_ptr, skip_idx = lists
        count = np.diff(ptr[a : b + 1])
        row = np.repeat(np.arange(b - a), count)
        place = np.arange(ptr[a], ptr[b]) - np.repeat(ptr[a:b], count)
        device = self.exact.device
        rising = np.full((b - a, max(1, count.max())), np.inf)  # slot t from the end: values fall, these rise
        rising[row, count[row] - 1 - place] = values[ptr[a] : ptr[b]]
        rising = torch.from_numpy(rising).to(device)
        noise = self.flat[a:b, None] + self.slope * rising.abs().nan_to_num(posinf=0)
        bounds, passed = unsure_intervals((rising - noise).float(), (rising + noise).float())
        width = rising.shape[1] + 1
        beaten = torch.zeros(b - a, width, dtype=torch.int64, device=device)
        codes = torch.zeros((b - a) * (bounds.shape[1] + 1), dtype=torch.int64, device=device)
        row_code = (torch.arange(b - a, device=device) * (bounds.shape[1] + 1))[:, None].int()
        skip = np.repeat(np.arange(b - a), np.diff(skip_ptr[a : b + 1])), skip_idx[skip_ptr[a] : skip_ptr[b]]
        out_rows = torch.from_numpy(np.concatenate([row, skip[0]])).to(device)
        out_cols = torch.from_numpy(np.concatenate([idx[ptr[a] : ptr[b]], skip[1]])).to(device)
        query = self.exact[a:b].float()
        for first in range(0, len(self.gallery), TILE):
            part = self.gallery[first : first + TILE]
            plain = part.dtype == torch.float32 and self.unit == 1
            tile = query @ (part if plain else (part.double() * self.unit).float()).T
            here = (out_cols >= first) & (out_cols < first + len(part))
            tile[out_rows[here], out_cols[here] - first] = -torch.inf
            code = torch.searchsorted(bounds, tile, right=True, out_int32=True)
            r, c = torch.nonzero(code & 1, as_tuple=True)
            for rows, cols in zip(r.split(PAIRS), c.split(PAIRS), strict=True):
                found = count_at_most(rising, rows, self._pairs(rows + a, cols + first))
                beaten.view(-1).index_add_(0, rows * width + found, torch.ones_like(found))
            codes += torch.bincount(code.add_(row_code).flatten(), minlength=len(codes))
        beaten.scatter_add_(1, passed, codes.view(b - a, -1)[:, ::2])  # the items between two intervals
        beaten = beaten.cpu().numpy()
        for i in range(b - a):  # beaten[i, c]: negatives that beat or tie exactly the c lowest positives
            start = ptr[a + i] + a + i
            ahead[start : start + count[i] + 1] += beaten[i, : count[i] + 1][::-1]
