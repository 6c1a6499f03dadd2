"""Controls that the report lacks: GeM + linear, and GeM + an MLP with as many parameters as HAMLET's head."""

import math

from torch import Tensor, nn

from hamlet.models.layers import GeM, RetrievalModel, descriptor_head


class GeMBaseline(RetrievalModel):
    """GeM pooling of C5 and one linear layer: what the backbone alone can do.

    ``text=True`` adds the projection to the text teacher's space, for the control trained with captions.
    """

    method = "gem"

    def __init__(
        self,
        backbone: str = "resnet18",
        pretrained: bool = False,
        embedding_dim: int = 512,
        text: bool = False,
        text_dim: int = 384,
    ):
        super().__init__(backbone, pretrained, embedding_dim=embedding_dim, text=text, text_dim=text_dim)
        self.embedding_dim = embedding_dim
        self.pool = GeM()
        self.head = descriptor_head(self.backbone.channels[-1], embedding_dim)
        self.text_projection = nn.Linear(embedding_dim, text_dim) if text else None

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.head(self.pool(maps[-1])), {}


class MLPBaseline(RetrievalModel):
    """GeM pooling of C5 and a three-layer perceptron with ``head_parameters`` weights: capacity without structure."""

    method = "mlp"

    def __init__(
        self,
        backbone: str = "resnet18",
        pretrained: bool = False,
        embedding_dim: int = 512,
        head_parameters: int = 14_620_000,
    ):
        super().__init__(backbone, pretrained, embedding_dim=embedding_dim, head_parameters=head_parameters)
        self.embedding_dim = embedding_dim
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

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.head(self.pool(maps[-1])), {}
