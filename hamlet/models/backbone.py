"""Any timm network as four maps C2..C5 at strides 4, 8, 16 and 32."""

import difflib
import logging
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamlet.errors import HamletError
from hamlet.models.weights import check_tensors, initial_weights

STRIDES = (4, 8, 16, 32)
# what lets a transformer take other sizes than the one it is declared with, the first that a network knows
ANY_SIZE = ({"dynamic_img_size": True, "dynamic_img_pad": True}, {"strict_img_size": False}, {})


class Backbone(nn.Module):
    """Stages C2..C5 of a timm network.

    Args:
        name: a timm model name. Networks with maps at strides 4, 8, 16 and 32 give those; networks of one stride
            (ViT) give four blocks at equal depths, resampled to the four strides.
        pretrained: see ``hamlet.models.weights.initial_weights``.

    ``forward`` maps images (B, 3, H, W) to four maps (B, channels[i], H / strides[i], W / strides[i]),
    rounded up. ``channels`` comes from timm's ``feature_info``: ``num_features`` would be wrong for MobileNetV3.
    ``mean`` and ``std`` are what images must be normalised with; ``initial_weights`` records where they came from.
    """

    def __init__(self, name: str, pretrained: bool | str | Path = False):
        super().__init__()
        if not isinstance(name, str) or not timm.is_model(name):
            known, name = timm.list_models(), str(name)
            near = [n for n in known if n.startswith(name)][:8] or difflib.get_close_matches(name, known, 5)
            raise HamletError(f"timm has no model {name!r}; near it: {', '.join(near) or 'nothing'}")
        self.name = name
        self.initial_weights, self.mean, self.std, state = initial_weights(name, pretrained)
        hub = self.initial_weights["source"] == "hub"
        self.body, self.indices = _features(name, {"state_dict": state} if hub else None)
        if state is not None and not hub:  # timm loads what fits and is silent about the rest
            expected, found = self.body.state_dict(), {_flat(k): v for k, v in state.items()}
            check_tensors({_flat(k): v for k, v in expected.items()}, found, self.initial_weights["tag"])
            self.body.load_state_dict({k: found[_flat(k)] for k in expected})
        info = self.body.feature_info
        self.channels: list[int] = [info.channels()[i] for i in self.indices]
        self.resampled = [info.reduction()[i] for i in self.indices] != list(STRIDES)
        self.channels_last_output = "NHWC" in str(getattr(self.body, "output_fmt", "NCHW"))
        self.native_size: tuple[int, int] = tuple(timm.get_pretrained_cfg(name).input_size[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        try:
            maps = self.body(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            size = tuple(images.shape[2:])
            if size == self.native_size or isinstance(error, torch.OutOfMemoryError):
                raise
            native = " x ".join(map(str, self.native_size))
            raise HamletError(
                f"backbone {self.name} does not take images of {size[0]} x {size[1]} px, "
                f"it is made for {native} px: resize to that, or choose another backbone"
            ) from error
        maps = [maps[i] for i in self.indices]
        if self.channels_last_output:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return [_resample(m, images, s) for m, s in zip(maps, STRIDES, strict=True)] if self.resampled else maps


def _flat(name: str) -> str:
    """timm's extractor writes stages_0.x, or model.stages.0.x, where the network writes stages.0.x."""
    return name.removeprefix("model.").replace(".", "_")


def _resample(x: Tensor, images: Tensor, stride: int) -> Tensor:
    """A map of any stride on the grid that ``stride`` would give: averaged where smaller, bilinear where larger."""
    size = tuple(-(-side // stride) for side in images.shape[2:])
    if size[0] < x.shape[2]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _features(name: str, overlay: dict | None) -> tuple[nn.Module, list[int]]:
    """The network as timm's feature extractor, and which of its maps are C2..C5."""
    body = _create(name, overlay)
    strides = body.feature_info.reduction()
    if set(STRIDES) <= set(strides):
        return body, [strides.index(s) for s in STRIDES]
    depth = len(getattr(body, "model", body).feature_info)
    if len(set(strides)) == 1 and depth >= len(STRIDES):
        return _create(name, overlay, out_indices=[depth * (i + 1) // 4 - 1 for i in range(4)]), [0, 1, 2, 3]
    raise HamletError(
        f"backbone {name} has maps at strides {strides}, expected {STRIDES} or one stride throughout; "
        "choose a convolutional, hierarchical or plain vision transformer network"
    )


def _create(name: str, overlay: dict | None, **options) -> nn.Module:
    # timm warns of the classifier that a feature extractor does not take
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)
    for flexible in ANY_SIZE:
        try:
            return timm.create_model(
                name,
                pretrained=overlay is not None,
                pretrained_cfg_overlay=overlay,
                features_only=True,
                **options,
                **flexible,
            )
        except TypeError:
            continue  # this network does not know the option
        except (RuntimeError, AttributeError, AssertionError, ValueError) as error:
            raise HamletError(f"timm cannot give {name} as maps: {str(error).splitlines()[0]}") from error
    raise HamletError(f"timm cannot give {name} as maps; choose another backbone")
