"""Layers that several methods share: GeM pooling, the descriptor's last layer, convolution with normalisation.

GeM: Radenovic, Tolias, Chum, "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2019.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GeM(nn.Module):
    """Generalised mean pooling, ``(mean x^p)^(1/p)`` with learned p: (B, C, H, W) -> (B, C), in float32."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().clamp(min=self.eps)
            # exp(p log x) rather than pow: the same value, and its gradient in p needs no second pow
            return (self.p * x.log()).exp().mean(dim=(2, 3)).log().div(self.p).exp()


def descriptor_head(inputs: int, embedding_dim: int) -> nn.Sequential:
    """Linear layer and batch normalisation without affine part: (B, inputs) -> (B, embedding_dim).

    Pooled features share a large common direction at first, so that all descriptors point the same way; centring
    them (the BNNeck of Luo et al., "Bag of tricks and a strong baseline for deep person re-identification", CVPR
    Workshops 2019) lets training from scratch start at once. It adds no parameters.
    """
    return nn.Sequential(
        nn.Linear(inputs, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim, affine=False)
    )


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
