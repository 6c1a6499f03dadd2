"""The one loader of stored results: what is there, whether it is whole, and whether it still answers to its inputs.

A result answers where its parameters, the content of its data set, the versions of the packages that make numbers
and the code that made it (hamlet.artifact.code) are those of now. One that does not is "stale": whole, and labelled.
A machine with a card brings versions of its own: tables tell them, and nothing is compared.
"""

import contextlib
import functools
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd

from hamlet import paths
from hamlet.artifact import profiles
from hamlet.artifact.code import code_hashes, same_code
from hamlet.artifact.paper import label
from hamlet.artifact.profiles import Run
from hamlet.errors import HamletError

ACCURACY = ["mAP", "P@1", "P@5", "P@10"]
# packages whose version may move a number; the others of the lock may change and leave the results as they are
PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "accelerate", "pytorch-metric-learning", "numpy", "scipy", "pillow",
)  # fmt: skip


class ResultError(HamletError):
    """A stored result is not what its run wrote."""


class NoResult(ResultError, FileNotFoundError):
    """Nothing was stored yet."""


def digest(record: dict) -> str:
    """sha256 of the canonical JSON of a record without its own "digest"."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_verified(path: Path) -> dict:
    """result.json at ``path``; ResultError if it, or a file it lists, is not what a run or a measurement wrote."""
    way_out = f"delete {path.parent} and build again, or restore it from git"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NoResult(f"{path} is missing: {way_out}") from error
    except (ValueError, OSError) as error:
        raise ResultError(f"{path} is not JSON ({error}): {way_out}") from error
    if not isinstance(content, dict) or not {"digest", "parameters", "provenance"} <= set(content):
        raise ResultError(f"{path} is no result: digest, parameters or provenance is missing: {way_out}")
    if content["digest"] != digest(content):
        raise ResultError(f"{path} was changed after its run, its digest does not match: {way_out}")
    for name, expected in content.get("files", {}).items():
        file = path.parent / name
        if not file.is_file():
            raise ResultError(f"{file} is listed in {path.name} and missing: {way_out}")
        if paths.sha256(file) != expected:
            raise ResultError(f"{file} was changed after the run, its sha256 does not match: {way_out}")
    return content


def stored_digest(run: Run) -> str | None:
    """The digest that the stored result of a run bears, unverified; None where there is none to be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((run.folder / "result.json").read_text(encoding="utf-8")).get("digest")
    return None


def check_result(
    run: Run, data_hash: str | None = None, settings: dict | None = None, folder: Path | None = None
) -> tuple[str, str]:
    """("sound" | "absent" | "broken" | "stale", why) for the stored result of a run, or what lies in ``folder``.

    data_hash: the data set's content as it is now, where known. settings: what is asked for, by default the profile's.
    """
    path = (folder or run.folder) / "result.json"
    if not path.parent.is_dir() or not any(path.parent.iterdir()):
        return "absent", "no result is stored"
    try:
        record = read_verified(path)
    except (ResultError, AttributeError) as error:
        return "broken", str(error)
    if record.get("run") != vars(run):
        return "broken", f"{path} is the result of another run: {record.get('run')}"
    why = differences(run, record, data_hash, settings)
    return ("stale" if why else "sound"), "; ".join(why)


def differences(run: Run, record: dict, data_hash: str | None = None, settings: dict | None = None) -> list[str]:
    """What a result was made from that is not so now: parameters, data, versions, code, a phrase each."""
    asked, told = settings or profiles.parameters(run), []
    before, origin = profiles.DEFAULTS | record["parameters"], record["provenance"]
    changed = {key for key in asked | before if asked.get(key) != before.get(key)}
    changed -= {"device"} if asked["device"] == "auto" else set()  # any answers it; provenance names the one
    told += [f"{key} {before.get(key)!r} -> {asked.get(key)!r}" for key in sorted(changed)]
    if "options" in record and record["options"] != profiles.options(run):
        told.append(f"options {record['options']} -> {profiles.options(run)}")
    if data_hash and origin.get("dataset_hash") != data_hash:
        told.append("the content of the data set differs")
    installed, locked = {} if origin.get("driver") else origin.get("versions", {}), locked_versions()
    told += [
        f"{name} {installed[name]} -> {' or '.join(sorted(locked[name]))}"
        for name in PACKAGES
        if name in installed and name in locked and installed[name].partition("+")[0] not in locked[name]
    ]
    if "code" not in origin:
        return [*told, "other code: it recorded no hash of each module"]
    now = code_hashes(run)
    moved = sorted(
        name for name in now | origin["code"] if not same_code(name, origin["code"].get(name), now.get(name))
    )
    return [*told, *([f"other code: {', '.join(moved)}"] if moved else [])]


