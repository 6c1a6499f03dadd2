"""The same counting in torch operators, for embeddings that live on a CUDA device (any device works)."""

import numpy as np
import torch

from .scores import error_bound, power_of_two

TILE, ROWS, PAIRS = 32768, 512, 65536


def dot_rows(q: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """``kernels.dot`` row by row: the same sums in the same order, hence the same bits."""
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


class TorchScores:
    def __init__(self, query: torch.Tensor, gallery: torch.Tensor, gallery_norm: float):
        self.query, self.gallery, self.largest = query, gallery, gallery_norm
        self.unit = power_of_two(gallery_norm)

    def load(self, begin: int, end: int) -> None:
        q = self.query[begin:end].double()
        self.exact = torch.ldexp(q, -torch.frexp(q.abs().amax(1, keepdim=True)).exponent)
        norms = self.exact.square().sum(1).sqrt().cpu().numpy()
        flat, self.slope = error_bound(norms, self.largest * self.unit, q.shape[1])
        self.flat = torch.from_numpy(flat).to(q.device)

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
        sure, maybe = (rising + noise).float(), (rising - noise).float()
        width = rising.shape[1] + 1
        beaten = torch.zeros((b - a) * width, dtype=torch.int64, device=device)
        skip = np.repeat(np.arange(b - a), np.diff(skip_ptr[a : b + 1])), skip_idx[skip_ptr[a] : skip_ptr[b]]
        out_rows = torch.from_numpy(np.concatenate([row, skip[0]])).to(device)
        out_cols = torch.from_numpy(np.concatenate([idx[ptr[a] : ptr[b]], skip[1]])).to(device)
        for first in range(0, len(self.gallery), TILE):
            part = self.gallery[first : first + TILE]
            tile = self.exact[a:b].float() @ (part.double() * self.unit).float().T
            here = (out_cols >= first) & (out_cols < first + len(part))
            tile[out_rows[here], out_cols[here] - first] = -torch.inf
            found = torch.searchsorted(sure, tile, right=True)
            r, c = torch.nonzero((torch.searchsorted(maybe, tile, right=True) != found), as_tuple=True)
            for rows, cols in zip(r.split(PAIRS), c.split(PAIRS), strict=True):
                score = self._pairs(rows + a, cols + first)
                found[rows, cols] = count_at_most(rising, rows, score)
            found += torch.arange(b - a, device=device)[:, None] * width
            beaten += torch.bincount(found.flatten(), minlength=len(beaten))
        beaten = beaten.view(b - a, width).cpu().numpy()
        for i in range(b - a):  # beaten[i, c]: negatives that beat or tie exactly the c lowest positives
            start = ptr[a + i] + a + i
            ahead[start : start + count[i] + 1] += beaten[i, : count[i] + 1][::-1]
