"""From a profile to its tables: say what will be done, verify what is there, let Snakemake do the rest.

``python -m hamlet.artifact.build quick --dataset scenes`` is what run_all.sh calls. Snakemake owns order and
parallelism (workflow/Snakefile); this module owns what Snakemake cannot know: whether a stored result may
still be used (``workflow.check_result``), how long the rest will take, and what to tell the user.
A result that may not be used is moved to results/<profile>/<dataset>/aside/, never deleted.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from hamlet import paths
from hamlet.artifact import inventory
from hamlet.artifact import profiles as workflow
from hamlet.artifact.profiles import Run

MARK = "HAMLET_BUILD"  # every process of a build carries it, so that a killed build's leftovers are found


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def shown(path: Path) -> str:
    """The path as the user would type it from the project's folder."""
    return str(path.relative_to(paths.output_root()) if path.is_relative_to(paths.output_root()) else path)


def set_aside(path: Path, why: str) -> Path:
    """Move a stored run, configuration or measurement to aside/<its name>.<why>-<n>, the first free n."""
    base = paths.results_dir(*path.relative_to(paths.output_root() / "results").parts[:2])
    target = base / "aside" / path.relative_to(base)
    target.parent.mkdir(parents=True, exist_ok=True)
    n = 1
    while (moved := target.with_name(f"{target.name}.{why}-{n}")).exists():
        n += 1
    os.replace(path, moved)
    return moved


