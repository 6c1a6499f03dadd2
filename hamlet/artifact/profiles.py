"""Which runs a profile asks for and what each is told: the plan behind run_all.sh.

A profile is one YAML file in workflow/, checked strictly: an unknown key, a wrong type or a value out of range is
refused, as nanoGPT-style configurations do. ``extends`` inherits everything but ``runs`` from another profile, and
a run that is the same in both is made and stored once, in the parent's folder. Variants are data too:
workflow/variants.yaml. Needs PyYAML alone, so that a plan costs no import of torch.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from hamlet import paths
from hamlet.errors import HamletError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, a tenth of the time where libyaml is there
TEXT_WEIGHTS = ("text_alignment", "text_proxies", "text_guidance")


@dataclass(frozen=True)
class Field:
    """One parameter: its type, its range or its choices, and whether a profile may leave it out."""

    kind: type
    low: float | None = None
    high: float = float("inf")
    choices: tuple = ()
    default: object = ...  # ...: every profile has to name it
    null: bool = False

    def check(self, name: str, value: object, where: str) -> object:
        """The value, an integer widened where a float is due; HamletError for what does not fit."""
        if value is None and self.null:
            return None
        if type(value) is int and self.kind is float:
            value = float(value)
        if type(value) is not self.kind:
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if self.kind is float else ""
            raise HamletError(f"{where}: {name} must be {self.kind.__name__}, got {value!r}{hint}")
        if self.choices:
            one_of(value, self.choices, name, where)
        if self.low is not None and not self.low <= value <= min(self.high, sys.float_info.max):
            raise HamletError(f"{where}: {name} = {value} lies outside [{self.low}, {self.high}]")
        return value


class Weights(Field):
    """Initial weights: true (timm's, from the hub), false (none), "packaged", or a file of weights."""

    def check(self, name: str, value: object, where: str) -> object:
        packaged_or_file = isinstance(value, str) and (value == "packaged" or Path(value).expanduser().is_file())
        if not isinstance(value, bool) and not packaged_or_file:
            raise HamletError(f'{where}: {name} = {value!r} is neither true, false, "packaged" nor a file')
        return value


# every run parameter; a new one is one line here, and a default where old profiles need not name it
FIELDS = {
    "epochs": Field(int, 1),
    "image_size": Field(int, 32, 1024),
    "train_size": Field(int, 32, 1024),
    "batch_size": Field(int, 2),
    "images_per_class": Field(int, 1),
    "crop_scale": Field(float, 0.05, 1.0),
    "limit": Field(int, 2, null=True),
    "pretrained": Weights(bool),
    "frozen_levels": Field(int, 0, 4, default=0),
    "backbone_share": Field(float, 0.0, 1.0, default=1.0),
    "learning_rate": Field(float, 0.0, 1.0),
    "backbone_learning_rate": Field(float, 0.0, 1.0),
    "proxy_learning_rate": Field(float, 0.0, 1.0),
    "weight_decay": Field(float, 0.0, 1.0),
    "warmup": Field(float, 0.0, 0.9),
    "loss": Field(str, choices=("cosface", "proxy_anchor", "multi_similarity")),
    "margin": Field(float, 0.0),
    "scale": Field(float, 0.0),
    "text_alignment": Field(float, 0.0),
    "text_proxies": Field(float, 0.0, default=0.0),
    "text_guidance": Field(float, 0.0),
    "text_source": Field(str, choices=("class_mean", "caption", "template", "word", "shuffled"), default="class_mean"),
    "text_teacher": Field(str, default="sentence"),
    "precision": Field(str, choices=("auto", "float32", "bfloat16")),
    "device": Field(str, choices=("auto", "cpu", "cuda", "mps")),
}  # fmt: skip
DEFAULTS = {key: field.default for key, field in FIELDS.items() if field.default is not ...}
EFFICIENCY = {"image_size": Field(int, 32, 1024), "repeats": Field(int, 1)}
ESTIMATE = {name: Field(float, 1.0) for name in ("run_seconds", "images", "report_seconds", "disk_mb")}
SEEDS = Field(int, 1, 1000)
VARIANT = {"text": Field(bool), "options": Field(dict), "parameters": Field(dict)}
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
        return paths.output_dir("results", self.profile, self.dataset) / self.run_name / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.run_name} seed{self.seed}"


