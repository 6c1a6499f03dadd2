"""The report's seven configurations, four controls, and any of the methods on any timm backbone.

Only SpCa has a published namesake; every other configuration is a re-implementation anchored on the closest
published mechanism, named in its module, and none is "the authors' method".
"""

import difflib
import inspect
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hamlet.models.dscf import DSCF
from hamlet.models.gem import GeMBaseline, MLPBaseline
from hamlet.models.hamlet import HAMLET
from hamlet.models.layers import Backbone, GeM, RetrievalModel, count_parameters
from hamlet.models.mace import MACE
from hamlet.models.sparse import SPARSE
from hamlet.models.spca import SpCa
from hamlet.paths import replacing

__all__ = [
    "Backbone",
    "GeM",
    "RetrievalModel",
    "count_parameters",
    "create_model",
    "list_models",
    "load_model",
    "save_model",
]

METHODS: dict[str, type[RetrievalModel]] = {
    c.method: c for c in (HAMLET, SPARSE, MACE, SpCa, DSCF, GeMBaseline, MLPBaseline)
}
MOBILE = "mobilenetv3_large_100"
# in the report's order, then the controls; widths are chosen to meet Table 2's parameter counts
REGISTRY: dict[str, tuple[str, str, dict]] = {
    "hamlet_resnet18": ("hamlet", "resnet18", {}),
    "hamlet_mobilenetv3": ("hamlet", MOBILE, {"width": 192, "head_width": 2000}),
    "sparse_resnet18": ("sparse", "resnet18", {}),
    "sparse_mobilenetv3": ("sparse", MOBILE, {"width": 384, "separable": True}),
    "mace_resnet18": ("mace", "resnet18", {}),
    "spca_resnet18": ("spca", "resnet18", {}),
    "dscf_resnet18": ("dscf", "resnet18", {}),
    "gem_resnet18": ("gem", "resnet18", {}),
    "gem_mobilenetv3": ("gem", MOBILE, {}),
    "mlp_resnet18": ("mlp", "resnet18", {}),
    "mlp_mobilenetv3": ("mlp", MOBILE, {"head_parameters": 8_640_000}),
}


def list_models() -> list[str]:
    """Names of the seven reported configurations in the report's order, then the controls."""
    return list(REGISTRY)


def create_model(name: str, pretrained: bool = False, **options) -> RetrievalModel:
    """Build a configuration.

    Args:
        name: one of ``list_models()``, or a method (hamlet, sparse, mace, spca, dscf, gem, mlp) together with
            ``backbone="<any timm name>"`` (default resnet18).
        pretrained: load timm's ImageNet weights into the backbone.
        options: the method's own options; they override the registered ones.

    Raises:
        ValueError: unknown name or option, with the valid ones.
    """
    if name in REGISTRY:
        method, backbone, defaults = REGISTRY[name]
    elif name in METHODS:
        method, backbone, defaults = name, "resnet18", {}
    else:
        near = difflib.get_close_matches(name, [*REGISTRY, *METHODS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no model {name!r}{hint} models: {', '.join(REGISTRY)}; methods: {', '.join(METHODS)}"
        )
    cls = METHODS[method]
    valid = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "pretrained")]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}; valid: {', '.join(valid)}")
    return cls(**{"backbone": backbone, **defaults, **options}, pretrained=pretrained)


def save_model(model: RetrievalModel, path: str | Path) -> None:
    """Write weights and the recipe that rebuilds the model to one safetensors file, whole or not at all."""
    path = Path(path)
    recipe = {"method": model.method, "backbone": model.backbone_name, "options": model.options}
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(weights, partial, metadata={"hamlet": json.dumps(recipe, sort_keys=True)})


def load_model(path: str | Path, device: str | torch.device = "cpu") -> RetrievalModel:
    """Rebuild a model written by ``save_model``, in evaluation mode. Nothing is unpickled."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; train them with `python -m hamlet.artifact.run`, see --help"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("hamlet")
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); make it again") from error
    if metadata is None:
        raise ValueError(f"{path} holds no recipe of a hamlet model; expected a file written by save_model")
    recipe = json.loads(metadata)
    model = create_model(recipe["method"], backbone=recipe["backbone"], **recipe["options"])
    model.load_state_dict(weights)
    return model.to(device).eval()
