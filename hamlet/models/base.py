"""What makes a class a method: its base, the line that registers it, and one check of every option.

A method is one file with a class that has ``method``, ``build`` and ``embed``, and one ``@register`` line::

    @register(resnet18={}, mobilenetv3={"width": 192})
    class Mine(RetrievalModel):
        method = "mine"

        def build(self, embedding_dim: int = 512, width: int = 256): ...   # make the layers
        def embed(self, maps): ...                                          # C2..C5 -> descriptor, losses

Outside this package, name the module in the entry-point group ``hamlet.models``; nothing else is needed.
"""

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.errors import HamletError
from hamlet.models.backbone import Backbone
from hamlet.models.files import HubModel

BACKBONES = {
    "resnet18": "resnet18",
    "mobilenetv3": "mobilenetv3_large_100",
    "efficientnetlite0": "tf_efficientnet_lite0",
}
METHODS: dict[str, type["RetrievalModel"]] = {}
REGISTRY: dict[str, tuple[str, str, dict]] = {}  # configuration -> method, timm name, options


def register(**forms: dict) -> Callable[[type], type]:
    """Announce a method and its configurations ``<method>_<backbone>``, each with the options that differ."""

    def announce(cls: type["RetrievalModel"]) -> type["RetrievalModel"]:
        known = METHODS.setdefault(cls.method, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise HamletError(f"method {cls.method!r} of {cls.__module__} is taken by {known.__module__}")
        METHODS[cls.method] = cls
        for backbone, options in forms.items():
            REGISTRY[f"{cls.method}_{backbone}"] = (cls.method, BACKBONES.get(backbone, backbone), options)
        return cls

    return announce


@dataclass(frozen=True)
class Range:
    """Bounds of an option, in its annotation: ``Annotated[float, Range(0, 1)]``; int defaults to at least 1."""

    low: float
    high: float = math.inf


class RetrievalModel(nn.Module, HubModel):
    """Base of all configurations: images in, L2-normalised descriptors out.

    Args:
        backbone, pretrained: see ``Backbone``.
        text: what captions train. "alignment" adds ``text_projection`` Linear(D, text_dim), from the descriptor to
            the text teacher's space; "proxies" adds ``text_tower`` Linear(text_dim, D), from there to the
            descriptor's space; "both" adds both, None neither. Inference from images uses none of them.
        text_dim: dimension of the text teacher's space.
        options: those of the subclass's ``build``.

    ``mean``, ``std``: normalisation of images scaled to 0..1. ``initial_weights``: source, tag and sha256.
    """

    method: str = ""
    text_default: str | None = None
    embedding_dim: int = 512

    def __init__(self, backbone: str = "resnet18", pretrained: bool | str | Path = False, **options):
        super().__init__()
        self.options = checked_options(type(self), options)
        self.backbone = Backbone(backbone, pretrained)
        self.backbone_name = backbone
        self.mean, self.std = self.backbone.mean, self.backbone.std
        self.initial_weights = self.backbone.initial_weights
        self.card: dict = {}  # what is known of a trained model, see hamlet.models.files
        self.float32_backbone = False  # under autocast: the backbone alone stays in float32
        own = {k: v for k, v in self.options.items() if k not in COMMON}
        self.embedding_dim = own.get("embedding_dim", self.embedding_dim)
        self.build(**own)
        text, dim = self.options["text"], self.options["text_dim"]
        self.text_projection = nn.Linear(self.embedding_dim, dim) if text in ("alignment", "both") else None
        self.text_tower = None
        if text in ("proxies", "both"):
            self.text_tower = nn.Linear(dim, self.embedding_dim, bias=False)
            self.register_buffer("text_mean", torch.zeros(dim))  # of the training captions, taken off first

    def build(self) -> None:
        """Make the layers from ``self.backbone.channels``; every argument has a default and an annotation."""
        raise NotImplementedError

    def embed(self, maps: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Maps C2..C5 -> descriptor (B, D) before normalisation, and weighted auxiliary losses (scalars)."""
        raise NotImplementedError

    @property
    def descriptor_bytes(self) -> int:
        """Bytes of one stored descriptor: float32 values."""
        return 4 * self.embedding_dim

    def forward(self, images: Tensor, auxiliary: bool = False):
        """Images float (B, 3, H, W), normalised by ``mean`` and ``std``, 64 px a side or more -> (B, D) float32.

        With ``auxiliary`` also the dictionary of the configuration's own weighted losses.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise HamletError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < 64:
            raise HamletError(f"images are {tuple(images.shape[2:])} px, expected at least 64 px a side; resize them")
        kind = images.device.type
        mixed = torch.is_autocast_enabled(kind) and not self.float32_backbone
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=mixed):
            maps = self.backbone(images)
        embedding, losses = self.embed(maps)
        embedding = F.normalize(embedding.float(), dim=1)
        return (embedding, losses) if auxiliary else embedding


def _common(text: Literal[None, "alignment", "proxies", "both"] = None, text_dim: int = 384) -> None:
    """The options that every method has."""


COMMON = inspect.signature(_common).parameters


def checked_options(cls: type[RetrievalModel], given: dict) -> dict:
    """All options of a method, defaults filled in, each checked against its annotation; values JSON can hold."""
    own = list(inspect.signature(cls.build, eval_str=True).parameters.values())[1:]
    known = {p.name: p for p in own} | COMMON
    if unknown := sorted(set(given) - set(known)):
        valid = ", ".join(["backbone", "pretrained", *known])
        raise HamletError(f"{cls.method} has no option {', '.join(unknown)}; valid: {valid}")
    values = {name: p.default for name, p in known.items()} | {"text": cls.text_default} | given
    return {name: _checked(f"{cls.method}: {name}", values[name], p.annotation) for name, p in known.items()}


def _checked(where: str, value: object, annotation: object, bounds: Range | None = None) -> object:
    kind = get_origin(annotation)
    if kind is Annotated:
        inner, *extra = get_args(annotation)
        return _checked(where, value, inner, next((e for e in extra if isinstance(e, Range)), bounds))
    if kind is Literal:
        expected, right = f"one of {get_args(annotation)}", value in get_args(annotation)
    elif kind is tuple:
        if isinstance(value, list | tuple) and len(value):
            return [_checked(where, v, get_args(annotation)[0], bounds) for v in value]
        expected, right = "a sequence of whole numbers such as (1, 2, 3), not an empty one", False
    elif annotation is bool:
        expected, right = "True or False", isinstance(value, bool)
    elif annotation in (int, float):
        bounds = bounds or Range(1 if annotation is int else 0)
        wanted = numbers.Integral if annotation is int else numbers.Real
        number = isinstance(value, wanted) and not isinstance(value, bool)
        right = number and math.isfinite(value) and bounds.low <= value <= bounds.high
        most = "" if bounds.high == math.inf else f" and at most {bounds.high}"
        expected = f"a {'whole ' * (annotation is int)}number of at least {bounds.low}{most}"
        value = annotation(value) if right else value
    else:  # a method from outside may annotate as it likes; it then checks for itself
        right, expected = True, ""
    if not right:
        raise HamletError(f"{where}={value!r}, expected {expected}")
    return value


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trained or frozen: backbone + head (+ text projection)."""
    return sum(p.numel() for p in model.parameters())
