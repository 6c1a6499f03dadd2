"""From a profile to its tables: say what will be done, verify what is there, let Snakemake do the rest.

``python -m hamlet.artifact.build quick --dataset scenes`` is what run_all.sh calls. Snakemake owns order, parallelism
and progress (workflow/Snakefile); this module owns what it cannot know: whether a stored result may still be used
(hamlet.artifact.results), how long the rest will take, and what to tell the user. A result that may not be used is
moved to results/<profile>/<dataset>/aside/, never deleted.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hamlet import paths
from hamlet.artifact import profiles, results
from hamlet.artifact.profiles import Field
from hamlet.artifact.run import aside, load_data, on_python_path, source_of
from hamlet.data import identity_of
from hamlet.data.decode import cores
from hamlet.errors import HamletError, one_line

STARTING = 30.0  # seconds that a run takes with next to no images: kernel, network, evaluation
REPORT = {"once": Field(str), "efficiency": Field(bool)}
REPORT |= dict.fromkeys(("tables", "figures", "after", "profiles"), Field(list))
ENDS = {"tables": ("csv", "md", "tex"), "figures": ("pdf", "png", "csv")}
# the engine ends with this process, and then all that it started does
ENGINE = "from hamlet.artifact.run import end_with_parent; end_with_parent({}); from snakemake.cli import main; main()"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def report_list() -> dict[str, dict]:
    """workflow/reports.yaml: reporting notebook -> what it waits for, and the "files" that it writes, from the
    output's root, {profile} and {dataset} left open."""
    found = profiles.read_yaml(path := paths.WORKFLOW / "reports.yaml")
    for name, entry in found.items():
        for key, value in profiles.check_values(entry, where := f"{path} {name}", REPORT).items():
            for item in value if isinstance(value, list) else ():
                Field(str).check(key, item, where)
        place = entry.get("once", "{profile}/{dataset}")
        entry["files"] = [f"{k}/{place}/{stem}.{end}" for k in ENDS for stem in entry.get(k, []) for end in ENDS[k]]
    return found


def reports(profile: str = "", dataset: str = "") -> dict[str, list[Path]]:
    """Reporting notebook -> its files for a profile and data set; without a name those of all data sets together."""
    return {
        str(name): [paths.output_dir() / path.format(profile=profile, dataset=dataset) for path in entry["files"]]
        for name, entry in report_list().items()
        if ("once" in entry) != bool(profile) and profile in entry.get("profiles", [profile])
    }


def efficiency_fault(profile: str, dataset: str, names: set[str]) -> str | None:
    """Why the stored measurement of costs may not be used, or None.

    Git keeps no weights. Without those of a HAMLET that was measured, what is new stays without a cost, since a new
    measurement would lose that row; a configuration trained again is a reason only where all weights are at hand.
    """
    try:
        record = results.load_efficiency(profile, dataset)
    except results.ResultError as error:
        return "not there yet" if isinstance(error, results.NoResult) else str(error)
    given, wanted = record["parameters"], profiles.load_profile(profile)["efficiency"]
    if (given["image_size"], given["images"]) != (wanted["image_size"], wanted["repeats"]):
        return "the profile asks for another image size or number of repeats now"
    first = results.first_runs(profile, dataset)
    gone = {name for name, run in first.items() if not (run.folder / "model.safetensors").is_file()}
    absent = sorted(names - set(record["models"]))
    if absent and not any(name.startswith("hamlet") for name in gone & set(record["models"])):
        return f"it lacks {', '.join(absent)}"
    changed = [name for name, run in first.items() if given["runs"].get(name) != results.stored_digest(run)]
    return f"trained again since: {', '.join(changed)}" if changed and not gone else None


