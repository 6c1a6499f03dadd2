"""What describing one image costs, measured for every stored run of a profile on one data set (hamlet.efficiency).

The weights of a run are used where they are there. git does not keep them, so in a fresh clone a network with new
weights stands in where its cost does not depend on them; HAMLET's does (which tokens it keeps), so it needs its own.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from hamlet import paths
from hamlet.artifact import profiles
from hamlet.artifact.profiles import Run
from hamlet.artifact.results import digest, first_runs, read_verified
from hamlet.artifact.run import build_model, end_with_parent, load_data, own_temporary_folder, provenance
from hamlet.efficiency import MEMORY, WARMUP, compare
from hamlet.errors import HamletError, one_line
from hamlet.evaluation import evaluation_transform
from hamlet.models import RetrievalModel, load_model, save_model
from hamlet.training import choose_device

WEIGHTS = "model.safetensors"


def query_images(data, count: int, size: int, model: RetrievalModel) -> torch.Tensor:
    """``count`` images spread evenly over the query split, float32 (count, 3, size, size), normalised for ``model``."""
    chosen = np.linspace(0, len(data.query) - 1, count).round().astype(int)
    images = torch.from_numpy(data.query.images[chosen]).permute(0, 3, 1, 2)
    return evaluation_transform(size, model.mean, model.std)(images).contiguous()


def weights_of(run: Run, settings: dict, folder: Path) -> Path | None:
    """The run's weights, or new ones of the same network written to ``folder``; None where those would not do."""
    if (stored := run.folder / WEIGHTS).is_file():
        return stored
    if run.model.startswith("hamlet"):
        return None
    path = folder / f"{run.run_name}.safetensors"
    save_model(build_model(run, settings | {"pretrained": False}), path)
    return path


def measure(profile: str, dataset: str) -> Path:
    """Measure the stored runs of the profile as its section ``efficiency`` says; returns the result.json written.

    A HAMLET whose weights are not there has no row. Raises HamletError where nothing is left to be measured.
    """
    asked = profiles.load_profile(profile)["efficiency"]
    repeats, size = asked["repeats"], asked["image_size"]
    device = choose_device(profiles.of_dataset(profile, dataset)["device"]).type
    runs = first_runs(profile, dataset)
    stored = {name: read_verified(run.folder / "result.json") for name, run in runs.items()}
    if not stored:
        raise HamletError(f"no finished run of {profile} on {dataset}: ./run_all.sh {profile} --dataset {dataset}")
    settings = {name: profiles.parameters(runs[name]) | record["parameters"] for name, record in stored.items()}
    torch.set_num_threads(1)  # what one core does: the report's batch of one image leaves little to share
    with own_temporary_folder() as folder:
        found = {name: weights_of(run, settings[name], folder) for name, run in runs.items()}
        weights = {name: path for name, path in found.items() if path}
        if not weights:
            raise HamletError(
                f"none of {', '.join(runs)} has weights (git keeps none), and HAMLET's cost depends on them: set "
                f"{paths.output_dir('results', profile, dataset)} aside and build again"
            )
        data = load_data(dataset, next(iter(settings.values())))
        images = query_images(data, repeats, size, load_model(next(iter(weights.values()))))
        rows = compare(weights, images, device)
    given = {"profile": profile, "dataset": dataset, "device": device, "image_size": size, "batch_size": 1}
    given |= {"images": repeats, "warmup": WARMUP, "dtype": "float32", "memory": MEMORY.get(device, "not measured.")}
    given["new_weights"] = [name for name, path in weights.items() if path.parent != runs[name].folder]
    given["runs"] = {name: stored[name]["digest"] for name in weights}
    content = {"schema": 1, "parameters": given, "models": rows, "provenance": provenance(device)}
    path = paths.output_dir("results", profile, dataset) / "efficiency" / "result.json"
    paths.write_json(path, content | {"digest": digest(content)})
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command line that the Snakefile calls."""
    parser = argparse.ArgumentParser(prog="python -m hamlet.artifact.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--traceback", action="store_true")
    given = parser.parse_args(arguments)
    if given.with_parent:
        end_with_parent()
    with one_line(arguments):
        print(measure(given.profile, given.dataset))


if __name__ == "__main__":
    main()
