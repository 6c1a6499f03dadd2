"""One run: check what is asked, execute the notebook, verify and store the result as a whole or not at all.

``python -m hamlet.artifact.run --profile quick --dataset scenes --model gem_resnet18`` does exactly one run;
``notebook NAME`` executes a reporting notebook.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import cycle
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from hamlet import paths
from hamlet.artifact import profiles
from hamlet.artifact.code import code_hashes, json_hash
from hamlet.artifact.profiles import FIELDS, Run
from hamlet.artifact.results import PACKAGES, check_result, digest
from hamlet.errors import HamletError, one_line


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
    """Check names and types, and give the run's settings: the profile's, changed by ``overrides`` (by name).

    Without ``output`` it works in a folder of the cache, as when a notebook is opened by hand; with it, it may have a
    model that no profile names. Raises HamletError for an unknown name, with the valid ones, or a wrong type.
    """
    os.register_at_fork(after_in_child=die_with_parent)  # the workers that draw the scenes
    run = Run(profile, dataset, model, variant, seed)
    known = profiles.load_profile(profile)["runs"]
    profiles.check_dataset(dataset)
    profiles.one_of(variant, profiles.load_variants(), "variant")
    if run.run_name not in known:
        from hamlet.models import list_models

        if not output or model not in list_models():
            raise HamletError(f"profile {profile!r} has no run {run.run_name!r}; it has {', '.join(known)}")
    if type(seed) is not int or seed < 0:
        raise HamletError(f"seed must be a whole number of at least 0, got {seed!r}")
    settings = profiles.parameters(run) | profiles.check_values(overrides or {}, "overrides")
    name = f"{profile}-{dataset}-{run.run_name}-seed{seed}"
    return Job(run, settings, Path(output) if output else paths.cache_dir() / "notebooks" / name)


def source_of(dataset: str) -> Path:
    """Where a folder data set's slot remembers its photos: {"root": ..., "options": {...}}; no part of a result."""
    return paths.cache_dir() / "folders" / f"{dataset}.json"


def load_data(dataset: str, settings: dict, root: str | Path | None = None):
    """The data set at the size and limit that the settings ask for."""
    from hamlet.data import decode_size, load_dataset

    how = {"size": decode_size(settings["image_size"]), "limit": settings["limit"]}
    if profiles.kind(dataset) == "folder":
        if not (known := source_of(dataset)).is_file():
            raise HamletError(
                f"{dataset}: nothing says where its photos are; ./run_all.sh --dataset folder --data-root DIR"
            )
        source = json.loads(known.read_text(encoding="utf-8"))
        return load_dataset("folder", root=source["root"], **how, **source["options"])
    return load_dataset(dataset, root=root or None, **how)


def build_model(run: Run, settings: dict):
    """The run's model, initialised from its seed, channels last, with the text layer that its text terms need."""
    import torch

    from hamlet.distillation import LSA_DIM
    from hamlet.models import create_model
    from hamlet.training import choose_device, seed_everything

    seed_everything(run.seed)
    options = profiles.options(run)
    terms = [term for term in ("alignment", "proxies") if settings[f"text_{term}"] > 0]
    if terms:
        options = {"text": terms[0] if len(terms) == 1 else "both"} | options
    if terms and settings["text_teacher"] == "lsa":
        options = {"text_dim": LSA_DIM} | options
    model = create_model(run.model, pretrained=settings["pretrained"], **options)
    # bfloat16 speeds ResNets on a CPU and slows MobileNets' depthwise convolutions; heads gain in both
    on_cpu = choose_device(settings["device"]).type == "cpu"
    model.float32_backbone = on_cpu and not model.backbone_name.startswith("resnet")
    return model.to(memory_format=torch.channels_last)


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
        "versions": {name: metadata.version(name) for name in (*PACKAGES, "pandas")},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_card else _processor(),
        "driver": torch.version.cuda if on_card else None,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return f"CPU ({named[1].strip() if named else platform.processor() or platform.machine()})"