def occupied(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


class Build:
    """One build of a profile on a data set: the runs asked for, sorted into kept, rejected and to make."""

    def __init__(self, profile: str, dataset: str, models: list[str] | None = None, seeds: int | None = None):
        self.profile, self.dataset, self.models, self.seeds = profile, dataset, models, seeds
        self.loaded = workflow.load_profile(profile)
        self.runs = workflow.expand(profile, dataset, models, seeds)
        self.base = paths.results_dir(profile, dataset)
        self.logs = paths.output_root() / "logs" / profile / dataset
        self.failed: list[Path] = []  # logs of the jobs that failed
        self.verify()

    def verify(self) -> None:
        known = workflow.prepared_hash(self.profile, self.dataset)
        there = [run for run in self.runs if occupied(run.folder)]
        self.rejected = {run: why for run in there if (why := workflow.check_result(run, known))}
        self.kept = [run for run in there if run not in self.rejected]
        self.to_make = [run for run in self.runs if run not in self.kept]
        # tables hold every stored run, asked for or not, so the others must answer to the profile too
        also = [run for run in workflow.stored_runs(self.profile, self.dataset) if run not in self.runs]
        self.outdated = {run: why for run in also if (why := workflow.check_result(run, known))}
        self.also = [run for run in also if run not in self.outdated]
        names = {run.run_name for run in self.runs}
        self.efficiency_fault = inventory.check_efficiency(self.profile, self.dataset, names)
        stored = [run for run in workflow.stored_runs(self.profile, self.dataset) if run not in self.to_make]
        again = any(run.seed == 0 for run in self.to_make)
        if again and all((run.folder / "model.safetensors").exists() for run in stored if run.seed == 0):
            self.efficiency_fault = self.efficiency_fault or "configurations are trained again"

    def seconds(self) -> float:
        """Expected work of the missing runs on one core, from recorded times of this data set or the estimate."""
        recorded: dict[str, list[float]] = {}
        for run in self.kept:
            record = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
            recorded.setdefault(run.run_name, []).append(float(record["provenance"]["wall_seconds"]))
        everything = [seconds for several in recorded.values() for seconds in several]
        typical = statistics.median(everything or [self.loaded["estimate"]["run_seconds"]])
        self.expected = {
            run: statistics.median(recorded[run.run_name]) if run.run_name in recorded else typical
            for run in self.runs
        }
        return sum(self.expected[run] for run in self.to_make)

    def announce(self, jobs: int) -> None:
        work, estimate = self.seconds(), self.loaded["estimate"]
        seeds = len({run.seed for run in self.runs})
        names = len({run.run_name for run in self.runs})
        source = "recorded" if self.kept else "estimated"
        disk = estimate["disk_mb"] * (0.2 + 0.8 * len(self.to_make) / len(self.runs)) / 1000
        free = shutil.disk_usage(next(p for p in (self.base, *self.base.parents) if p.exists())).free / 1e9
        print(
            f"{self.profile} on {self.dataset}: {names} configurations x {seeds} seeds, {len(self.runs)} runs"
        )
        print(f"  there and verified  {len(self.kept)}")
        for run, why in self.rejected.items():
            print(f"  rejected            {run}: {why}; it will be set aside and made again")
        for run, why in self.outdated.items():
            print(f"  rejected            {run}: {why}; it will be set aside, and is not asked for now")
        if self.also:
            print(f"  in the tables too   {len(self.also)} stored runs of other seeds or configurations")
        if self.efficiency_fault:
            print(f"  efficiency          to be measured: {self.efficiency_fault}")
        print(f"  to make             {len(self.to_make)}, {jobs} at a time")
        notebooks = ", ".join(inventory.reports(self.profile, self.dataset))
        print(f"  then                {notebooks} -> tables/ and figures/")
        total = minutes(work / jobs + estimate["report_seconds"])
        print(f"  about {total} ({source} times), {disk:.1f} GB of disk ({free:.0f} GB free)", flush=True)
        wants_card = self.loaded["parameters"]["device"] in ("auto", "cuda")
        if wants_card and not self.kept and not workflow.cards():
            print(
                "  no NVIDIA GPU here: that time is meant for one; a CPU takes many times as long", flush=True
            )
        if free < disk:
            raise SystemExit(f"Not enough disk: {disk:.1f} GB wanted at {self.base}, {free:.1f} GB free.")

    def start_over(self) -> None:
        """--fresh: the chosen configurations' folders go aside, whole."""
        for name in dict.fromkeys(run.run_name for run in self.runs):
            if occupied(self.base / name):
                moved = set_aside(self.base / name, "previous")
                print(f"set aside: {shown(self.base / name)} -> {shown(moved)}")
        self.verify()

    def clear(self) -> None:
        """Move what may not be used out of the way."""
        for run in [*self.rejected, *self.outdated]:
            print(f"set aside: {run} -> {shown(set_aside(run.folder, 'rejected'))}")
        if self.efficiency_fault and occupied(self.base / "efficiency"):
            print(f"set aside: efficiency -> {shown(set_aside(self.base / 'efficiency', 'rejected'))}")
        self.rejected, self.outdated = {}, {}

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")]))
        # without bytecode on disk each of the 50 processes compiles up to 4,000 modules, 12 CPU seconds
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        return inherited | {"PYTHONPATH": path, MARK: str(self.base)}

    def prepare(self) -> bool:
        """Decode the images and embed the captions, with the progress shown; the Snakefile has the same rule."""
        command = [sys.executable, "-m", "hamlet.artifact.run", "prepare", "--profile", self.profile]
        return not subprocess.call([*command, "--dataset", self.dataset], env=self.environment())

    def engine(self, jobs: int, log: Path) -> subprocess.Popen:
        """Snakemake in a session of its own: Ctrl-C reaches this process alone, which then ends the rest."""
        # --ignore-incomplete: a result is renamed into place whole and verified by its digest, so Snakemake's mark
        # of an interrupted job must not have it deleted. --nolock: this module's own lock is freed by kill -9.
        flags = "--rerun-triggers mtime --ignore-incomplete --keep-going --nolock --drop-metadata"
        config = {"profile": self.profile, "dataset": self.dataset}
        config |= {"models": ",".join(self.models)} if self.models else {}
        config |= {"seeds": self.seeds} if self.seeds else {}
        command = [sys.executable, "-m", "snakemake", "--snakefile", paths.WORKFLOW / "Snakefile"]
        command += ["--directory", paths.output_root(), "--cores", str(jobs), *flags.split()]
        command += ["--config", *(f"{key}={value}" for key, value in config.items())]
        with log.open("a") as sink:
            return subprocess.Popen(
                command, env=self.environment(), stdout=sink, stderr=sink, start_new_session=True
            )

    def make(self, jobs: int) -> bool:
        """Run the Snakefile, telling of each job that ends; True where all went well."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / "snakemake.log"
        log.write_text("")
        pending, started, read = dict.fromkeys(self.to_make), time.time(), 0
        reports = {
            name: files for name, files in inventory.reports(self.profile, self.dataset).items() if files
        }
        process = self.engine(jobs, log)
        while True:
            ended = process.poll() is not None
            for run in [run for run in pending if (run.folder / "result.json").exists()]:
                del pending[run]
                self.finished(run, len(self.to_make) - len(pending), pending, started, jobs)
            for name in [name for name, files in reports.items() if written_since(files, started)]:
                print(f"  {name}: {len(reports.pop(name))} files", flush=True)
            text = log.read_text(errors="replace")[read:]
            for match in re.finditer(r"Error in rule (\S+):\n(?:.*\n)*?    log: (.*) \(check log", text):
                read += match.end()
                self.failed.append(paths.output_root() / match[2])
                print(f"  FAILED {match[1]}: {match[2]}", flush=True)
            if ended:
                return process.returncode == 0
            time.sleep(0.5)

    def finished(self, run: Run, count: int, pending: dict, started: float, jobs: int) -> None:
        record = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
        done = sum(self.expected[r] for r in self.to_make if r not in pending)
        pace = (time.time() - started) / done if done else 1.0 / jobs  # measured, parallelism included
        left = sum(self.expected[r] for r in pending) * pace + self.loaded["estimate"]["report_seconds"]
        wall, score = record["provenance"]["wall_seconds"], record["metrics"]["default"]["mAP"]
        width = len(str(len(self.to_make)))
        line = f"[{count:{width}d}/{len(self.to_make)}] {run!s:<34} {minutes(wall):>7}  mAP {score:.3f}"
        print(f"{line}  about {minutes(left)} left", flush=True)

    def explain_failure(self) -> None:
        """Name each failed job's log and executed notebook, with the last line of what it said."""
        engine = self.logs / "snakemake.log"
        print(f"\nNot everything could be made; what was finished is kept. The engine's log: {shown(engine)}")
        for log in self.failed or [engine]:
            lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            print(f"  {log.stem}: {lines[-1][:300] if lines else 'ended without a word'}")
            print(f"    log: {shown(log)}")
            name, _, seed = log.stem.rpartition("-")
            places = [self.base / name / f".{seed}.partial" / "executed.ipynb", log.with_suffix(".ipynb")]
            for notebook in places:
                if notebook.exists():
                    print(f"    executed notebook: {shown(notebook)}")
        print("The same command goes on from here.")

    def written(self) -> list[Path]:
        folders = [
            paths.tables_dir(self.profile, self.dataset),
            paths.figures_dir(self.profile, self.dataset),
        ]
        return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())