@functools.cache
def locked_versions() -> dict[str, set[str]]:
    """Package -> its versions in requirements.lock, one for each range of Pythons."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==([^ ]+)", paths.LOCK.read_text(encoding="utf-8"), re.M):
        found.setdefault(name, set()).add(version)
    return found


def stored_runs(profile: str, dataset: str) -> list[Run]:
    """Every run with a result on disk, asked for now or not, the shared ones of an extended profile included."""
    found = set()
    for path in paths.output_dir("results", profile, dataset).glob("*/seed*/result.json"):
        model, _, variant = path.parts[-3].partition("-")
        if seed := re.fullmatch(r"seed(\d+)", path.parts[-2]):
            found.add(Run(profile, dataset, model, variant or "default", int(seed[1])))
    if profile in profiles.profile_names() and "extends" in profiles.load_profile(profile):
        with contextlib.suppress(HamletError):  # a data set that nobody knows any more has no shared runs
            asked = profiles.expand(profile, dataset)
            found |= {run for run in asked if run.profile != profile and (run.folder / "result.json").is_file()}
    return sorted(found)


def first_runs(profile: str, dataset: str) -> dict[str, Run]:
    """Run name -> its stored run of the lowest seed, by name."""
    runs = sorted(stored_runs(profile, dataset), key=lambda run: (run.run_name, -run.seed))
    return {run.run_name: run for run in runs}


def stored_datasets(profile: str) -> list[str]:
    """The data sets with results on disk, by name."""
    folders = paths.output_dir("results", profile).glob("[!.]*")
    return sorted(folder.name for folder in folders if any(folder.glob("*/seed*/result.json")))


def load_results(profile: str, dataset: str) -> pd.DataFrame:
    """One row per stored run, every file verified: run, label, model, variant, seed, mAP, P@1, P@5, P@10 (default
    protocol), untrained_mAP, stale (bool: parameters, versions or code are others now), stale_why (str), folder (Path),
    result (the whole dict).

    Raises ResultError where there is no run, for a result that does not verify, lies in another run's folder, or was
    made from another version of the data set than its neighbours.
    """
    runs = stored_runs(profile, dataset)
    if not runs:
        place = paths.output_dir("results", profile, dataset)
        raise NoResult(f"no finished run under {place}: ./run_all.sh {profile} --dataset {dataset}")
    rows = [_row(run, read_verified(run.folder / "result.json")) for run in runs]
    hashes = {row["result"]["provenance"]["dataset_hash"]: row["folder"] for row in rows}
    if len(hashes) > 1:
        raise ResultError(
            f"runs of different versions of {dataset} cannot share a table: "
            + "; ".join(f"{folder} has {value[:12]}" for value, folder in sorted(hashes.items()))
            + ": delete the outdated ones and build again"
        )
    return pd.DataFrame(rows).sort_values(["run", "seed"], ignore_index=True)


def _row(run: Run, content: dict) -> dict:
    if content.get("run") != vars(run):
        raise ResultError(f"{run.folder} holds the result of {content.get('run')}: move or delete that folder")
    name, known = run.run_name, run.profile in profiles.profile_names() and run.variant in profiles.load_variants()
    why = differences(run, content) if known else ["no profile or variant of that name is there now"]
    return {
        **{"run": name, "label": label(name), "model": run.model, "variant": run.variant},
        **{"seed": run.seed, **{metric: content["metrics"]["default"][metric] for metric in ACCURACY}},
        "untrained_mAP": content.get("untrained", {}).get("default", {}).get("mAP"),
        **{"stale": bool(why), "stale_why": "; ".join(why), "folder": run.folder, "result": content},
    }


def trained_twice(profile: str, dataset: str) -> pd.DataFrame:
    """Runs of a profile that the one it extends has too, made on another machine: run, seed, device, other_device, mAP,
    other_mAP. Nothing else differs, so they show what a machine is worth."""
    parent, rows = profiles.load_profile(profile).get("extends"), []
    for run in stored_runs(profile, dataset) if parent else []:
        other = replace(run, profile=parent)
        if run.profile != profile or not (other.folder / "result.json").is_file():
            continue
        here, there = (read_verified(r.folder / "result.json") for r in (run, other))
        devices = [result["provenance"]["device"] for result in (here, there)]
        scores = [result["metrics"]["default"]["mAP"] for result in (here, there)]
        if here["parameters"] | {"device": ""} == there["parameters"] | {"device": ""} and devices[0] != devices[1]:
            rows.append((run.run_name, run.seed, *devices, *scores))
    return pd.DataFrame(rows, columns=["run", "seed", "device", "other_device", "mAP", "other_mAP"])


def load_efficiency(profile: str, dataset: str) -> dict:
    """The verified efficiency result of a profile and data set (see hamlet.artifact.cost)."""
    path = paths.output_dir("results", profile, dataset) / "efficiency" / "result.json"
    if not path.is_file():
        raise NoResult(f"{path} is not there: ./run_all.sh {profile} --dataset {dataset}")
    return read_verified(path)


def load_inside(profile: str, dataset: str) -> pd.DataFrame:
    """What workflow/inside.py measured, a row for each run of HAMLET and part taken out: run, label, seed, mAP, kept,
    level_cosine, update, gate_entropy, gate_spread, part, change (in validation mAP), cosine. What the profile lacks
    comes from the one it extends; a run that was trained again since is left out; no rows where none was measured."""
    rows: list[dict] = []
    for name in filter(None, (profile, profiles.load_profile(profile).get("extends"))):
        path = paths.output_dir("results", name, dataset) / "inside" / "result.json"
        known = {row["run"] for row in rows}
        if not path.is_file():
            continue
        record, now = read_verified(path), {str(run): stored_digest(run) for run in stored_runs(name, dataset)}
        for row in record["rows"]:
            key = f"{row['run']} seed{row['seed']}"
            if row["run"] not in known and now.get(key) == record["parameters"]["runs"][key]:
                parts = row["parts"].items()
                rows += [{**row, "label": label(row["run"]), "part": part, **change} for part, change in parts]
    sizes = ["kept", "level_cosine", "update", "gate_entropy", "gate_spread"]
    return pd.DataFrame(rows, columns=["run", "label", "seed", "mAP", *sizes, "part", "change", "cosine"])