def store(job: Job, data, model, untrained, trained, evaluation) -> Path:
    """Write a finished run into the job's folder: weights, curves, per-query values, examples, result.json last.

    Args:
        untrained: ``Evaluation`` of the default protocol before training. trained: ``Trained``. evaluation: after it.
    """
    from hamlet.evaluation import example_neighbours, words
    from hamlet.models import count_parameters, save_model

    job.folder.mkdir(parents=True, exist_ok=True)
    curves, neighbours = trained.curves, example_neighbours(data, evaluation.embeddings)
    evaluation.per_query.to_parquet(job.folder / "per_query.parquet", index=False)
    neighbours.to_parquet(job.folder / "neighbours.parquet", index=False)
    curves.to_csv(job.folder / "curves.csv", index=False, float_format="%.9g")
    (job.folder / "thumbnails.webp").write_bytes(thumbnails(data, neighbours))
    card = {"image_size": job.settings["image_size"], "teacher": job.settings["text_teacher"]}
    card |= {"data": f"{data.name}, {len(data.train)} images", "classes": data.class_names}
    save_model(model, job.folder / "model.safetensors", card | {"metrics": evaluation.metrics["default"]})
    listed = ("per_query.parquet", "neighbours.parquet", "curves.csv", "thumbnails.webp")
    code, started = code_hashes(job.run), psutil.Process().create_time()
    record = {
        "schema": 2,
        "run": vars(job.run),
        "parameters": job.settings,
        "options": profiles.options(job.run),
        "metrics": evaluation.metrics,
        "untrained": untrained.metrics,
        "training": {
            "epochs": len(curves),
            "images": trained.images,
            "seconds": trained.seconds,
            "final_loss": float(curves["loss"].iloc[-1]),
            "bf16": trained.bf16,
            "batch_size": job.settings["batch_size"],
            "images_per_class": trained.images_per_class,
        },
        "model": {
            "parameters": count_parameters(model),
            "embedding_dim": model.embedding_dim,
            "descriptor_bytes": model.descriptor_bytes,
        },
        "provenance": {
            **provenance(str(trained.device)),
            "code": code,
            "code_sha256": json_hash(code),
            "dataset_hash": data.content_hash,
            "initial_weights": model.initial_weights,
            "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_seconds": time.time() - started,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
        "excluded": len(data.excluded),
        "files": {n: paths.sha256(job.folder / n) for n in listed},
    }
    if model.text_tower is not None and job.settings["text_teacher"] != "lsa":  # which is fitted anew to each list
        record["words"] = words(model, data, evaluation, job.settings["text_teacher"])
    paths.write_json(job.folder / "result.json", record | {"digest": digest(record)})
    return job.folder / "result.json"


def thumbnails(data, neighbours) -> bytes:
    """The images that a run's ``neighbours`` name, small, so that figures need no data set (pictures.unpack)."""
    import numpy as np

    from hamlet.artifact.pictures import pack

    splits = (data.query, data.gallery or data.query)
    images = {path: image for split in splits for path, image in zip(split.paths, split.images, strict=True)}
    names = list(dict.fromkeys([*neighbours["query_path"], *neighbours["path"]]))
    return pack(np.stack([images[name] for name in names]), names)


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """One folder for everything temporary of this process and its kernel; those of dead processes are swept first."""
    before = tempfile.gettempdir()
    base = Path(before) / f"hamlet-{os.getuid()}"
    base.mkdir(exist_ok=True)
    for left in base.glob("k*"):
        if not psutil.pid_exists(int(left.name[1:])):
            shutil.rmtree(left, ignore_errors=True)
    own = base / f"k{os.getpid()}"
    own.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(own)
    try:
        yield own
    finally:
        os.environ["TMPDIR"] = tempfile.tempdir = before
        shutil.rmtree(own, ignore_errors=True)


def on_python_path() -> None:
    """Let the processes started from now on find this code first, whatever folder they stand in."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))


def die_with_parent() -> None:
    """On Linux, this process is killed at once when the thread that started it ends, however that ended."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end_with_parent(parent: int | None = None) -> None:
    """From now on this process and all that it starts end when its parent (a process id) does, however that ended."""
    parent = parent or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        raise HamletError(f"no notebook {name!r}; there are {valid}")
    on_python_path()
    output.parent.mkdir(parents=True, exist_ok=True)
    with own_temporary_folder() as folder:
        # IPC in a folder of its own: over TCP about one kernel in a hundred fails to start when many start at once
        config = Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "k")}})
        # a kernel is interrupted before it is shut down, and would report that as an error
        quiet = ["--IPKernelApp.log_level=50"]
        try:
            papermill.execute_notebook(
                str(source), str(output), parameters=parameters, kernel_name="python3", cwd=str(paths.NOTEBOOKS),
                progress_bar=False, request_save_on_cell_execute=True, config=config, extra_arguments=quiet,
            )  # fmt: skip
        except papermill.PapermillExecutionError as error:
            raise HamletError(
                f"{name}, cell {error.exec_count}: {error.ename}: {error.evalue}; see {output}"
            ) from error


