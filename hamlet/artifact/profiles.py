"""Which runs a profile asks for, and whether a stored result still answers: the plan behind run_all.sh.

A profile is one YAML file in workflow/ (strict: an unknown key, a wrong type or a value out of range is
refused, as nanoGPT-style configurations do). ``expand`` turns it into runs, ``parameters`` into what one
run is told, ``check_result`` says why a stored result may not be used. Needs the standard library and
PyYAML alone, so that a plan costs no import of torch.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml

from hamlet import paths

DATASETS = (  # a test holds it to hamlet.data
    "scenes", "grocery", "grocery_unseen", "folder", "cifar10", "flowers102", "pets", "cub200", "flickr8k", "flickr30k",
    "coco_captions",
)  # fmt: skip
MOST_SEEDS = 1000
VARIANTS = ("default", "no_text", "no_exchange", "text")
# name -> (type, smallest, largest); None as a largest: no bound. Strings list their choices instead.
FIELDS = {
    "epochs": (int, 1, None),
    "image_size": (int, 32, 1024),
    "train_size": (int, 32, 1024),
    "batch_size": (int, 2, None),
    "images_per_class": (int, 1, None),
    "crop_scale": (float, 0.05, 1.0),
    "limit": (int, 2, None),
    "pretrained": (bool, None, None),
    "learning_rate": (float, 0.0, 1.0),
    "backbone_learning_rate": (float, 0.0, 1.0),
    "proxy_learning_rate": (float, 0.0, 1.0),
    "weight_decay": (float, 0.0, 1.0),
    "warmup": (float, 0.0, 0.9),
    "loss": (str, ("cosface", "proxy_anchor", "multi_similarity"), None),
    "margin": (float, 0.0, None),
    "scale": (float, 0.0, None),
    "text_guidance": (float, 0.0, None),
    "text_alignment": (float, 0.0, None),
    "precision": (str, ("auto", "float32", "bfloat16"), None),
    "device": (str, ("auto", "cpu", "cuda", "mps"), None),
}
NULLABLE = ("limit",)
EFFICIENCY = {"image_size": (int, 32, 1024), "repeats": (int, 1, None)}
ESTIMATE = {
    "run_seconds": (float, 0.0, None),
    "report_seconds": (float, 0.0, None),
    "disk_mb": (float, 0.0, None),
}
SECTIONS = ("seeds", "parameters", "datasets", "models", "efficiency", "estimate", "runs")


@dataclass(frozen=True, order=True)
class Run:
    """One training: the unit that is made, stored, verified and resumed."""

    profile: str
    dataset: str
    model: str
    variant: str
    seed: int

    @property
    def run_name(self) -> str:
        return self.model if self.variant == "default" else f"{self.model}-{self.variant}"

    @property
    def folder(self) -> Path:
        return paths.results_dir(self.profile, self.dataset) / self.run_name / f"seed{self.seed}"

    @property
    def uses_text(self) -> bool:
        """Text supervises HAMLET (unless "no_text") and whatever runs as the variant "text"."""
        return self.variant == "text" or (self.model.startswith("hamlet_") and self.variant != "no_text")

    def __str__(self) -> str:
        return f"{self.run_name} seed{self.seed}"


def profile_names() -> list[str]:
    return sorted(p.stem for p in paths.WORKFLOW.glob("*.yaml") if p.stem != "reports")


def _one_of(name: object, valid, what: str, where: str = "") -> None:
    if name not in valid:
        place = f" in {where}" if where else ""
        raise ValueError(f"unknown {what} {name!r}{place}; valid: {', '.join(map(str, valid))}")


def check_values(values: dict, where: str, fields: dict = FIELDS) -> dict:
    """The values with integers widened to float where a float is due; every other mismatch is refused.

    Raises ValueError naming ``where``, the key and what is valid.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of {', '.join(fields)}, got {values!r}")
    out = {}
    for key, value in values.items():
        _one_of(key, fields, "key", where)
        kind, low, high = fields[key]
        if value is None and key in NULLABLE:
            out[key] = None
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if kind is float else ""
            raise ValueError(f"{where}: {key} must be {kind.__name__}, got {value!r}{hint}")
        if isinstance(low, tuple):
            _one_of(value, low, key, where)
        elif low is not None and not (low <= value and (high is None or value <= high)):
            raise ValueError(
                f"{where}: {key} = {value} lies outside [{low}, {'inf' if high is None else high}]"
            )
        out[key] = value
    return out