class Build:
    """One build of a profile on a data set: the runs asked for, sorted by what is stored of them."""

    def __init__(self, options: argparse.Namespace):
        self.profile, self.dataset, self.keep = options.profile, options.dataset, options.keep
        self.loaded = profiles.load_profile(self.profile)
        self.runs = profiles.expand(self.profile, self.dataset, options.models, options.seeds)
        self.base = paths.output_dir("results", self.profile, self.dataset)
        own = {run.run_name for run in self.runs if run.profile == self.profile}
        self.over = own if options.fresh else set()  # configurations that --fresh makes again, all their seeds
        self.images = self.loaded["estimate"]["images"]  # to be trained on, as far as is known
        self.verify(None)

    def verify(self, data_hash: str | None) -> None:
        """Sort the runs asked for and whatever else is stored, which the tables hold too."""
        states = {
            run: results.check_result(run, data_hash)
            for run in dict.fromkeys([*self.runs, *results.stored_runs(self.profile, self.dataset)])
            if run.profile != self.profile or run.run_name not in self.over
        }
        self.unfit = {run: found for run, found in states.items() if found[0] in ("broken", "stale")}
        usable = ("sound", "stale") if self.keep else ("sound",)
        self.kept = [run for run, (state, _) in states.items() if state in usable]
        self.to_make = [run for run in self.runs if run not in self.kept]
        names = {run.run_name for run in [*self.runs, *self.kept]}
        self.fault = efficiency_fault(self.profile, self.dataset, names)
        if self.to_make and all((run.folder / "model.safetensors").is_file() for run in self.kept):
            self.fault = self.fault or "configurations are trained"

    def data_hash(self) -> str | None:
        """Content hash of the data set as it is now; None where it is not at hand and nothing has to be trained.

        Scenes are rendered by code, which is compared anyway, so they are loaded only to be trained on.
        """
        if not self.to_make and (self.dataset == "scenes" or not self.kept):
            return None
        settings = profiles.of_dataset(self.profile, self.dataset)
        try:
            data = load_data(self.dataset, settings)
            self.images = len(data.train)
            return data.content_hash
        except HamletError:
            if self.to_make:
                raise
            print("  data set            not at hand, so its content was not compared with the stored results'")
            return None

    def announce(self, jobs: int) -> None:
        """Say what is there, what will be made and why, how long it takes and how much disk."""
        estimate, walls = self.loaded["estimate"], {}
        on_card = profiles.wants_card(self.profile, self.dataset) and profiles.cards() > 0
        for run in self.kept:
            origin = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))["provenance"]
            if bool(origin.get("driver")) == on_card:  # a card's minutes say nothing of a processor's
                walls.setdefault(run.run_name, []).append(float(origin["wall_seconds"]))
        everything = [seconds for several in walls.values() for seconds in several]
        guess = max(STARTING, estimate["run_seconds"] * self.images / estimate["images"])
        typical = [statistics.median(everything or [guess])]
        work = sum(statistics.median(walls.get(run.run_name, typical)) for run in self.to_make)
        names, seeds = len({run.run_name for run in self.runs}), len({run.seed for run in self.runs})
        print(f"{self.profile} on {self.dataset}: {names} configurations x {seeds} seeds, {len(self.runs)} runs")
        print(f"  there and verified  {len(self.runs) - len(self.to_make)}")
        told: dict[tuple[str, str], list[str]] = {}
        for run, found in self.unfit.items():
            told.setdefault(found, []).append(str(run))
        for (state, why), runs in sorted(told.items(), key=lambda item: item[0][0]):
            few = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
            fate = "to be set aside; what is asked for is made again"
            fate = "kept, and labelled in the tables" if state == "stale" and self.keep else fate
            print(f"  {'rejected' if state == 'broken' else 'made otherwise':<19} {few}: {why}; {fate}")
        if also := [run for run in self.kept if run not in self.runs]:
            print(f"  in the tables too   {len(also)} stored runs of other seeds or configurations")
        if self.fault:
            print(f"  efficiency          to be measured: {self.fault}")
        print(f"  to make             {len(self.to_make)}, {jobs} at a time")
        print(f"  then                {', '.join(reports(self.profile, self.dataset))} -> tables/ and figures/")
        disk = estimate["disk_mb"] * (0.2 + 0.8 * len(self.to_make) / len(self.runs)) / 1000
        free = shutil.disk_usage(next(p for p in (self.base, *self.base.parents) if p.exists())).free / 1e9
        total, source = minutes(work / jobs + estimate["report_seconds"]), "recorded" if walls else "estimated"
        print(f"  about {total} ({source} times), {disk:.1f} GB of disk ({free:.0f} GB free)", flush=True)
        if profiles.wants_card(self.profile, self.dataset) and not self.kept and not profiles.cards():
            print("  no NVIDIA GPU here: that time is meant for one; a CPU takes many times as long", flush=True)
        if free < disk:
            raise HamletError(f"not enough disk: {disk:.1f} GB wanted at {self.base}, {free:.1f} GB free")


