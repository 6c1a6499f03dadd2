"""One file holds a model and all that is needed to use it: weights, recipe, normalisation, size, and a card.

The file is safetensors; nothing is unpickled. The card is a dictionary of the maker's choice: ``image_size`` (px),
``classes`` (names), ``teacher`` (of the text projection), ``data``, ``metrics``, ``licence``, ``limits``.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hamlet import __version__
from hamlet.errors import HamletError
from hamlet.models.base import METHODS, RetrievalModel
from hamlet.models.weights import check_tensors, read_tensors
from hamlet.paths import replacing


def save_model(model: RetrievalModel, path: str | Path, card: dict | None = None) -> None:
    """Write weights, the recipe that rebuilds the model and its card to one file, whole or not at all."""
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module
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
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(Path(path)) as partial:
        save_file(weights, partial, metadata={"hamlet": json.dumps(record, sort_keys=True)})


def load_model(path: str | Path, device: str | torch.device = "cpu") -> RetrievalModel:
    """Rebuild a model written by ``save_model``, in evaluation mode; its card is ``model.card``.

    Raises:
        HamletError: no such file, another kind of file, an unknown method, a tensor that is missing, has another
            shape or kind, or holds values that are not finite.
    """
    path = Path(path)
    tensors, record = read_tensors(path)
    if not isinstance(record, dict):
        raise HamletError(f"{path} holds no recipe of a hamlet model; expected a file written by save_model")
    from hamlet.models import list_methods  # the package imports this module first

    list_methods()
    if record.get("method") not in METHODS:
        raise HamletError(
            f"{path} is a model of the method {record.get('method')!r}, which is not installed here; "
            f"installed: {', '.join(METHODS)}"
        )
    try:
        model = METHODS[record["method"]](record["backbone"], **record["options"])
    except (KeyError, TypeError, HamletError) as error:
        raise HamletError(f"{path} has a recipe that cannot be followed: {error}") from error
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    check_tensors(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)
    model.mean, model.std = (tuple(record.get(k, getattr(model, k))) for k in ("mean", "std"))
    model.initial_weights = record.get("initial_weights", model.initial_weights)
    model.card = record.get("card", {})
    return model.to(device).eval()
