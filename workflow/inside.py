"""What the parts of a trained HAMLET do: measured on validation images with the weights at hand, after training.

Each part is taken out of the trained network, nothing is trained again: how far do the descriptors move, and what does
validation mAP lose? Writes results/<profile>/<dataset>/inside/result.json, which notebook 09 prints.
    python workflow/inside.py ablation scenes
"""

import argparse
import json
import math
from contextlib import contextmanager

import numpy as np
import torch

from hamlet import paths
from hamlet.artifact import profiles, results, run
from hamlet.evaluation import embed, evaluation_transform
from hamlet.metrics import retrieval_metrics
from hamlet.models import load_model

IMAGES = 128  # of the validation split, for gates and sizes


@contextmanager
def without(net, part: str):
    """The network with one part switched off, and afterwards as before."""
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    attentions = [block.attention for block in net.blocks]
    before = [(a.exchange, a.gate) for a in attentions]
    c5 = net.backbone.channels[-1]
    if part == "the exchange":
        for attention in attentions:
            attention.exchange = False
    elif part == "the gate":
        for attention in attentions:
            attention.gate = None
    elif part == "the blocks":
        for block in net.blocks:
            block.scale.data.zero_()
    elif part == "what tokens add to C5":
        net.to_c5.weight.data.zero_()
    elif part == "the local features":
        net.perceptron[0].weight.data[:, c5:] = 0
    elif part == "the perceptron":
        net.head[0].weight.data[:, c5:] = 0
    elif part == "plain C5":
        net.head[0].weight.data[:, :c5] = 0
    try:
        yield
    finally:
        for attention, (exchange, gate) in zip(attentions, before, strict=True):
            attention.exchange, attention.gate = exchange, gate
        net.load_state_dict(kept)


PARTS = (
    "the exchange",
    "the gate",
    "the blocks",
    "what tokens add to C5",
    "the local features",
    "the perceptron",
    "plain C5",
)


@torch.inference_mode()
def sizes(net, pixels: torch.Tensor) -> dict[str, float]:
    """Kept cells; the levels' mean cosine in one cell; a block's update as a share of its token; where there is a gate
    its entropy (1: uniform) and how far a weight varies between images."""
    seen, flow = net.inspect(pixels), []
    hooks = [block.register_forward_hook(lambda _, given, out: flow.append((given[0], out[0]))) for block in net.blocks]
    net(pixels)
    for hook in hooks:
        hook.remove()
    levels = torch.nn.functional.normalize(flow[0][0], dim=-1)  # (L, B, n, d)
    alike = torch.einsum("ibnd,jbnd->ij", levels, levels) / levels[0, ..., 0].numel()
    found = {
        "kept": seen["keep"].float().mean().item(),
        "level_cosine": alike[~torch.eye(len(alike)).bool()].mean().item(),
    }
    found["update"] = np.mean([((after - x).norm(dim=-1) / x.norm(dim=-1)).mean().item() for x, after in flow])
    if "gates" in seen:
        gates = seen["gates"]
        found["gate_entropy"] = (-(gates * gates.log()).sum(-1) / math.log(gates.shape[-1])).mean().item()
        found["gate_spread"] = gates.std(0).mean().item()
    return {name: float(value) for name, value in found.items()}


def measure(asked: profiles.Run) -> dict:
    """One run's row: validation mAP, `sizes`, and for each part the change in mAP and the descriptors' mean cosine."""
    settings = profiles.parameters(asked)
    data, net = run.load_data(asked.dataset, settings).validation, load_model(asked.folder / "model.safetensors").eval()

    def described() -> tuple[float, np.ndarray]:
        rows = embed(net, data.images, settings["image_size"])
        return retrieval_metrics(rows, data.labels).mean["mAP"], rows

    whole, rows = described()
    some = np.linspace(0, len(data) - 1, min(IMAGES, len(data))).round().astype(int)
    pixels = torch.from_numpy(np.stack([np.asarray(data.images[i]) for i in some])).permute(0, 3, 1, 2)
    found = {
        "mAP": whole,
        **sizes(net, evaluation_transform(settings["image_size"], net.mean, net.std)(pixels)),
        "parts": {},
    }
    cut = net.blocks[0].attention
    for part in PARTS:
        if (part == "the exchange" and not cut.exchange) or (part == "the gate" and cut.gate is None):
            continue
        with without(net, part):
            value, moved = described()
        found["parts"][part] = {"change": value - whole, "cosine": float((rows * moved).sum(1).mean())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("dataset")
    parser.add_argument("runs", nargs="*", help="names of runs; all of HAMLET by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [r for r in results.stored_runs(given.profile, given.dataset) if r.model.startswith("hamlet")]
    runs = [r for r in runs if not given.runs or r.run_name in given.runs]
    runs = [r for r in runs if (r.folder / "model.safetensors").is_file() and profiles.options(r).get("levels", 4) > 1]
    rows, digests = [], {}
    for asked in runs:
        rows.append({"run": asked.run_name, "seed": asked.seed, **measure(asked)})
        digests[str(asked)] = results.read_verified(asked.folder / "result.json")["digest"]
        print(json.dumps(rows[-1]), flush=True)
    content = {
        "schema": 1,
        "parameters": {"runs": digests, "images": IMAGES},
        "rows": rows,
        "provenance": run.provenance("cpu"),
    }
    path = paths.output_dir("results", given.profile, given.dataset) / "inside" / "result.json"
    paths.write_json(path, content | {"digest": results.digest(content)})
    print(path)


if __name__ == "__main__":
    main()
