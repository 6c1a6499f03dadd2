"""What tables and figures are made of: the notebooks and their files, the list of runs, the efficiency measurement.

workflow/Snakefile and hamlet.artifact.build ask here what has to be made; it imports no torch.
"""

import hashlib
import json
import os
from pathlib import Path

import yaml

from hamlet import paths
from hamlet.artifact import profiles as workflow
from hamlet.artifact.profiles import Run


def reports(profile: str, dataset: str) -> dict[str, list[Path]]:
    """Reporting notebook -> the files that it writes, as workflow/reports.yaml lists them."""
    listed = yaml.safe_load((paths.WORKFLOW / "reports.yaml").read_text(encoding="utf-8"))
    tables, figures = paths.tables_dir(profile, dataset), paths.figures_dir(profile, dataset)
    return {
        name: [tables / f"{stem}.{kind}" for stem in entry.get("tables", []) for kind in ("csv", "md", "tex")]
        + [figures / f"{stem}.{kind}" for stem in entry.get("figures", []) for kind in ("pdf", "png", "csv")]
        for name, entry in listed.items()
        if dataset in entry.get("datasets", [dataset])
    }


def check_efficiency(profile: str, dataset: str, run_names: set[str]) -> str | None:
    """Why the stored efficiency measurement may not be used, or None.

    A configuration trained again is a reason only where all weights are at hand (git does not keep them).
    """
    path = paths.results_dir(profile, dataset) / "efficiency" / "result.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["digest"] != workflow.digest(record):
            return "its result.json was changed after the measurement"
        given, wanted = record["parameters"], workflow.load_profile(profile)["efficiency"]
        if (given["image_size"], given["images"]) != (wanted["image_size"], wanted["repeats"]):
            return "the profile asks for another image size or number of repeats now"
        if absent := sorted(run_names - set(record["models"])):
            return f"it lacks {', '.join(absent)}"
        first = [run for run in workflow.stored_runs(profile, dataset) if run.seed == 0]
        if all((run.folder / "model.safetensors").exists() for run in first):
            now = {r.run_name: json.loads((r.folder / "result.json").read_text())["digest"] for r in first}
            if changed := sorted(name for name in now if given["runs"].get(name) != now[name]):
                return f"trained again since: {', '.join(changed)}"
    except FileNotFoundError:
        return "not there yet"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"its result.json cannot be read ({type(error).__name__}: {error})"
    return None


def listing(profile: str, dataset: str) -> Path:
    """What the tables are made of beside the results' content: the list of runs and the reporting code."""
    return paths.results_dir(profile, dataset) / ".inventory.json"


def note(runs: list[Run]) -> None:
    """Rewrite the inventory if it changed, or if the last build did not end: its new time remakes all tables.

    Modification times alone would not do: they say nothing after a git checkout, and a run taken away leaves
    none.
    """
    profile, dataset = runs[0].profile, runs[0].dataset
    sources = {}
    for path in sorted(
        [*(paths.ROOT / "hamlet").glob("*.py"), *paths.PAPER.glob("*"), *paths.NOTEBOOKS.glob("*.ipynb")]
    ):
        content = path.read_bytes()
        if path.suffix == ".ipynb":  # stored outputs are no source
            cells = json.loads(content)["cells"]
            content = json.dumps([c["source"] for c in cells if c["cell_type"] == "code"]).encode()
        sources[path.name] = hashlib.sha256(content).hexdigest()
    names = sorted({str(run) for run in [*workflow.stored_runs(profile, dataset), *runs]})
    rest = [name for name in workflow.stored_datasets(profile) if name != dataset]
    others = [run for name in rest for run in workflow.stored_runs(profile, name)]
    elsewhere = {  # the probability of improvement is over all data sets
        f"{run.dataset} {run}": paths.sha256(run.folder / "result.json") for run in others
    }
    text = json.dumps({"runs": names, "elsewhere": elsewhere, "sources": sources}, indent=1)
    path = listing(profile, dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = path.with_suffix(".building")
    if mark.exists() or not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    mark.touch()


def default_jobs(profile: str) -> int:
    """Runs at a time: one per card where the profile may use cards and there are any, else one per core."""
    on_cards = workflow.load_profile(profile)["parameters"]["device"] in ("auto", "cuda") and workflow.cards()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return on_cards or cores
