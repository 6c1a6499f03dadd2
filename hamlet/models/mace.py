"""MACE, multi-scale adaptive context: every position attends to region averages at four scales.

Re-implementation anchored on APCNet: He, Deng, Zhou, Wang, Qiao, "Adaptive pyramid context network for
semantic segmentation", CVPR 2019, written from its equations. No publication of the name MACE with this
expansion was found. The width is chosen to meet the parameter count that the report gives for MACE_ResNet18.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.models.layers import GeM, RetrievalModel, descriptor_head


class Convolution(nn.Conv2d):
    """Convolution at the same size that trains as one product where a CPU meets maps of a few cells.

    There a 3x3 convolution of 2000 channels takes up to three times as long as the same product.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        size, pad = self.kernel_size[0], self.padding[0]
        if size == 1 or not self.training or x.device.type != "cpu" or rows * columns > 9:
            return super().forward(x)
        cells = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1).unfold(1, size, 1).unfold(2, size, 1)
        cells = cells.permute(0, 1, 2, 4, 5, 3).flatten(3)  # (B, rows, columns, size * size * inputs)
        return F.linear(cells, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


def conv_bn(inputs: int, outputs: int, kernel: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution at the same size, batch normalisation and, unless told otherwise, ReLU."""
    layers = [Convolution(inputs, outputs, kernel), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class AdaptiveContext(nn.Module):
    """One scale s: ``z = f(ReLU(rho(alpha y) + psi(X)))``.

    y are the s x s region averages of X, and alpha = sigmoid(conv(psi + g(mean psi))) is each position's
    attention to them, steered by the whole image. No batch normalisation stands on the pooled maps: at s = 1
    it would see one value an image.
    """

    def __init__(self, channels: int, width: int, scale: int):
        super().__init__()
        self.scale = scale
        self.phi = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU())
        self.summary = nn.Conv2d(width, width, 1)
        self.affinity = nn.Conv2d(width, scale * scale, 1)
        self.rho = conv_bn(width, width, relu=False)
        self.fuse = conv_bn(width, width)

    def attention(self, psi: Tensor) -> Tensor:
        """psi (B, width, H, W) -> (B, s^2, H, W) in (0, 1), each position's attention to each region."""
        return self.affinity(psi + self.summary(psi.mean(dim=(2, 3), keepdim=True))).sigmoid()

    def forward(self, x: Tensor, psi: Tensor) -> Tensor:
        regions = self.phi(F.adaptive_avg_pool2d(x, self.scale)).flatten(2)  # (B, width, s^2)
        context = (regions @ self.attention(psi).flatten(2)).unflatten(2, psi.shape[2:])
        return self.fuse(F.relu(self.rho(context) + psi))


class MACE(RetrievalModel):
    """Adaptive context of C5 at scales 1, 2, 3, 6, concatenated with C5, 3x3 convolution, GeM, linear.

    ``width`` = 412 meets the report's 24.51 M parameters on ResNet18 with psi shared by the scales.
    """

    method = "mace"

    def __init__(
        self,
        backbone: str = "resnet18",
        pretrained: bool = False,
        embedding_dim: int = 512,
        width: int = 412,
        scales: tuple[int, ...] = (1, 2, 3, 6),
    ):
        super().__init__(backbone, pretrained, embedding_dim=embedding_dim, width=width, scales=list(scales))
        if not scales or min(scales) < 1:
            raise ValueError(f"scales are {tuple(scales)}, expected positive grid sizes such as (1, 2, 3, 6)")
        self.embedding_dim = embedding_dim
        channels = self.backbone.channels[-1]
        self.psi = conv_bn(channels, width)
        self.contexts = nn.ModuleList(AdaptiveContext(channels, width, s) for s in scales)
        self.merge = conv_bn(channels + len(scales) * width, 512, kernel=3)
        self.pool = GeM()
        self.head = descriptor_head(512, embedding_dim)

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x = maps[-1]
        psi = self.psi(x)
        merged = self.merge(torch.cat([x, *(context(x, psi) for context in self.contexts)], dim=1))
        return self.head(self.pool(merged)), {}
