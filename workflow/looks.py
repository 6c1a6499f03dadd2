"""One look at a setting: train, read the validation protocol, append a row to results/tuning/<profile>.csv.

Hyperparameters are chosen from these rows alone; query and gallery of the headline protocols are never looked at.
    python workflow/looks.py pretrained grocery_unseen gem_efficientnetlite0 --set epochs=4 scale=32.0
    python workflow/looks.py pretrained grocery_unseen gem_efficientnetlite0 --fold 0
With --fold 0 or 1 the classes of training and validation together are cut in two, half of every coarse class each: one
half is trained on, the other asked. Both folds tell methods apart where a validation part of a few classes cannot.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from filelock import FileLock

from hamlet import paths
from hamlet.artifact import run
from hamlet.artifact.profiles import Run, parameters
from hamlet.data import Protocol, RetrievalDataset, Split
from hamlet.data.grocery import halves
from hamlet.evaluation import evaluate
from hamlet.training import train


def folded(data: RetrievalDataset, fold: int) -> RetrievalDataset:
    """Training and validation cut by class (``grocery.halves``): splits train and validation, no test split at all."""
    parts = [data.train, data.validation]
    names = ("images", "labels", "coarse_labels", "captions", "paths")
    columns = {name: np.concatenate([np.asarray(getattr(part, name)) for part in parts]) for name in names}
    classes, first = np.unique(columns["labels"], return_index=True)
    sides = halves(columns["coarse_labels"][first].tolist())
    asked = np.array([sides[i] == "query" for i in np.searchsorted(classes, columns["labels"])]) == (fold == 0)
    splits = {}
    for name, rows in (("train", ~asked), ("validation", asked)):
        taken = {key: column[rows] for key, column in columns.items()}
        splits[name] = Split(name, **taken | {key: taken[key].tolist() for key in ("captions", "paths")})
    return replace(data, splits=splits, protocols={})


def record(path: Path, row: dict) -> None:
    """Add a row to a table of looks, each value under its own column; several looks may end at once."""
    with FileLock(path.with_name(f".{path.stem}.lock")):
        table = pd.DataFrame([row]).astype(str)
        table = pd.concat([pd.read_csv(path, dtype=str), table]) if path.exists() else table
        with paths.replacing(path) as partial:
            table.to_csv(partial, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("dataset")
    parser.add_argument("name", help="a run's name: model, or model-variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, choices=(0, 1))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    changes = {name: yaml.safe_load(value) for name, value in (item.split("=") for item in given.set)}
    model, _, variant = given.name.partition("-")
    asked = Run(given.profile, given.dataset, model, variant or "default", given.seed)
    settings = parameters(asked) | changes
    data = run.load_data(given.dataset, settings)
    data = data if given.fold is None else folded(data, given.fold)
    net, start = run.build_model(asked, settings), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        curves = train(net, data, settings, given.seed, Path(folder)).curves
    data = replace(data, protocols={"validation": Protocol("validation", None, "")})
    found = evaluate(net, data, settings["image_size"], ("validation",)).metrics["validation"]
    row = {"dataset": given.dataset, "run": given.name, "seed": given.seed, "changes": " ".join(given.set)}
    row |= {name: round(found[name], 4) for name in ("mAP", "P@1")}
    row |= {"epochs": len(curves), "loss": round(curves["loss"].iloc[-1], 4)}
    row |= {"cpu_seconds": round(time.process_time() - start), "commit": run.provenance("cpu")["commit"][:10]}
    row |= {} if given.fold is None else {"fold": given.fold}
    table = given.profile if given.fold is None else f"{given.profile}_folds"
    record(paths.ROOT / "results" / "tuning" / f"{table}.csv", row)
    print(row)


if __name__ == "__main__":
    main()