def written_since(files: list[Path], started: float) -> bool:
    return all(f.exists() for f in files) and max(f.stat().st_mtime for f in files) >= started


def end_processes(mark: str) -> None:
    """End every process of this user that carries the mark of this build, this one apart."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):  # another user's, or gone
            continue
    for end in ("terminate", "kill"):
        for process in found:
            try:
                getattr(process, end)()
            except psutil.NoSuchProcess:
                continue
        found = psutil.wait_procs(found, timeout=5)[1]


@contextmanager
def only_one(base: Path):
    """Hold the lock of a profile and data set; what a killed build left running is ended first."""
    base.mkdir(parents=True, exist_ok=True)
    lock = FileLock(base / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(
            f"Another build of {shown(base)} is running; wait for it or stop it first."
        ) from None
    try:
        end_processes(str(base))
        yield
    finally:
        lock.release()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hamlet.artifact.build", description=__doc__.splitlines()[0]
    )
    parser.add_argument("profile")
    parser.add_argument("--dataset", default="scenes")
    parser.add_argument("--models", type=lambda text: [name for name in text.split(",") if name])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs takes a whole number of at least 1, got {args.jobs}")
    try:
        build = Build(args.profile, args.dataset, args.models, args.seeds)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    jobs = args.jobs or inventory.default_jobs(args.profile)
    if args.dry_run:
        if args.fresh:
            print("--fresh: all results below would be set aside first and made again")
        build.announce(jobs)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores the second on purpose
            signal.signal(number, signal.default_int_handler)
    try:
        with only_one(build.base):
            return carry_out(build, jobs, args.fresh)
    except KeyboardInterrupt:
        print("\nStopping ...", flush=True)
        end_processes(str(build.base))
        print("Stopped. Finished runs are kept, a started one goes on from its last checkpoint:")
        print("give the same command again.")
        return 130


def carry_out(build: Build, jobs: int, fresh: bool) -> int:
    started = time.time()
    if fresh:
        build.start_over()
    build.announce(jobs)
    build.clear()
    if not workflow.stamp(build.profile, build.dataset).exists():
        print("preparing the data set (decoded images, caption embeddings) ...", flush=True)
        if not build.prepare():
            print("The data set could not be prepared: see above.")
            return 1
        build.verify()  # only now is the data set's hash known
        build.clear()
        build.seconds()
    inventory.note(build.runs)
    sound = build.make(jobs)
    if not sound:
        build.explain_failure()
        return 1
    inventory.listing(build.profile, build.dataset).with_suffix(".building").unlink(missing_ok=True)
    files = build.written()
    print(f"\nDone in {minutes(time.time() - started)}. {len(files)} files:")
    for path in files:
        print(f"  {shown(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