def one_of(name: object, valid, what: str, where: str = "") -> None:
    """HamletError naming ``what`` and what is valid, where ``name`` is none of ``valid``."""
    if name not in valid:
        place = f" in {where}" if where else ""
        raise HamletError(f"unknown {what} {name!r}{place}; valid: {', '.join(map(str, valid))}")


def read_yaml(path: Path) -> dict:
    """A YAML mapping; HamletError names the file and the line of what is wrong."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except OSError as error:
        raise HamletError(f"{path} cannot be read ({error.strerror}); restore it from git") from error
    except UnicodeDecodeError as error:
        raise HamletError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise HamletError(f"{path}{line}: not YAML ({problem})") from error
    return _mapping(content, str(path))


def _mapping(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        got = "nothing" if value is None else repr(value)
        raise HamletError(f"{where}: expected a mapping (name: value), got {got}")
    return value


def check_values(values: object, where: str, fields: dict[str, Field] = FIELDS) -> dict:
    """The values, each checked by its field; HamletError names ``where``, the key and what is valid."""
    for key in _mapping(values, where):
        one_of(key, fields, "key", where)
    return {key: fields[key].check(key, value, where) for key, value in values.items()}


def profile_names() -> list[str]:
    known = {path.stem for path in paths.WORKFLOW.glob("*.yaml")}
    return sorted(known - {"reports", "variants"})


def load_variants() -> dict[str, dict]:
    """workflow/variants.yaml: name -> {text: whether text supervises, options: the model's, parameters: the run's}."""
    where = "workflow/variants.yaml"
    known = read_yaml(paths.WORKFLOW / "variants.yaml")
    for name, entry in known.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
            raise HamletError(f"{where}: {name!r} is no name of letters, digits and _")
        check_values(entry, f"{where} {name}", VARIANT)
        entry["parameters"] = check_values(entry.get("parameters", {}), f"{where} {name}.parameters")
    one_of("default", known, "variant", where)
    return known


def load_profile(name: str, above: tuple[str, ...] = ()) -> dict:
    """workflow/<name>.yaml, checked: seeds, parameters, datasets, models, efficiency, estimate, runs, extends.

    ``datasets`` and ``models`` hold overrides of the parameters and of ``seeds``; a data set's may name its ``runs``.
    Raises HamletError naming the key, what was expected and what is valid. ``above``: the profiles that extend it.
    """
    one_of(name, profile_names(), "profile", f"workflow/{above[-1]}.yaml extends" if above else "")
    if name in above:
        raise HamletError(f"workflow/{name}.yaml extends itself through {' -> '.join((*above, name))}")
    profile, where = read_yaml(paths.WORKFLOW / f"{name}.yaml"), f"workflow/{name}.yaml"
    if "extends" in profile:
        base = load_profile(profile["extends"], (*above, name))
        profile = _over({key: base[key] for key in SECTIONS if key != "runs"}, profile)
    for key in profile:
        one_of(key, (*SECTIONS, "extends"), "section", where)
    if missing := [key for key in SECTIONS if key not in profile]:
        raise HamletError(f"{where}: missing section {', '.join(missing)}")
    SEEDS.check("seeds", profile["seeds"], where)
    for section, fields in (("parameters", FIELDS), ("efficiency", EFFICIENCY), ("estimate", ESTIMATE)):
        given = (DEFAULTS if fields is FIELDS else {}) | check_values(profile[section], f"{where} {section}", fields)
        if missing := [key for key in fields if key not in given]:
            raise HamletError(f"{where} {section}: missing {', '.join(missing)}")
        profile[section] = {key: given[key] for key in fields}
    _check_runs(profile["runs"], f"{where} runs")
    for section in ("datasets", "models"):
        profile[section] = _mapping(profile[section] or {}, f"{where} {section}")
        for key, values in profile[section].items():
            place = f"{where} {section}.{key}"
            profile[section][key] = check_values(values or {}, place, FIELDS | {"seeds": SEEDS, "runs": Field(list)})
            if "runs" in profile[section][key]:
                _check_runs(profile[section][key]["runs"], f"{place} runs", profile["runs"])
    models = sorted({entry.partition("-")[0] for entry in profile["runs"]})
    for key in () if "extends" in profile else profile["models"]:
        one_of(key, models, "model", f"{where} models")
    return profile


def _over(base: object, own: object) -> object:
    """What ``own`` says over what ``base`` says, mapping by mapping."""
    if isinstance(base, dict) and isinstance(own or {}, dict):
        return base | {key: _over(base.get(key), value) for key, value in (own or {}).items()}
    return own


def _check_runs(runs: object, where: str, known: list[str] | None = None) -> None:
    if not isinstance(runs, list) or not runs or len({str(entry) for entry in runs}) != len(runs):
        raise HamletError(f"{where}: expected a list of different names, got {runs!r}")
    variants = load_variants()
    for entry in runs:
        if not isinstance(entry, str) or not re.fullmatch(r"\w+(-\w+)?", entry):
            raise HamletError(f"{where}: {entry!r} is no run; expected <model> or <model>-<variant>")
        one_of(entry.partition("-")[2] or "default", variants, "variant", f"{where} {entry!r}")
        one_of(entry, known or runs, "run", where)


def kind(dataset: str) -> str:
    """The name in profiles of a data set: a folder of photos has a slot of its own and is called "folder" there."""
    return "folder" if dataset.startswith("folder-") else dataset


def check_dataset(dataset: str) -> None:
    from hamlet.data import list_datasets  # here: a profile can be read without it

    if not re.fullmatch(r"folder-\w+-[0-9a-f]{8}", dataset):
        one_of(dataset, list_datasets(), "data set")


def expand(profile: str, dataset: str, models: list[str] | None = None, seeds: int | None = None) -> list[Run]:
    """The runs of a profile on a data set, all of seed 0 first so that every row of a table fills early.

    ``models`` restricts them to these run names (e.g. "gem_resnet18-text"); ``seeds`` replaces the profile's number
    of seeds. A run that the extended profile has too is that profile's. Raises HamletError for an unknown name.
    """
    loaded = load_profile(profile)
    check_dataset(dataset)
    section = loaded["datasets"].get(kind(dataset), {})
    for name in models or []:
        one_of(name, loaded["runs"], "model", f"profile {profile!r}")
    chosen = [name for name in section.get("runs", loaded["runs"]) if not models or name in models]
    if not chosen:
        raise HamletError(f"profile {profile!r} runs none of {', '.join(models or [])} on {dataset}")
    if seeds is not None:
        SEEDS.check("seeds", seeds, "--seeds")
    runs = []
    for name in chosen:
        model, _, variant = name.partition("-")
        count = seeds or (section | loaded["models"].get(model, {})).get("seeds", loaded["seeds"])
        runs += [_shared(Run(profile, dataset, model, variant or "default", seed)) for seed in range(count)]
    return sorted(runs, key=lambda run: run.seed)


def _shared(run: Run) -> Run:
    """The parent profile's run where it has the same one, told the same."""
    parent = load_profile(run.profile).get("extends")
    if parent is None:
        return run
    other = _shared(replace(run, profile=parent))
    runs = load_profile(other.profile)
    same = run.run_name in runs["datasets"].get(kind(run.dataset), {}).get("runs", runs["runs"])
    return other if same and parameters(other) == parameters(run) else run


