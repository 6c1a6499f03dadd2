"""The one loader of stored results: what it returns has a digest and file hashes that hold, or it raises.

Tables and figures (hamlet.artifact.tables, hamlet.artifact.figures) are made from nothing else.
"""

import json
from pathlib import Path

import pandas as pd

from hamlet import paths
from hamlet.artifact.paper import label
from hamlet.artifact.profiles import digest
from hamlet.errors import HamletError

ACCURACY = ["mAP", "P@1", "P@5", "P@10"]


class ResultError(HamletError):
    """A stored result is not what its run wrote."""


def read_verified(path: Path) -> dict:
    """result.json at ``path``; ResultError if it, or a file it lists, differs from what the run wrote."""
    way_out = f"delete {path.parent} and build again, or restore it from git"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ResultError(f"{path} is not JSON ({error}): {way_out}") from error
    if content.get("digest") != digest(content):
        raise ResultError(f"{path} does not match its digest, so it was changed after its run: {way_out}")
    for name, expected in content.get("files", {}).items():
        file = path.parent / name
        if not file.is_file():
            raise ResultError(f"{file} is listed in {path.name} and missing: {way_out}")
        if paths.sha256(file) != expected:
            raise ResultError(f"{file} does not match the hash in {path.name}: {way_out}")
    return content


def load_results(profile: str, dataset: str) -> pd.DataFrame:
    """One row per stored run, every file verified: run, label, model, variant, seed, mAP, P@1, P@5, P@10 (default
    protocol), untrained_mAP, folder (Path), result (the whole dict).

    Raises FileNotFoundError where there is no run; ResultError for a result that does not verify, lies in
    another run's folder, or was made from another version of the data set than its neighbours.
    """
    root = paths.results_dir(profile, dataset)
    files = sorted(root.glob("*/seed*/result.json"))
    if not files:
        raise FileNotFoundError(f"no finished run under {root}: ./run_all.sh {profile} --dataset {dataset}")
    rows = [_row(file, read_verified(file), profile, dataset) for file in files]
    hashes = {row["result"]["provenance"]["dataset_hash"]: row["folder"] for row in rows}
    if len(hashes) > 1:
        raise ResultError(
            f"runs of different versions of {dataset} cannot share a table: "
            + "; ".join(f"{folder} has {value[:12]}" for value, folder in sorted(hashes.items()))
            + ": delete the outdated ones and build again"
        )
    return pd.DataFrame(rows).sort_values(["run", "seed"], ignore_index=True)


def _row(file: Path, content: dict, profile: str, dataset: str) -> dict:
    run = content["run"]
    name = run["model"] if run["variant"] == "default" else f"{run['model']}-{run['variant']}"
    if paths.results_dir(run["profile"], run["dataset"]) / name / f"seed{run['seed']}" != file.parent:
        raise ResultError(f"{file} belongs to {run}, not to {profile}/{dataset}: move or delete that folder")
    return {
        **{"run": name, "label": label(name), "model": run["model"], "variant": run["variant"]},
        **{"seed": run["seed"], **{metric: content["metrics"]["default"][metric] for metric in ACCURACY}},
        "untrained_mAP": content.get("untrained", {}).get("default", {}).get("mAP"),
        **{"folder": file.parent, "result": content},
    }


def load_efficiency(profile: str, dataset: str) -> dict:
    """The verified efficiency result of a profile and data set (see hamlet.efficiency)."""
    path = paths.results_dir(profile, dataset) / "efficiency" / "result.json"
    if not path.is_file():
        command = f"python -m hamlet.efficiency --profile {profile} --dataset {dataset}"
        raise FileNotFoundError(f"{path} is not there: {command}")
    return read_verified(path)
