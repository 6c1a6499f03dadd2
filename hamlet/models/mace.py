"""MACE, multi-scale adaptive context: every position attends to region averages at four scales.

Anchored on APCNet (He, Deng, Zhou, Wang, Qiao, "Adaptive pyramid context network for semantic segmentation", CVPR
2019), written from its equations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.models.base import RetrievalModel, register
from hamlet.models.layers import GeM, conv_bn, descriptor_head


class AdaptiveContext(nn.Module):
    """One scale s: ``z = f(ReLU(rho(alpha y) + psi(X)))``.

    y are the s x s region averages of X, and alpha = sigmoid(conv(psi + g(mean psi))) is each position's attention to
    them. No batch normalisation stands on the pooled maps: at s = 1 it would see one value an image.
    """

    def __init__(self, channels: int, width: int, scale: int):
        super().__init__()
        self.scale = scale
        self.phi = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU())
        self.summary = nn.Conv2d(width, width, 1)
        self.affinity = nn.Conv2d(width, scale * scale, 1)
        self.rho = conv_bn(width, width)[:2]  # its ReLU follows the sum with psi
        self.fuse = conv_bn(width, width)

    def attention(self, psi: Tensor) -> Tensor:
        """psi (B, width, H, W) -> (B, s^2, H, W) in (0, 1), each position's attention to each region."""
        return self.affinity(psi + self.summary(psi.mean(dim=(2, 3), keepdim=True))).sigmoid()

    def forward(self, x: Tensor, psi: Tensor) -> Tensor:
        regions = self.phi(F.adaptive_avg_pool2d(x, self.scale)).flatten(2)  # (B, width, s^2)
        context = (regions @ self.attention(psi).flatten(2)).unflatten(2, psi.shape[2:])
        return self.fuse(F.relu(self.rho(context) + psi))


@register(resnet18={}, efficientnetlite0={"width": 258})
class MACE(RetrievalModel):
    """Adaptive context of C5 at scales 1, 2, 3, 6, concatenated with C5, 3x3 convolution, GeM, linear.

    The linear layer sees GeM of C5 beside GeM of the convolution: the convolution starts at random, and alone it
    would stand between the backbone's features and the descriptor. ``width`` = 404 meets the report's 24.51 M
    parameters on ResNet18 with psi shared by the scales; 258 meets 13.33 M x 8.64 / 14.62, the report's head on
    ResNet18 scaled as HAMLET's is from ResNet18 to MobileNetV3, on EfficientNet-Lite0.
    """

    method = "mace"

    def build(self, embedding_dim: int = 512, width: int = 404, scales: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        channels = self.backbone.channels[-1]
        self.psi = conv_bn(channels, width)
        self.contexts = nn.ModuleList(AdaptiveContext(channels, width, s) for s in scales)
        self.merge = conv_bn(channels + len(scales) * width, 512, kernel=3)
        self.plain_pool, self.pool = GeM(), GeM()
        self.head = descriptor_head(channels + 512, embedding_dim)

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = maps[-1]
        psi = self.psi(x)
        merged = self.merge(torch.cat([x, *(context(x, psi) for context in self.contexts)], dim=1))
        return self.head(torch.cat([self.plain_pool(x), self.pool(merged)], dim=1)), {}