def of_dataset(profile: str, dataset: str) -> dict:
    """What all runs of a profile on a data set are told, before the model's and the variant's own parameters."""
    loaded = load_profile(profile)
    return loaded["parameters"] | loaded["datasets"].get(kind(dataset), {})


def wants_card(profile: str, dataset: str) -> bool:
    """Whether the runs take a card where there is one."""
    return of_dataset(profile, dataset)["device"] in ("auto", "cuda")


def parameters(run: Run) -> dict:
    """What one run is told: the profile's parameters, then the data set's, the model's and the variant's.

    The text weights are 0 where the run uses no text, so that the record says so: text supervises HAMLET unless its
    variant says ``text: false``, and whatever else runs as a variant with ``text: true``.
    """
    loaded, variant = load_profile(run.profile), load_variants()[run.variant]
    merged = of_dataset(run.profile, run.dataset) | loaded["models"].get(run.model, {})
    if not variant.get("text", run.model.startswith("hamlet_")):
        merged |= dict.fromkeys(TEXT_WEIGHTS, 0.0)
    merged |= variant["parameters"]
    return {key: merged[key] for key in FIELDS}  # "seeds" and "runs" are no parameters


def options(run: Run) -> dict:
    """What the run's variant changes in the model."""
    return load_variants()[run.variant].get("options", {})


def cards() -> int:
    """NVIDIA GPUs that the driver lists; asked without importing torch."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
