"""One look at a setting: train, read the validation protocol, append a row to results/tuning/<profile>.csv.

Hyperparameters are chosen from these rows alone; query and gallery of the headline protocols are never looked at.
    python benchmarks/looks.py pretrained grocery_unseen gem_efficientnetlite0 --set epochs=4 scale=32.0
"""

import argparse
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import yaml

from hamlet import paths
from hamlet.artifact import run
from hamlet.artifact.profiles import Run, parameters
from hamlet.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("dataset")
    parser.add_argument("name", help="a run's name: model, or model-variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    changes = {name: yaml.safe_load(value) for name, value in (item.split("=") for item in given.set)}
    model, _, variant = given.name.partition("-")
    asked = Run(given.profile, given.dataset, model, variant or "default", given.seed)
    settings = parameters(asked) | changes
    data = run.load_data(given.dataset, settings)
    net, start = run.build_model(asked, settings), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        curves = train(net, data, settings, given.seed, Path(folder)).curves
    row = {"dataset": given.dataset, "run": given.name, "seed": given.seed, "changes": " ".join(given.set)}
    row |= {name: round(curves[f"validation_{name}"].iloc[-1], 4) for name in ("mAP", "P@1")}
    row |= {"epochs": len(curves), "loss": round(curves["loss"].iloc[-1], 4)}
    row |= {"cpu_seconds": round(time.process_time() - start), "commit": run.provenance("cpu")["commit"][:10]}
    path = paths.ROOT / "results" / "tuning" / f"{given.profile}.csv"
    pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
    print(row)


if __name__ == "__main__":
    main()
