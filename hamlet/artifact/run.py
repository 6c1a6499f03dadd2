"""One run: check what is asked, execute the notebook, verify and store the result as a whole or not at all.

``python -m hamlet.artifact.run --profile quick --dataset scenes --model gem_resnet18`` does exactly one run;
``prepare`` builds the caches of a data set, ``notebook NAME`` executes a reporting notebook.
"""

import argparse
import gc
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import yaml

from hamlet import paths
from hamlet.artifact import profiles as workflow
from hamlet.artifact.profiles import FIELDS, Run

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "pytorch-metric-learning",
    "numpy",
    "pandas",
)
DEVICE_FIELDS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """A checked run, its typed settings, and the folder that it works in."""

    run: Run
    settings: dict
    folder: Path


def open_job(
    profile: str, dataset: str, model: str, variant: str = "default", seed: int = 0,
    output: str = "", overrides: dict | None = None,
) -> Job:  # fmt: skip
    """Check names and types, and give the run's settings: the profile's, changed by ``overrides``.

    Args:
        output: work folder; empty for one in the cache, as when a notebook is opened by hand.
        overrides: run parameters by name (workflow/*.yaml lists them); their types are checked.

    Raises:
        ValueError: unknown profile, model, variant or parameter, or a wrong type, with the valid ones.
    """
    gc.set_threshold(50_000)  # imports make objects that stay: looking through them every 700 costs a second
    run = Run(profile, dataset, model, variant, seed)
    if dataset not in workflow.DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; valid: {', '.join(workflow.DATASETS)}")
    known = workflow.load_profile(profile)["runs"]
    if run.run_name not in known:
        raise ValueError(f"profile {profile!r} has no run {run.run_name!r}; it has {', '.join(known)}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
    settings = workflow.parameters(run) | workflow.check_values(overrides or {}, "overrides")
    name = f"{profile}-{dataset}-{run.run_name}-seed{seed}"
    return Job(run, settings, Path(output) if output else paths.cache_dir() / "notebooks" / name)


def load_data(dataset: str, settings: dict, root: str | Path | None = None):
    """The data set at the size and limit that the settings ask for."""
    from hamlet.data import decode_size, load_dataset

    return load_dataset(
        dataset, root=root or None, size=decode_size(settings["image_size"]), limit=settings["limit"]
    )


def code_hash() -> str:
    """sha256 over the package's sources and the code cells of the training notebook."""
    cells = json.loads((paths.NOTEBOOKS / "01_train_evaluate.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [json.dumps([c["source"] for c in cells if c["cell_type"] == "code"]).encode()]
    parts += [p.read_bytes() for p in sorted((paths.ROOT / "hamlet").rglob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(device: str) -> dict:
    """Where a number comes from: commit, lock, versions, device, threads. A copy without git knows no commit."""
    import torch

    device = torch.device(device)
    on_card = device.type == "cuda"
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "hamlet", "notebooks/01_train_evaluate.ipynb", "workflow")
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(changed),
        "lock_sha256": paths.sha256(paths.LOCK),
        "code_sha256": code_hash(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_card else _processor(),
        "driver": torch.version.cuda if on_card else None,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else platform.processor() or platform.machine()})"


def store(job: Job, data, model, untrained, trained, evaluation) -> Path:
    """Write a finished run into the job's folder: weights, curves, per-query values, examples, result.json last.

    Args:
        untrained: ``Evaluation`` of the default protocol before training. trained: ``Trained``. evaluation: after it.
    """
    from hamlet.evaluation import example_neighbours
    from hamlet.models import count_parameters, save_model

    job.folder.mkdir(parents=True, exist_ok=True)
    evaluation.per_query.to_parquet(job.folder / "per_query.parquet", index=False)
    example_neighbours(data, evaluation.embeddings).to_parquet(job.folder / "neighbours.parquet", index=False)
    trained.curves.to_csv(job.folder / "curves.csv", index=False, float_format="%.9g")
    save_model(model, job.folder / "model.safetensors")
    listed = ("per_query.parquet", "neighbours.parquet", "curves.csv")
    curves = trained.curves
    record = {
        "schema": 1,
        "run": vars(job.run),
        "parameters": job.settings,
        "metrics": evaluation.metrics,
        "untrained": untrained.metrics,
        "training": {
            "epochs": len(curves),
            "images": trained.images,
            "seconds": trained.seconds,
            "final_loss": float(curves["loss"].iloc[-1]),
            "bf16": trained.bf16,
        },
        "model": {
            "parameters": count_parameters(model),
            "embedding_dim": model.embedding_dim,
            "descriptor_bytes": model.descriptor_bytes,
        },
        "provenance": {
            **provenance(str(trained.device)),
            "dataset_hash": data.content_hash,
            "initial_weights": "ImageNet (timm)" if job.settings["pretrained"] else "from scratch",
            "started": datetime.fromtimestamp(_process_start(), UTC).isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": time.time() - _process_start(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        "excluded": len(data.excluded),
        "files": {n: paths.sha256(job.folder / n) for n in listed},
    }
    record = json.loads(json.dumps(record, allow_nan=False))
    write_json(job.folder / "result.json", record | {"digest": workflow.digest(record)})
    gc.freeze()  # the process ends soon: no search of 4,000 modules for cycles, which takes above a second
    return job.folder / "result.json"


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def write_json(path: Path, record: dict) -> None:
    """Write a record whole or not at all."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with paths.replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def execute(name: str, output: Path, parameters: dict) -> None:
    """Execute notebooks/<name>.ipynb in a kernel of its own and save it, outputs included, to ``output``.

    papermill calls a run complete that was killed or timed out, so the caller looks for what it should have made.
    """
    # jsonschema would compile a grammar of IRIs (a second of every process), which no notebook's schema asks for
    sys.modules.setdefault("rfc3987_syntax", None)
    import papermill
    from traitlets.config import Config

    source = paths.NOTEBOOKS / f"{name}.ipynb"
    if not source.is_file():
        valid = ", ".join(p.stem for p in sorted(paths.NOTEBOOKS.glob("*.ipynb")))
        raise ValueError(f"no notebook {name!r}; there are {valid}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))
    output.parent.mkdir(parents=True, exist_ok=True)
    # IPC in a folder of its own: over TCP about one kernel in a hundred fails to start when many start at once
    with tempfile.TemporaryDirectory(prefix="k") as sockets:
        config = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(sockets) / "k")}})
        papermill.execute_notebook(
            str(source), str(output), parameters=parameters, kernel_name="python3", cwd=str(paths.NOTEBOOKS),
            progress_bar=False, request_save_on_cell_execute=True, config=config,
        )  # fmt: skip


@contextmanager
def leased_card(device: str):
    """Hold one NVIDIA card for this run by a file lock, and show it alone to the kernel; nothing to do on a CPU."""
    from filelock import FileLock, Timeout

    cards = workflow.cards() if device in ("auto", "cuda") else 0
    if not cards or "CUDA_VISIBLE_DEVICES" in os.environ:
        yield
        return
    folder = Path(tempfile.gettempdir()) / "hamlet-cards"
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        while True:
            for card in range(cards):
                try:
                    stack.enter_context(FileLock(folder / f"{card}.lock", timeout=0))
                except Timeout:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"] = str(card)
                yield
                return
            time.sleep(1.0)


def make(run: Run, data_root: str = "", overrides: dict | None = None, output: str = "") -> Path:
    """Do one run and rename it into place; a stored result that still answers is kept. -> folder of the result."""
    from filelock import FileLock

    target = Path(output) if output else run.folder
    job = open_job(*vars(run).values(), overrides=overrides)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.partial")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if (target / "result.json").exists() and not overrides:
            why = workflow.check_result(run) if not output else None
            if why is None:
                print(f"{run}: there already, nothing to do")
                return target
            raise SystemExit(
                f"{target} holds a result that may not be used: {why}. Move it away and start again."
            )
        if target.is_dir() and any(target.iterdir()) and not (target / "result.json").exists():
            raise SystemExit(f"{target} holds other files than a result; name an empty or a new folder")
        (work / "result.json").unlink(missing_ok=True)
        asked = vars(run) | {"data_root": data_root, "output": str(work), "overrides": overrides or {}}
        if job.settings["device"] == "cpu":
            # one thread a run: two runs at once on two cores beat one run on both, and the bits repeat
            os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
            # glibc: keep freed memory; handing 40 MB gradients back at every step costs up to a tenth of it
            os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000")
        with leased_card(job.settings["device"]):
            execute("01_train_evaluate", work / "executed.ipynb", asked)
        if not (work / "result.json").is_file():
            raise SystemExit(f"{run}: the notebook ended without a result; see {work / 'executed.ipynb'}")
        for rest in [
            work / "checkpoint.safetensors",
            *work.glob(".*.partial*"),
        ]:  # the latter of killed processes
            rest.unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    print(f"{run}: {target / 'result.json'}")
    return target


def prepare(profile: str, dataset: str, data_root: str = "") -> Path:
    """Build the decoded cache and the caption embeddings that a profile needs, and stamp them as complete."""
    from hamlet.distillation import encode_text

    loaded = workflow.load_profile(profile)
    settings = loaded["parameters"] | loaded["datasets"].get(dataset, {})
    data = load_data(dataset, settings, data_root)
    if settings["text_guidance"] > 0 or settings["text_alignment"] > 0:
        encode_text(data.train.captions)
    path = workflow.stamp(profile, dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path, {"dataset_hash": data.content_hash, "images": {k: len(v) for k, v in data.splits.items()}}
    )
    print(f"{dataset}: {path}")
    return path


def _override(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected name=value, got {text!r}; names: {', '.join(FIELDS)}")
    kind = FIELDS[name][0] if name in FIELDS else str
    try:
        return name, yaml.safe_load(value) if kind in (bool,) or value == "null" else kind(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hamlet.artifact.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("action", nargs="?", default="run", choices=("run", "prepare", "notebook"))
    parser.add_argument("name", nargs="?", help="the notebook, for the action notebook")
    parser.add_argument("--profile", default="quick", help="one of workflow/*.yaml")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--model", default="hamlet_resnet18")
    parser.add_argument("--variant", default="default", choices=workflow.VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data-root", default=os.environ.get("HAMLET_DATA", ""), help="folder that holds data sets"
    )
    parser.add_argument(
        "--output", default="", help="result folder; needed with --set, so that no profile is altered"
    )
    parser.add_argument(
        "--set", type=_override, action="append", default=[], metavar="NAME=VALUE", dest="overrides"
    )
    given = parser.parse_args(arguments)
    if given.overrides and not given.output:
        parser.error("--set makes another experiment than the profile: name its folder with --output")
    try:
        if given.action == "prepare":
            prepare(given.profile, given.dataset, given.data_root)
        elif given.action == "notebook":
            workflow.load_profile(given.profile)
            folder = paths.output_root() / "logs" / given.profile / given.dataset
            asked = {"profile": given.profile, "dataset": given.dataset}
            execute(given.name or "", folder / f"{given.name}.ipynb", asked)
        else:
            run = Run(given.profile, given.dataset, given.model, given.variant, given.seed)
            make(
                run,
                given.data_root,
                dict(given.overrides),
                str(Path(given.output).resolve()) if given.output else "",
            )
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
