"""DSCF, dynamic spatial context fusion: depthwise kernels made from the image, per-pixel fusion of levels.

Anchored on DMNet (He, Deng, Qiao, "Dynamic multi-scale filters for semantic segmentation", ICCV 2019) and ASFF (Liu,
Huang, Wang, "Learning spatial fusion for single-shot object detection", 2019), written from their equations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.errors import HamletError
from hamlet.models.base import RetrievalModel, register
from hamlet.models.layers import GeM, conv_bn, descriptor_head


def depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """Each image's own depthwise filter: x (B, C, H, W), kernels (B, C, k, k), k odd -> (B, C, H, W)."""
    batch, channels, height, width = x.shape
    size = kernels.shape[-1]
    if size == 1:  # a product, which the grouped convolution takes many times longer to compute in float32
        return x * kernels
    # one group per image and channel; contiguous() first, because a channels_last view cannot be folded
    folded = x.contiguous().view(1, batch * channels, height, width)
    weight = kernels.contiguous().view(batch * channels, 1, size, size)
    out = F.conv2d(folded, weight, padding=size // 2, groups=batch * channels)
    return out.view(batch, channels, height, width)


class DynamicFilter(nn.Module):
    """Size k: ``z = ReLU(BN(psi(X) * W))`` with the depthwise kernel ``W = Conv1x1(AdaptiveAvgPool_k X)``."""

    def __init__(self, channels: int, width: int, size: int):
        super().__init__()
        self.size = size
        self.generate = nn.Conv2d(channels, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def kernels(self, x: Tensor) -> Tensor:
        """C5 (B, channels, H, W) -> one kernel per image and channel, (B, width, k, k)."""
        return self.generate(F.adaptive_avg_pool2d(x, self.size))

    def forward(self, x: Tensor, psi: Tensor) -> Tensor:
        return F.relu(self.norm(depthwise(psi, self.kernels(x))))


class PixelFusion(nn.Module):
    """Softmax over levels at every pixel: L maps (B, C, H, W) of one grid -> weighted sum (B, C, H, W)."""

    def __init__(self, levels: int, channels: int, compressed: int = 16):
        super().__init__()
        self.compress = nn.ModuleList(nn.Conv2d(channels, compressed, 1) for _ in range(levels))
        self.mix = nn.Conv2d(levels * compressed, levels, 1)

    def weights(self, maps: list[Tensor]) -> Tensor:
        """(B, levels, H, W), summing to 1 over levels at every pixel."""
        compressed = [layer(x) for layer, x in zip(self.compress, maps, strict=True)]
        return self.mix(torch.cat(compressed, dim=1)).softmax(dim=1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        weights = self.weights(maps)
        return sum(weights[:, i : i + 1] * x for i, x in enumerate(maps))


@register(resnet18={}, efficientnetlite0={"width": 285})
class DSCF(RetrievalModel):
    """Dynamic filters on C5, fused per pixel with C3 and C4 on C4's grid, GeM, linear.

    The linear layer sees GeM of C5 beside GeM of the fused map, as MACE's does. ``width`` = 474 meets the report's
    24.25 M parameters on ResNet18; 285 meets 13.07 M x 8.64 / 14.62 on EfficientNet-Lite0 (see MACE).
    """

    method = "dscf"

    def build(self, embedding_dim: int = 512, width: int = 474, sizes: tuple[int, ...] = (1, 3, 5, 7)) -> None:
        if any(s % 2 == 0 for s in sizes):
            raise HamletError(f"dscf: sizes={tuple(sizes)}, expected odd kernel sizes such as (1, 3, 5, 7)")
        c3, c4, c5 = self.backbone.channels[1:]
        self.psi = conv_bn(c5, width)
        self.filters = nn.ModuleList(DynamicFilter(c5, width, s) for s in sizes)
        self.merge = conv_bn(c5 + len(sizes) * width, 512, kernel=3)
        self.lateral3, self.lateral4 = conv_bn(c3, 512), conv_bn(c4, 512)
        self.fusion = PixelFusion(levels=3, channels=512)
        self.plain_pool, self.pool = GeM(), GeM()
        self.head = descriptor_head(c5 + 512, embedding_dim)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """C2..C5 -> C3, C4 and the filtered C5, each (B, 512, H4, W4)."""
        _, c3, c4, c5 = maps
        psi = self.psi(c5)
        filtered = self.merge(torch.cat([c5, *(layer(c5, psi) for layer in self.filters)], dim=1))
        grid = c4.shape[2:]
        coarse = F.interpolate(filtered, size=grid, mode="bilinear", align_corners=False)
        return [self.lateral3(F.adaptive_avg_pool2d(c3, grid)), self.lateral4(c4), coarse]

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        fused = self.fusion(self.levels(maps))
        return self.head(torch.cat([self.plain_pool(maps[-1]), self.pool(fused)], dim=1)), {}