def set_aside(path: Path, why: str) -> None:
    """Move a stored run, configuration or measurement to aside/, if it is there."""
    if path.is_dir() and any(path.iterdir()):
        root = paths.output_dir()
        parts = path.relative_to(root).parts
        moved = aside(path, why, root.joinpath(*parts[:3], "aside", *parts[3:]))
        print(f"set aside: {path.relative_to(root)} -> {moved.relative_to(root)}")


@contextmanager
def only_one(slots: list[str]) -> Iterator[None]:
    """Hold the locks of these slots, which the system frees however this process ends."""
    with ExitStack() as held:
        for slot in slots:
            path = paths.output_dir("results", slot) / ".lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(path, timeout=0))
            except Timeout:
                told = f"another build of results/{slot} is running; wait for it or stop it first"
                raise HamletError(told) from None
        yield


def snakemake(slots: list[str], jobs: int, *again: str, **config: object) -> int:
    """Run the Snakefile for these slots, its progress on the terminal; Ctrl-C ends it and all that it started.

    again: reporting notebooks that are executed whatever the times of their files say, which a checkout changes.
    """
    # --ignore-incomplete: a result is renamed into place whole and verified by its digest, so Snakemake's mark of an
    # interrupted job must not have it deleted. --nolock: only_one's locks are free after kill -9, Snakemake's are not.
    flags = "--rerun-triggers mtime --ignore-incomplete --keep-going --nolock --drop-metadata"
    given = {"slots": ",".join(slots)} | {key: value for key, value in config.items() if value}
    command = [sys.executable, "-c", ENGINE.format(os.getpid()), "--snakefile", str(paths.WORKFLOW / "Snakefile")]
    command += ["--directory", str(paths.output_dir()), "--cores", str(jobs), *flags.split()]
    command += ["--forcerun", *(f"report_{name}" for name in again)]
    command += ["--quiet", "rules", "host", "reason", "--config", *(f"{k}={v}" for k, v in given.items())]
    on_python_path()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)  # kernels end with the process that started them
        process.wait()
        raise


def folder_slot(options: argparse.Namespace) -> str:
    """The slot of a folder of photos: folder-<name>-<content hash>, so that no two folders share their results."""
    if not os.environ.get("HAMLET_DATA"):
        raise HamletError("--dataset folder needs --data-root DIR: your images as DIR/<class>/<image>")
    root = Path(os.environ["HAMLET_DATA"]).expanduser().resolve()
    how = {"split_by": options.split_by or "class", "missing_captions": "class"}
    limit = profiles.of_dataset(options.profile, "folder")["limit"]
    name = re.sub(r"\W+", "_", options.name or root.name).strip("_") or "photos"
    slot = f"folder-{name}-{identity_of('folder', root, limit=limit, **how)[1][:8]}"
    paths.write_json(source_of(slot), {"root": str(root), "options": how})
    return slot