def _seeds(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_SEEDS:
        raise ValueError(f"{where}: seeds must be a whole number in 1..{MOST_SEEDS}, got {value!r}")
    return value


def load_profile(name: str) -> dict:
    """workflow/<name>.yaml, checked: seeds, parameters, datasets, models, efficiency, estimate, runs.

    ``datasets`` and ``models`` hold overrides of the parameters (a data set's may set ``seeds`` too).
    Raises ValueError naming the key, what was expected and what is valid.
    """
    _one_of(name, profile_names(), "profile")
    where = f"workflow/{name}.yaml"
    profile = yaml.safe_load((paths.WORKFLOW / f"{name}.yaml").read_text(encoding="utf-8"))
    for key in profile:
        _one_of(key, SECTIONS, "section", where)
    if missing := [key for key in SECTIONS if key not in profile]:
        raise ValueError(f"{where}: missing section {', '.join(missing)}")
    _seeds(profile["seeds"], where)
    profile["parameters"] = check_values(profile["parameters"], f"{where} parameters")
    if missing := [key for key in FIELDS if key not in profile["parameters"]]:
        raise ValueError(f"{where} parameters: missing {', '.join(missing)}")
    profile["efficiency"] = check_values(profile["efficiency"], f"{where} efficiency", EFFICIENCY)
    profile["estimate"] = check_values(profile["estimate"], f"{where} estimate", ESTIMATE)
    for section in ("datasets", "models"):
        checked = {}
        for key, values in (profile[section] or {}).items():
            values = dict(values)
            seeds = values.pop("seeds", None) if section == "datasets" else None
            checked[key] = check_values(values, f"{where} {section}.{key}")
            if seeds is not None:
                checked[key]["seeds"] = _seeds(seeds, f"{where} {section}.{key}")
        profile[section] = checked
    if not profile["runs"] or len(set(profile["runs"])) != len(profile["runs"]):
        raise ValueError(f"{where}: runs must be a list of different names")
    for entry in profile["runs"]:
        _one_of(str(entry).partition("-")[2] or "default", VARIANTS, "variant", f"{where} runs {entry!r}")
    models = {entry.partition("-")[0] for entry in profile["runs"]}
    for key in profile["models"]:
        _one_of(key, sorted(models), "model", f"{where} models")
    return profile


def expand(
    profile: str, dataset: str, models: list[str] | None = None, seeds: int | None = None
) -> list[Run]:
    """The runs of a profile on a data set, all of seed 0 first so that every row of a table fills early.

    ``models`` restricts them to these run names (e.g. "gem_resnet18-text"); ``seeds`` replaces the
    profile's number of seeds. Raises ValueError for an unknown name.
    """
    loaded = load_profile(profile)
    _one_of(dataset, DATASETS, "data set")
    for name in models or []:
        _one_of(name, loaded["runs"], "model", f"profile {profile!r}")
    chosen = [name for name in loaded["runs"] if not models or name in models]
    if seeds is None:
        seeds = loaded["datasets"].get(dataset, {}).get("seeds", loaded["seeds"])
    pairs = [(name.partition("-"), seed) for seed in range(_seeds(seeds, "--seeds")) for name in chosen]
    return [Run(profile, dataset, model, variant or "default", seed) for (model, _, variant), seed in pairs]


def parameters(run: Run) -> dict:
    """What one run is told: the profile's parameters, then the data set's, then the model's.

    The text weights are 0 where the run uses no text, so that the record says so.
    """
    loaded = load_profile(run.profile)
    merged = (
        loaded["parameters"] | loaded["datasets"].get(run.dataset, {}) | loaded["models"].get(run.model, {})
    )
    merged.pop("seeds", None)
    if not run.uses_text:
        merged |= {"text_guidance": 0.0, "text_alignment": 0.0}
    return merged


def digest(record: dict) -> str:
    """sha256 of the canonical JSON of a record without its own "digest"."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_result(run: Run, dataset_hash: str | None = None) -> str | None:
    """Why the stored result of a run may not be used, or None where it is sound.

    Checked: readable, digest, the run's own name, its parameters against the profile as it stands now,
    the sha256 of every file it lists, and the data set's hash where the caller knows it.
    """
    try:
        record = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
        if record["digest"] != digest(record):
            return "result.json was changed after the run: its digest does not match"
        if {key: record["run"][key] for key in Run.__dataclass_fields__} != vars(run):
            return f"it is the result of another run: {record['run']}"
        asked, stored = parameters(run), record["parameters"]
        changed = sorted(key for key in asked | stored if asked.get(key) != stored.get(key))
        if changed:
            pairs = ", ".join(f"{k} {stored.get(k)!r} -> {asked.get(k)!r}" for k in changed)
            return f"the profile asks for other parameters now: {pairs}"
        for name, expected in record["files"].items():
            if paths.sha256(run.folder / name) != expected:
                return f"{name} was changed after the run: its sha256 does not match"
        if dataset_hash and record["provenance"]["dataset_hash"] != dataset_hash:
            return "the data set has changed since: its content hash differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"result.json cannot be read as a result ({type(error).__name__}: {error})"
    return None


def stored_runs(profile: str, dataset: str) -> list[Run]:
    """Every run with a result on disk, asked for now or not; what was set aside does not count."""
    found = []
    for path in paths.results_dir(profile, dataset).glob("*/seed*/result.json"):
        model, _, variant = path.parts[-3].partition("-")
        if seed := re.fullmatch(r"seed(\d+)", path.parts[-2]):
            found.append(Run(profile, dataset, model, variant or "default", int(seed[1])))
    return sorted(found)


def stored_datasets(profile: str) -> list[str]:
    """The data sets with results on disk, by name."""
    folders = paths.results_dir(profile, "any").parent.glob("[!.]*")
    return sorted(folder.name for folder in folders if stored_runs(profile, folder.name))


def stamp(profile: str, dataset: str) -> Path:
    """Written by ``python -m hamlet.artifact.run prepare`` when the cache is complete: {"dataset_hash": ...}.

    The name depends on all that the cache depends on, so another size or data root asks for another one.
    """
    loaded = load_profile(profile)
    merged = loaded["parameters"] | loaded["datasets"].get(dataset, {})
    sizes = [merged[key] for key in ("image_size", "train_size", "limit")] + [
        loaded["efficiency"]["image_size"]
    ]
    key = hashlib.sha256(json.dumps([sizes, os.environ.get("HAMLET_DATA")]).encode()).hexdigest()[:12]
    return paths.cache_dir() / "prepared" / f"{profile}-{dataset}-{key}.json"


def prepared_hash(profile: str, dataset: str) -> str | None:
    """The data set's content hash from the stamp; None where the data is not prepared yet."""
    path = stamp(profile, dataset)
    return json.loads(path.read_text(encoding="utf-8"))["dataset_hash"] if path.exists() else None


def cards() -> int:
    """NVIDIA GPUs that the driver lists; asked without importing torch."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
