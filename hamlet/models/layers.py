"""What every configuration shares: a timm backbone's stages C2..C5, GeM pooling and the descriptor's contract.

GeM: Radenovic, Tolias, Chum, "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2019.
"""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """Stages C2..C5 of any timm network with ``features_only``.

    Args:
        name: a timm model name whose feature pyramid has strides 4, 8, 16 and 32.
        pretrained: load timm's weights (needs network access or timm's cache).

    ``forward`` maps images (B, 3, H, W) to four maps (B, channels[i], H / strides[i], W / strides[i]),
    rounded up. ``channels`` comes from timm's ``feature_info``: ``num_features`` would be wrong for MobileNetV3.
    """

    def __init__(self, name: str, pretrained: bool = False):
        super().__init__()
        probe = _features(name, pretrained=False).feature_info
        indices = [i for i, stride in enumerate(probe.reduction()) if stride in STRIDES]
        if [probe.reduction()[i] for i in indices] != list(STRIDES):
            raise ValueError(
                f"backbone {name!r} has strides {probe.reduction()}, expected one stage at each of {STRIDES}; "
                "choose a convolutional or hierarchical network such as resnet18, mobilenetv3_large_100 or swin_tiny"
            )
        self.name = name
        self.body = _features(name, pretrained=pretrained, out_indices=indices)
        self.channels: list[int] = self.body.feature_info.channels()
        self.channels_last_output = getattr(self.body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body(images)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last_output else list(maps)


def _features(name: str, pretrained: bool, **options) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ValueError(f"timm has no model {name!r}; near it: {', '.join(near) or 'nothing'}")
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"timm cannot give {name!r} as a feature pyramid: {error}") from error


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


class RetrievalModel(nn.Module):
    """Base of all configurations: images in, L2-normalised descriptors out.

    Subclasses set ``method`` and ``embedding_dim`` and implement ``embed``. ``text_projection`` is a Linear
    from the descriptor to the text teacher's space where a configuration has one.
    """

    method: str = ""
    embedding_dim: int = 512

    def __init__(self, backbone: str, pretrained: bool = False, **options):
        super().__init__()
        self.backbone = Backbone(backbone, pretrained)
        self.backbone_name = backbone
        self.options = options
        self.float32_backbone = False  # under autocast: the backbone alone stays in float32
        # not a class attribute: that would hide a module registered under the same name
        self.text_projection: nn.Module | None = None

    @property
    def descriptor_bytes(self) -> int:
        """Bytes of one stored descriptor: float32 values."""
        return 4 * self.embedding_dim

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Maps C2..C5 -> descriptor (B, D) before normalisation, and weighted auxiliary losses (scalars)."""
        raise NotImplementedError

    def forward(self, images: Tensor, auxiliary: bool = False):
        """Images float (B, 3, H, W), ImageNet-normalised, 64 to 512 px a side -> descriptors float32 (B, D).

        With ``auxiliary`` also the dictionary of the configuration's own weighted losses.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < 64:
            raise ValueError(
                f"images are {tuple(images.shape[2:])} px, expected at least 64 px a side; resize them"
            )
        kind = images.device.type
        mixed = torch.is_autocast_enabled(kind) and not self.float32_backbone
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=mixed):
            maps = self.backbone(images)
        embedding, losses = self.embed(maps)
        embedding = F.normalize(embedding.float(), dim=1)
        return (embedding, losses) if auxiliary else embedding


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trained or frozen: backbone + head (+ text projection)."""
    return sum(p.numel() for p in model.parameters())