def everything(jobs: int, dry_run: bool) -> int:
    """``all``: every committed table and figure, made from what is stored; nothing is trained or measured."""
    slots = [
        f"{profile}/{dataset}"
        for profile in profiles.profile_names()
        for dataset in results.stored_datasets(profile)
        if (paths.output_dir("results", profile, dataset) / "efficiency" / "result.json").is_file()
    ]
    print(f"all: {', '.join(slots)}; audit, search and benchmarks from what is stored", flush=True)
    if dry_run:
        return 0
    root = paths.output_dir()
    for name in ("ranking", "library_differences", "search"):
        runpy.run_path(str(paths.ROOT / "benchmarks" / f"{name}.py"))["remake"](root)
    with only_one(slots):
        return snakemake(slots, jobs, *report_list(), stored=1, once=1)


def carry_out(build: Build, jobs: int, options: argparse.Namespace) -> int:
    """Set aside, load the data, run the engine, and name what was written."""
    started, root = time.time(), paths.output_dir()
    for name in sorted(build.over):
        set_aside(build.base / name, "previous")
    build.verify(build.data_hash())  # only now is the data set's content known
    build.announce(jobs)
    for run in build.unfit:
        if run not in build.kept:
            set_aside(run.folder, "rejected")
    if build.fault:
        set_aside(build.base / "efficiency", "rejected")
    config = {"models": "+".join(options.models or []), "seeds": options.seeds}
    again = reports(build.profile, build.dataset)
    if snakemake([f"{build.profile}/{build.dataset}"], jobs, *again, **config):
        print("\nNot everything could be made; what was finished is kept. The same command goes on from here.")
        # --quiet rules hides them in Snakemake
        for log in sorted((root / "logs").rglob("*.log")):
            last = (log.read_text(errors="replace").strip() or " ").splitlines()[-1]
            if log.stat().st_mtime > started and re.match(r"error: |[\w.]*(Error|Exception)\b", last):
                print(f"  {log.stem}: {last}; more in {log.relative_to(root)}")
        return 1
    folders = [paths.output_dir(kind, build.profile, build.dataset) for kind in ENDS]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    print(f"\nDone in {minutes(time.time() - started)}. {len(files)} files:")
    for path in files:
        print(f"  {path.relative_to(root)}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    usage = "./run_all.sh [COMMAND] [OPTIONS]; --help says what it takes"
    parser = argparse.ArgumentParser(prog="run_all.sh", usage=usage, allow_abbrev=False)
    parser.add_argument("profile", nargs="?", default="quick")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--data-root")
    parser.add_argument("--name")
    parser.add_argument("--split-by", choices=("class", "image"))
    parser.add_argument("--models", type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    options = parser.parse_args(argv)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs takes a whole number of at least 1, got {options.jobs}")
    if options.dataset != "folder" and (options.name or options.split_by):
        parser.error("--name and --split-by are for a folder of photos: --dataset folder --data-root DIR")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with one_line(argv):
        if options.profile == "all":
            return everything(options.jobs or cores(), options.dry_run)
        if options.data_root:
            if not (root := Path(options.data_root).expanduser()).is_dir():
                raise HamletError(f"data root {options.data_root!r} is not a folder; create it or name another")
            os.environ["HAMLET_DATA"] = str(root.resolve())
        if options.dataset == "folder":
            options.dataset = folder_slot(options)
        build = Build(options)
        # one run per card where the profile may use cards and there are any, else one per core
        jobs = options.jobs or (profiles.wants_card(build.profile, build.dataset) and profiles.cards()) or cores()
        if options.dry_run:
            if options.fresh:
                print(f"--fresh: what is stored of {', '.join(sorted(build.over))} would be set aside first")
            build.verify(build.data_hash() if build.kept or profiles.kind(build.dataset) == "folder" else None)
            build.announce(jobs)
            return 0
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores the second on purpose
                signal.signal(number, signal.default_int_handler)
        with only_one([f"{build.profile}/{build.dataset}"]):
            return carry_out(build, jobs, options)


if __name__ == "__main__":
    sys.exit(main())
