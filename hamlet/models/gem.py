"""Controls that the report lacks: GeM + linear, and GeM + an MLP with as many parameters as HAMLET's head."""

import math

from torch import Tensor, nn

from hamlet.models.base import RetrievalModel, register
from hamlet.models.layers import GeM, descriptor_head


@register(resnet18={}, mobilenetv3={}, efficientnetlite0={})
class GeMBaseline(RetrievalModel):
    """GeM pooling of C5 and one linear layer: what the backbone alone can do."""

    method = "gem"

    def build(self, embedding_dim: int = 512) -> None:
        self.pool = GeM()
        self.head = descriptor_head(self.backbone.channels[-1], embedding_dim)

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.head(self.pool(maps[-1])), {}


@register(resnet18={}, mobilenetv3={"head_parameters": 8_640_000}, efficientnetlite0={"head_parameters": 8_640_000})
class MLPBaseline(GeMBaseline):
    """GeM pooling of C5 and a three-layer perceptron with ``head_parameters`` weights: capacity without structure."""

    method = "mlp"

    def build(self, embedding_dim: int = 512, head_parameters: int = 14_620_000) -> None:
        channels = self.backbone.channels[-1]
        # weights and biases of channels -> h -> h -> embedding_dim: h^2 + (channels + embedding_dim + 2) h
        b = channels + embedding_dim + 2
        hidden = round((math.sqrt(b * b + 4 * head_parameters) - b) / 2)
        self.pool = GeM()
        self.head = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            descriptor_head(hidden, embedding_dim),
        )
