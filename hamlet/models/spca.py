"""SpCa, spatial context aggregation: which visual tokens lie around each position, at three ranges.

Anchored on Zhang, Wang, Zhou, Koniusz, "Learning spatial-context-aware global visual feature representation for
instance image retrieval", ICCV 2023, written from its equations; the widths are not taken from that paper.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.errors import HamletError
from hamlet.models.base import RetrievalModel, register
from hamlet.models.layers import GeM, descriptor_head


def spatial_affinity(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Affinity of cells m and n, ``exp(-|p_m - p_n|)`` with p in cells, each column normalised to sum 1.

    float32 (N, N), N = height * width, cells in row-major order: ``values @ affinity`` averages over surroundings.
    """
    cells = torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device)).float()
    affinity = torch.exp(-(cells[:, None] - cells).square().sum(-1).sqrt())
    return affinity / affinity.sum(dim=0, keepdim=True)


class TokenContext(nn.Module):
    """Soft assignment of positions to token prototypes, then spread over the grid at ranges 1, 2, 3.

    Maps (B, channels, H, W) -> (B, N, ranges * tokens) float32: row n says how much of each token lies around
    position n. Computed in float32 under autocast too, since squared distances lose their digits in bfloat16.
    """

    def __init__(self, channels: int, tokens: int = 16, token_dim: int = 128, ranges: int = 3):
        super().__init__()
        self.ranges = ranges
        self.reduce = nn.Conv2d(channels, token_dim, 1)
        self.prototypes = nn.Parameter(torch.randn(tokens, token_dim))
        self.weight_logits = nn.Parameter(torch.zeros(tokens))
        # x . c spreads by about sqrt(token_dim) on unit-variance inputs: the logits start at order one
        self.raw_variance = nn.Parameter(torch.full((tokens,), math.log(math.expm1(math.sqrt(token_dim)))))
        self.norm = nn.LayerNorm(ranges * tokens)

    def assign(self, x: Tensor) -> Tensor:
        """Features (B, N, token_dim) -> assignments (B, N, tokens), each position's summing to 1."""
        centres = F.layer_norm(self.prototypes, self.prototypes.shape[1:])
        variance = F.softplus(self.raw_variance) + 1e-4
        distance = x.square().sum(-1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(-1)
        logits = self.weight_logits.log_softmax(0) - 0.5 * variance.log() - distance / (2 * variance)
        return logits.softmax(dim=-1)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        x = self.reduce(maps).flatten(2).transpose(1, 2)
        with torch.autocast(maps.device.type, enabled=False):
            assignment = self.assign(x.float())
            # mean 1 over positions rather than sum 1, so that LayerNorm's epsilon is as small against 256 cells as 4
            share = assignment / assignment.mean(dim=1, keepdim=True).clamp(min=1e-6)
            affinity = spatial_affinity(height, width, maps.device)
            contexts = [share.transpose(1, 2) @ affinity]
            for _ in range(self.ranges):  # A^(b+1), b = 1, 2, 3
                contexts.append(contexts[-1] @ affinity)
            return self.norm(torch.cat(contexts[1:], dim=1).transpose(1, 2))


class ContextAttention(nn.Module):
    """Multi-head attention of positions (B, N, D) over their context descriptors (B, N, D)."""

    def __init__(self, width: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # a bias shifts all logits of a query alike: no effect
        # the block starts as the identity, so the backbone learns from the first step as it does without it
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, positions: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, positions), (self.key, context), (self.value, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@register(resnet18={}, efficientnetlite0={"width": 896, "hidden": 1744})
class SpCa(RetrievalModel):
    """C5 widened to D, fused with its spatial context, GeM, linear.

    width: D, a multiple of 8 (the attention heads); hidden: width of the position-wise perceptron. The linear layer
    sees GeM of C5 beside GeM of the fused map: the anchor fuses the backbone's own features, which the widening
    replaces. The defaults meet the report's 23.74 M parameters on ResNet18; D = 896 and hidden 1744 meet 12.56 M x
    8.64 / 14.62 on EfficientNet-Lite0 (see MACE).
    """

    method = "spca"

    def build(self, embedding_dim: int = 512, width: int = 1184, hidden: int = 2216, tokens: int = 16) -> None:
        if width % 8:
            raise HamletError(f"spca: width={width}, expected a multiple of 8, the number of attention heads")
        self.widen = nn.Sequential(
            nn.Conv2d(self.backbone.channels[-1], width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.context = TokenContext(width, tokens)
        self.project = nn.Linear(self.context.ranges * tokens, width)
        self.norm = nn.LayerNorm(width)
        self.attention = ContextAttention(width)
        # normalised input and small scales: without them Adam's equal steps in a wide layer that starts at zero
        # overwhelm the backbone's features within a few updates
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        self.scale = nn.Parameter(torch.full((2, width), 0.1))
        self.plain_pool, self.pool = GeM(), GeM()
        self.head = descriptor_head(self.backbone.channels[-1] + width, embedding_dim)

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        grid = self.widen(maps[-1])
        context = self.project(self.context(grid))
        positions = grid.flatten(2).transpose(1, 2)
        fused = positions + self.scale[0] * self.attention(self.norm(positions), context)
        fused = fused + self.scale[1] * self.mlp(fused)
        fused = fused.transpose(1, 2).unflatten(2, grid.shape[2:])
        return self.head(torch.cat([self.plain_pool(maps[-1]), self.pool(fused)], dim=1)), {}