@contextmanager
def leased_card(device: str):
    """Hold one NVIDIA card for this run by a file lock, and show it alone to the kernel; nothing to do on a CPU."""
    cards = profiles.cards() if device in ("auto", "cuda") else 0
    if not cards or "CUDA_VISIBLE_DEVICES" in os.environ:
        yield
        return
    folder = Path(tempfile.gettempdir()) / "hamlet-cards"
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for card in cycle(range(cards)):
            with suppress(Timeout):
                stack.enter_context(FileLock(folder / f"{card}.lock", timeout=0.1))
                break
        os.environ["CUDA_VISIBLE_DEVICES"] = str(card)
        yield


def aside(path: Path, why: str, target: Path | None = None) -> Path:
    """Rename ``path`` to <target>.<why>-<n>, the first free n (``target``: the path itself by default)."""
    target, n = target or path, 1
    target.parent.mkdir(parents=True, exist_ok=True)
    while (moved := target.with_name(f"{target.name}.{why}-{n}")).exists():
        n += 1
    path.rename(moved)
    return moved


def make(run: Run, data_root: str = "", overrides: dict | None = None, output: str = "", keep: bool = False) -> Path:
    """Do one run and rename it into place -> folder of the result.

    A stored result that answers to what is asked is kept (``keep``: one made by other code or from other parameters
    too); another run's is set aside, never deleted; a folder that holds anything else is refused.
    """
    target = Path(output) if output else run.folder
    job = open_job(*vars(run).values(), output, overrides)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.partial")
    with FileLock(target.with_name(f".{target.name}.lock")):
        if _there(run, job.settings, target, keep):
            return target
        (work / "result.json").unlink(missing_ok=True)
        stamp, begun, code = work / "code.json", work / "checkpoint.pt", json.dumps(code_hashes(run))
        if begun.is_file() and not (stamp.is_file() and stamp.read_text() == code):
            print(f"{run}: begun by other code; anew: {aside(begun, 'other-code')}", flush=True)
        work.mkdir(exist_ok=True)
        stamp.write_text(code)
        asked = vars(run) | {"data_root": data_root, "output": str(work), "overrides": overrides or {}}
        if job.settings["device"] == "cpu":
            # one thread a run: two runs at once on two cores beat one run on both, and the bits repeat
            os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
            # glibc: keep freed memory; handing 40 MB gradients back at every step costs up to a tenth of it
            os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="100000000000")
        with leased_card(job.settings["device"]):
            execute("01_train_evaluate", work / "executed.ipynb", asked)
        if not (work / "result.json").is_file():
            raise HamletError(f"{run}: the notebook ended without a result; see {work / 'executed.ipynb'}")
        # the latter two of killed processes: our own writing and that of safetensors
        for rest in [stamp, *work.glob("checkpoint*"), *work.glob(".*.partial*"), *work.glob(".tmp*")]:
            rest.unlink(missing_ok=True)
        if target.is_dir():
            target.rmdir()  # empty, or _there would have said so
        work.replace(target)
    record = json.loads((target / "result.json").read_text(encoding="utf-8"))
    score, seconds = record["metrics"]["default"]["mAP"], record["provenance"]["wall_seconds"]
    print(f"{run!s:<34} mAP {score:.3f}  {seconds:.0f} s", flush=True)
    return target


