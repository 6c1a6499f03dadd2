"""Adaptive cross-scale attention (ACSA): levels exchange tokens through a gate, empty cells are not computed.

Anchors: one softmax over the tokens of all levels is Deformable DETR's (Zhu et al., ICLR 2021), exchange between scales
CrossViT's (Chen, Fan, Panda, ICCV 2021), per-image token keeping DynamicViT's (Rao et al., NeurIPS 2021).

Tokens are (L, B, n, d): L levels, B images, n cells of one grid that all levels share, d channels. Every level has
weights of its own, stacked so that the levels run as one batched product. The levels decide together which cells are
kept: then all hold equally many tokens and the product of one image has no padding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Kept:
    """Which cells of a (rows, columns) grid the tokens stand for.

    mask: (B, n), 1 for a kept cell and 0 for a dropped one or for padding; None: every cell is kept.
    index: (B, n) int64, each token's cell, rows * columns for padding; None: token k is cell k.
    """

    grid: tuple[int, int]
    mask: Tensor | None = None
    index: Tensor | None = None

    def gather(self, tokens: Tensor) -> Tensor:
        """Cells (B, rows * columns, c) -> the kept ones (B, n, c); padding repeats the last cell."""
        if self.index is None:
            return tokens
        index = self.index.clamp(max=tokens.shape[1] - 1)
        return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))

    def scatter(self, tokens: Tensor) -> Tensor:
        """Kept cells (B, n, c) -> the grid (B, c, rows, columns), channels last, zero in dropped cells."""
        rows, columns = self.grid
        if self.mask is not None:
            tokens = tokens * self.mask[..., None].to(tokens.dtype)
        if self.index is not None:
            b, _, c = tokens.shape
            padding = 0 if self.mask is None else 1  # one more row takes the padding
            cells = tokens.new_zeros(b, rows * columns + padding, c)
            cells.scatter_(1, self.index[..., None].expand_as(tokens), tokens)
            tokens = cells[:, : rows * columns]
        return tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)

    def mean(self, tokens: Tensor) -> Tensor:
        """Mean of (L, B, n, c) over kept cells -> (L, B, c)."""
        if self.mask is None:
            return tokens.mean(2)
        mask = self.mask[None, :, :, None]
        return (tokens * mask).sum(2) / mask.sum(2)


class LevelLinear(nn.Module):
    """A linear layer per level in one batched product: (L, B, n, inputs) -> (L, B, n, outputs)."""

    def __init__(self, levels: int, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(levels, inputs, outputs) * gain * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(levels, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.bias[:, None].to(x.dtype), x.flatten(1, 2), self.weight)
        return y.unflatten(1, x.shape[1:3])


class CrossScaleAttention(nn.Module):
    """Each level's queries attend over the kept tokens of all levels, weighted by the image's own gate.

    ``logits = q k / sqrt(d_h) + log g[level of q, level of k]``, ``g_i = softmax(W_i mean(x_i))`` over levels.
    exchange=False cuts the levels apart: each sees its own tokens, and a gate would have nothing to weigh.
    """

    def __init__(self, levels: int, width: int, heads: int, exchange: bool = True, gate: bool = True):
        super().__init__()
        self.heads = heads
        self.exchange = exchange
        self.qkv = LevelLinear(levels, width, 3 * width)
        self.out = LevelLinear(levels, width, width)
        self.gate = LevelLinear(levels, width, levels, gain=0.5) if gate and exchange and levels > 1 else None

    def forward(self, x: Tensor, kept: Kept) -> tuple[Tensor, Tensor | None]:
        """x (L, B, n, d) -> the update (L, B, n, d) and the gate (B, L, L), whose rows sum to one."""
        levels, b, n, d = x.shape
        qkv = self.qkv(x).reshape(levels, b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(3, 1, 4, 0, 2, 5).flatten(3, 4).unbind(0)  # (B, heads, L * n, d_h)
        q, gate = q * q.shape[-1] ** -0.5, None
        if self.gate is not None:
            log_gate = self.gate(kept.mean(x)[:, :, None]).float().log_softmax(-1)[:, :, 0].transpose(0, 1)
            gate = log_gate.exp()
            # log g joins the product: L more entries of q hold it, and k's pick the key's level
            level = torch.eye(levels, dtype=k.dtype, device=x.device).repeat_interleave(n, 0)
            weights = log_gate.to(q.dtype).repeat_interleave(n, 1)[:, None].expand(-1, self.heads, -1, -1)
            q = torch.cat([q, weights], -1)
            k = torch.cat([k, level.expand(*k.shape[:3], levels)], -1)
        logits = (q @ k.transpose(-2, -1)).float()
        if not self.exchange:
            level = torch.arange(levels, device=x.device).repeat_interleave(n)
            logits = logits.masked_fill(level[:, None] != level, -math.inf)
        mixed = _attend(logits, v, kept.mask, levels)
        return self.out(mixed.unflatten(2, (levels, n)).permute(2, 0, 3, 1, 4).flatten(3)), gate


def _attend(logits: Tensor, v: Tensor, mask: Tensor | None, levels: int) -> Tensor:
    """Softmax of (B, heads, L * n, L * n) over the kept keys, times v; mask (B, n) holds for every level."""
    if mask is None:
        return logits.softmax(-1).to(v.dtype) @ v
    mask = mask.repeat(1, levels)[:, None, None]
    if not mask.requires_grad:
        return logits.masked_fill(mask == 0, -math.inf).softmax(-1).to(v.dtype) @ v
    # a product, so that the mask learns which dropped tokens were missed; divided after the product with v, the smaller
    weights = logits.softmax(-1).to(v.dtype) * mask.to(v.dtype)
    return (weights @ v) / weights.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=1e-6).to(v.dtype)


class ConvFeedForward(nn.Module):
    """Linear, depthwise 3x3 on each level's grid, GELU, Linear: (L, B, n, d) -> (L, B, n, d).

    Both products run on kept tokens alone. The 3x3, about 2% of the arithmetic, sees zeros in dropped cells.
    """

    def __init__(self, levels: int, width: int, hidden: int):
        super().__init__()
        self.expand = LevelLinear(levels, width, hidden)
        self.mix = nn.Conv2d(levels * hidden, levels * hidden, 3, padding=1, groups=levels * hidden)
        self.contract = LevelLinear(levels, hidden, width)
        with torch.no_grad():  # starts near the identity: a random 3x3 would blur the tokens
            self.mix.weight.mul_(0.1)[:, :, 1, 1] += 1.0
            self.mix.bias.zero_()

    def forward(self, x: Tensor, kept: Kept) -> Tensor:
        h = self.expand(x)
        levels = h.shape[0]
        grid = self.mix(kept.scatter(h.permute(1, 2, 0, 3).flatten(2)))
        h = kept.gather(grid.permute(0, 2, 3, 1).flatten(1, 2))
        return self.contract(F.gelu(h.unflatten(2, (levels, -1)).permute(2, 0, 1, 3)))


class Block(nn.Module):
    """Pre-norm ACSA block: gated exchange between levels, then the convolutional feed-forward."""

    def __init__(self, levels: int, width: int, heads: int, hidden: int, scale: float, **options):
        super().__init__()
        self.attention = CrossScaleAttention(levels, width, heads, **options)
        self.feed_forward = ConvFeedForward(levels, width, hidden)
        self.scale = nn.Parameter(torch.full((2, levels, width), float(scale)))  # LayerScale

    def forward(self, x: Tensor, kept: Kept) -> tuple[Tensor, Tensor | None]:
        # no affine part in the norms: it would be absorbed by the linear layer that follows
        update, gate = self.attention(F.layer_norm(x, x.shape[-1:]), kept)
        scale = self.scale[:, :, None, None]
        x = x + scale[0] * update
        return x + scale[1] * self.feed_forward(F.layer_norm(x, x.shape[-1:]), kept), gate


class TokenKeeper(nn.Module):
    """Scores the grid's cells from all levels' tokens and keeps those above zero, at least one per image.

    A cell's logit is a linear function of how far its token departs from the image's mean token on each level (relative
    to the image's mean departure, in logarithm) plus a small network on the tokens: flat areas score low before any
    training. Training draws a straight-through binary Gumbel-softmax mask (Jang, Gu, Poole, ICLR 2017) from torch's
    global generator; evaluation draws nothing. Tokens are detached: the keeper's noise does not reach the backbone.
    """

    def __init__(self, levels: int, width: int):
        super().__init__()
        self.evidence = nn.Linear(2 * levels, 1)
        self.hidden = LevelLinear(levels, width, width // 4)
        self.score = LevelLinear(levels, width // 4, 1, gain=0.1)
        with torch.no_grad():
            self.evidence.weight.copy_(torch.tensor([1.5 / levels] * levels + [0.0] * levels))
            self.evidence.bias.fill_(0.45)

    def logits(self, tokens: Tensor) -> Tensor:
        """Normalised tokens (L, B, cells, d) -> (B, cells), in float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.detach().float()
            departure = (tokens - tokens.mean(2, keepdim=True)).square().mean(-1)
            typical = departure.mean(-1, keepdim=True)
            relative = ((departure + 1e-6) / (typical + 1e-3)).log()
            level = (typical + 1e-3).log().expand_as(relative)
            evidence = self.evidence(torch.cat([relative, level]).permute(1, 2, 0)).squeeze(-1)
            content = self.score(F.gelu(self.hidden(tokens))).squeeze(-1).sum(0)
            # the factor lets logits outgrow the noise, and reach the ratio, within a few hundred Adam steps
            return 8.0 * (evidence + content)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalised tokens (L, B, cells, d) -> mask (B, cells) of zeros and ones, with gradients in training."""
        logits = self.logits(tokens)
        best = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
        if not self.training:
            return ((logits > 0) | best).float()
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        soft = (logits + u.log() - (1 - u).log()).sigmoid()
        return ((soft > 0.5) | best).float() + soft - soft.detach()


def compact(tokens: Tensor, grid: tuple[int, int], mask: Tensor) -> tuple[Tensor, Kept]:
    """Leave dropped cells out: tokens (L, B, cells, d), mask (B, cells) -> kept (L, B, n, d) and their cells.

    n is the largest count in the batch; images with fewer are padded, and the padding is masked.
    """
    counts = mask.sum(1).long()
    n = int(counts.max())
    if n * len(mask) == int(counts.sum()) == mask.numel():
        return tokens, Kept(grid)  # every cell of every image
    order = mask.argsort(dim=1, descending=True, stable=True)[:, :n]
    valid = torch.arange(n, device=mask.device) < counts[:, None]
    index = order.masked_fill(~valid, tokens.shape[2])
    kept = tokens.gather(2, order[None, :, :, None].expand(len(tokens), -1, -1, tokens.shape[3]))
    return kept, Kept(grid, None if bool(valid.all()) else valid.float(), index)
