"""One file holds a model and all that is needed to use it: weights, recipe, normalisation and a card.

The file is safetensors; nothing is unpickled. The card is a dictionary of the maker's choice; these are understood:
``image_size`` (px, for evaluation), ``teacher`` (of the text terms), ``classes``, ``data``, ``metrics``, ``licence``
and ``limits``.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import save_file

from hamlet import __version__
from hamlet.errors import HamletError
from hamlet.models.weights import check_tensors, hub_file, read_tensors
from hamlet.paths import replacing

if TYPE_CHECKING:
    from hamlet.models.base import RetrievalModel

WEIGHTS = "model.safetensors"  # in a folder of save_pretrained and in a hub repository
CARD = """---
library_name: hamlet
pipeline_tag: image-feature-extraction
tags: [image-retrieval, {method}]{tag}
---
# {method} on {backbone}

Images in, L2-normalised descriptors of {dim} dimensions out. `hamlet.load("owner/name").encode(["photo.jpg"])`

| | |
|---|---|
| parameters | {parameters:,} |
| first weights of the backbone | {first} |
| evaluation size (px) | {image_size} |
| made with | hamlet {version} |

## Data
{data}

## Metrics
{metrics}

## Licence
{licence}

## Limits
{limits}
"""


class HubModel(PyTorchModelHubMixin):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` by way of ``save_model`` and ``load_model``."""

    def _save_pretrained(self, save_directory: Path) -> None:
        # for readers only: the recipe that counts is in the weights' file
        self._hub_mixin_config = {"method": self.method, "backbone": self.backbone_name}
        save_model(self, save_directory / WEIGHTS)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options) -> "RetrievalModel":
        folder = Path(model_id)
        path = folder / WEIGHTS if folder.is_dir() else hub_file(model_id, WEIGHTS, "name a local folder")
        return load_model(path)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """A card written from the model's own record; what is not recorded is said not to be."""
        told = dict.fromkeys(("data", "metrics", "licence", "limits", "image_size"), "not stated by the maker")
        for name, value in self.card.items():
            if isinstance(value, dict):
                value = "\n".join(f"- {part}: {entry}" for part, entry in value.items())
            told |= {} if value is None else {name: value}
        told |= {
            "method": self.method,
            "backbone": self.backbone_name,
            "dim": self.embedding_dim,
            "parameters": sum(p.numel() for p in self.parameters()),
            "first": " ".join(filter(None, map(self.initial_weights.get, ("source", "tag", "sha256")))),
            "version": __version__,
            "tag": f"\nlicense: {told['licence']}" if "licence" in self.card else "",
        }
        return ModelCard(CARD.format_map(told))


def save_model(model: "RetrievalModel", path: str | Path, card: dict | None = None) -> None:
    """Write weights, the recipe that rebuilds the model and its card to one file, whole or not at all.

    ``card`` is added to ``model.card``. A model under torch.compile is saved as the model itself.
    """
    model = getattr(model, "_orig_mod", model)
    record = {
        "method": model.method,
        "backbone": model.backbone_name,
        "options": model.options,
        "mean": model.mean,
        "std": model.std,
        "initial_weights": model.initial_weights,
        "version": __version__,
        "card": {**model.card, **(card or {})},
    }
    try:
        metadata = {"hamlet": json.dumps(record, sort_keys=True, allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise HamletError(f"the card of {path} holds what JSON cannot: {error}") from error
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(weights, partial, metadata=metadata)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> "RetrievalModel":
    """Rebuild a model written by ``save_model``, in evaluation mode; its card is ``model.card``.

    HamletError: no such file, another kind of file, an unknown method, a tensor that is missing, has another shape or
    kind, or holds values that are not finite.
    """
    from hamlet.models import create_model, list_methods  # the package imports this module first

    path = Path(path)
    tensors, record = read_tensors(path)
    if not isinstance(record, dict):
        raise HamletError(f"{path} holds no recipe of a hamlet model; expected a file written by save_model")
    if record.get("method") not in list_methods():
        known = ", ".join(list_methods())
        raise HamletError(f"{path} is a model of the unknown method {record.get('method')!r}; known: {known}")
    try:
        model = create_model(record["method"], backbone=record["backbone"], **record["options"])
        model.mean, model.std = (tuple(map(float, record[k])) for k in ("mean", "std"))
        if not len(model.mean) == len(model.std) == 3 or not min(model.std) > 0 or not -9 < sum(model.mean) < 9:
            raise ValueError(f"mean {model.mean} and std {model.std}, expected three numbers each")
        model.initial_weights, model.card = dict(record["initial_weights"]), dict(record["card"])
    except (KeyError, TypeError, ValueError) as error:
        raise HamletError(f"{path} has a recipe that cannot be followed: {error}") from error
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    check_tensors(model.state_dict(), tensors, path)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model.to(device).eval()
