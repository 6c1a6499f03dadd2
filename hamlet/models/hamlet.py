"""HAMLET: tokens of four backbone stages, refined by adaptive cross-scale attention, in one descriptor.

Anchored on what ``hamlet.models.acsa`` names, on DELG (Cao, Araujo, Sim, ECCV 2020) and DOLG (Yang et al., ICCV 2021:
local attention beside the global descriptor), and for training with text on Roth, Vinyals, Akata (CVPR 2022) and RKD
(Park et al., CVPR 2019). Widths are chosen to meet the report's parameter counts.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.errors import HamletError
from hamlet.models.acsa import Block, Kept, LevelLinear, TokenKeeper, compact
from hamlet.models.base import Range, RetrievalModel, register
from hamlet.models.layers import GeM, descriptor_head

SUBCELLS = (4, 4, 2, 1)  # sub-cells per side of a token's cell in C2..C5


@register(
    resnet18={}, mobilenetv3={"width": 192, "head_width": 1772}, efficientnetlite0={"width": 192, "head_width": 2984}
)
class HAMLET(RetrievalModel):
    """Hierarchical adaptive embedding transformer; text supervises training alone.

    Args:
        width: channels of a token; depth: number of ACSA blocks; heads: attention heads, a divisor of width.
        expansion: hidden channels of the feed-forward, in multiples of width.
        grid: largest number of token rows and columns; smaller images have C4's own grid. (C5's, at 64 px four
            cells in place of sixteen, reached little more than half the mAP on scenes' validation classes.)
        head_width: hidden width of the two-layer perceptron that makes the descriptor; its last layer sees GeM of C5
            beside it, as in MACE and SpCa, since the layers before it start at random. Feed-forwards of 9.5 widths
            would use up the same parameters at twice the arithmetic per token.
        keep_ratio: share of cells kept on average over a training batch; 1.0 drops nothing, without a predictor.
        ratio_weight: weight of the ratio loss ``(mean mask - keep_ratio)^2`` over the whole batch.
        levels: how many of the maps C2..C5 make tokens, from C5 down; 1 is C5 alone, without local features.
        exchange: False cuts the attention between levels; gate: False leaves all levels equally weighted.
        layer_scale: initial scale of each block's updates, and of what the tokens add to C5. At 0.1 training of a few
            hundred steps leaves it there, and the blocks do next to nothing (notebook 09).
        embedding_dim: size of the descriptor.

    ``static_tokens`` (attribute, also in force under torch.export) masks dropped tokens in place of leaving them out:
    the same descriptor at the full cost, for tools that need fixed shapes.
    """

    method = "hamlet"
    text_default = "alignment"  # part of the parameters that the report counts

    def build(
        self,
        width: int = 256,
        depth: int = 2,
        heads: int = 8,
        expansion: Annotated[float, Range(0.1)] = 4.0,
        grid: int = 6,
        keep_ratio: Annotated[float, Range(0.01, 1)] = 0.7,
        ratio_weight: float = 10.0,
        levels: Annotated[int, Range(1, 4)] = 4,
        exchange: bool = True,
        gate: bool = True,
        layer_scale: float = 0.1,
        head_width: int = 3554,
        embedding_dim: int = 512,
    ) -> None:
        if width % heads:
            raise HamletError(f"hamlet: width={width}, expected a multiple of heads={heads}")
        self.static_tokens = False
        channels = self.backbone.channels[-levels:]
        # one average over a cell of C2..C4 would lose its layout, so that the lateral sees its sub-cells
        sides = zip(channels, SUBCELLS[-levels:], strict=True)
        self.laterals = nn.ModuleList(nn.Linear(c * s * s, width) for c, s in sides)
        self.position = nn.Linear(16, width)
        self.level = nn.Parameter(torch.randn(levels, width) * 0.02)
        self.keeper = TokenKeeper(levels, width) if keep_ratio < 1 else None
        self.blocks = nn.ModuleList(
            Block(levels, width, heads, round(expansion * width), layer_scale, exchange=exchange, gate=gate)
            for _ in range(depth)
        )
        self.to_c5 = nn.Linear(width, channels[-1])
        self.plain_pool, self.pool = GeM(), GeM()
        self.local = LevelLinear(levels - 1, width, 1)
        self.perceptron = nn.Sequential(nn.Linear(channels[-1] + (levels - 1) * width, head_width), nn.GELU())
        self.head = descriptor_head(head_width + channels[-1], embedding_dim)
        with torch.no_grad():  # starts close to plain GeM pooling of C5, yet with gradients for every block
            self.to_c5.weight.mul_(layer_scale)
            self.to_c5.bias.zero_()

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """What images (B, 3, H, W) make the model do in evaluation mode.

        ``gates`` (B, depth, levels, levels): weight that a level's queries (row) give to each level (column), rows sum
        to one, absent without gate; ``keep`` (B, rows, columns) bool: computed cells.
        """
        training, seen = self.training, {}
        self.eval()
        try:
            self.embed(self.backbone(images), seen)
        finally:
            self.train(training)
        return seen

    def embed(self, maps: list[Tensor], seen: dict | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        grid = tuple(min(self.options["grid"], side) for side in maps[-2].shape[2:])
        tokens = self._tokens(maps, grid)
        place = self.level[:, None, None] + self.position(position_code(grid, tokens))
        losses, kept = {}, Kept(grid)
        keep = tokens.new_ones(tokens.shape[1:3])
        x = tokens + place
        if self.keeper is not None:
            keep = self.keeper(tokens)
            losses["ratio"] = self.options["ratio_weight"] * (keep.mean() - self.options["keep_ratio"]).square()
            if self.training or self.static_tokens or torch.compiler.is_exporting():
                kept = Kept(grid, keep)
            else:
                x, kept = compact(x, grid, keep)
        gates = []
        for block in self.blocks:
            x, gate = block(x, kept)
            gates.append(gate)
        x = F.layer_norm(x, x.shape[-1:])
        # average pooling takes cells to pixels too: a pixel gets the mean of the cells that cover it
        update = kept.scatter(self.to_c5(x[-1]))
        refined = maps[-1] + F.adaptive_avg_pool2d(update, maps[-1].shape[2:])
        pooled = self.pool(refined)
        # DELG-style attention pooling of C2..C4's tokens; of C2's too, whose last block would else have no effect
        x = x[:-1]
        weights = F.softplus(self.local(x).float())
        if kept.mask is not None:
            weights = weights * kept.mask[None, :, :, None]
        local = (weights * x).sum(2) / weights.sum(2).clamp(min=1e-6)
        features = torch.cat([pooled, local.transpose(0, 1).flatten(1)], 1)
        features = torch.cat([self.plain_pool(maps[-1]), self.perceptron(features)], 1)
        if seen is not None:
            seen["keep"] = keep.bool().unflatten(1, grid)
            seen |= {} if gates[0] is None else {"gates": torch.stack(gates, 1)}
        return self.head(features), losses

    def _tokens(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Maps C2..C5 -> normalised tokens (4, B, cells, width)."""
        levels, (rows, columns) = len(self.laterals), grid
        tokens = []
        for lateral, x, s in zip(self.laterals, maps[-levels:], SUBCELLS[-levels:], strict=True):
            x = F.adaptive_avg_pool2d(x, (rows * s, columns * s)).unflatten(3, (columns, s)).unflatten(2, (rows, s))
            tokens.append(lateral(x.permute(0, 2, 4, 1, 3, 5).flatten(3)).flatten(1, 2))
        tokens = torch.stack(tokens)
        return F.layer_norm(tokens, tokens.shape[-1:])


def position_code(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Sines and cosines of cell centres in (-1, 1), four octaves per axis: (cells, 16), for any grid."""
    axes = [(torch.arange(n, device=like.device, dtype=torch.float32) * 2 + 1) / n - 1 for n in grid]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
    angles = (centres[:, :, None] * (math.pi / 2) * 2.0 ** torch.arange(4, device=like.device)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], 1)