def _there(run: Run, settings: dict, target: Path, keep: bool) -> bool:
    """Whether the folder holds the run's result; what holds another's is set aside, what holds no result is refused."""
    if target.exists() and not target.is_dir():
        raise HamletError(f"{target} is no folder; name an empty or a new one")
    if target.is_dir() and any(target.iterdir()) and not (target / "result.json").exists():
        raise HamletError(f"{target} holds other files than a result; name an empty or a new folder")
    state, why = check_result(run, settings=settings, folder=target)
    if state == "sound" or (state == "stale" and keep):
        print(f"{run}: there already, nothing to do{f' (kept: {why})' if why else ''}")
        return True
    if state == "broken" and "another run" not in why:
        raise HamletError(f"{target} holds a result that may not be used: {why}")
    if state != "absent":
        print(f"{run}: {why}; set aside: {aside(target, 'previous')}", flush=True)
    return False


def override(text: str) -> tuple[str, object]:
    """("epochs", 3) from "epochs=3"; HamletError with the valid names for anything else."""
    name, equals, value = text.partition("=")
    if not equals:
        raise HamletError(f"--set {text!r}: expected name=value; names: {', '.join(FIELDS)}")
    profiles.one_of(name, FIELDS, "parameter", f"--set {text!r}")
    typed: object = value
    if FIELDS[name].kind is not str:
        with suppress(ValueError):
            typed = json.loads(value.lower())
    return name, FIELDS[name].check(name, typed, f"--set {text!r}")


def main(arguments: list[str] | None = None) -> None:
    """The command line: --help says what it takes."""
    parser = argparse.ArgumentParser(prog="python -m hamlet.artifact.run", description=__doc__.splitlines()[0])
    parser.add_argument("action", nargs="?", default="run", choices=("run", "notebook"))
    parser.add_argument("name", nargs="?", default="", help="the notebook, for the action notebook")
    parser.add_argument("--profile", default="quick", help="one of workflow/*.yaml")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--model", default="hamlet_resnet18")
    parser.add_argument("--variant", default="default", help="one of workflow/variants.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", default="", help="folder that holds data sets (also: HAMLET_DATA)")
    parser.add_argument("--output", default="", help="result folder; needed with --set: no profile is altered")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides")
    parser.add_argument("--keep", action="store_true", help="a result made by other code counts as there")
    parser.add_argument("--with-parent", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--traceback", action="store_true", help="show the whole error")
    given = parser.parse_args(arguments)
    if given.overrides and not given.output:
        parser.error("--set makes another experiment than the profile: name its folder with --output")
    if given.with_parent:
        end_with_parent()
    with one_line(arguments):
        if given.action == "notebook":
            profiles.load_profile(given.profile)
            folder = paths.output_dir("logs", given.profile, given.dataset)
            asked = {"profile": given.profile, "dataset": given.dataset}
            execute(given.name, folder / f"{given.name}.ipynb", asked)
        else:
            run = Run(given.profile, given.dataset, given.model, given.variant, given.seed)
            output = str(Path(given.output).resolve()) if given.output else ""
            make(run, given.data_root, dict(map(override, given.overrides)), output, given.keep)


if __name__ == "__main__":
    main()
