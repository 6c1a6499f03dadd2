"""Show that a change of code moves no number: repeat a small part of every kind of stored run with both versions.

``python -m hamlet.artifact.same COMMIT...`` makes one run of each configuration in results/ that depends on what
changed, an epoch over a few images a class, with the code of each COMMIT and with the present one. Where all metrics,
all text scores and every bit of the weights agree, the pairs of hashes of the modules that changed are added to
workflow/same_code.json, so that what was made before the change answers to the code after it. Where anything differs it
says what and writes nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from hamlet import paths
from hamlet.artifact import profiles
from hamlet.artifact.code import SAME_CODE, code_hashes
from hamlet.artifact.profiles import Run
from hamlet.artifact.results import stored_datasets, stored_runs
from hamlet.errors import HamletError, one_line

# little work, and every kind of step: training, validation, the average of weights, metrics, words
SMALL = {"epochs": 1, "limit": 4, "warmup": 0.5, "device": "cpu"}


def changed_files(commits: list[str]) -> set[str]:
    """Paths in the repository, as git names them, of what differs now from one of the commits."""
    told = [subprocess.check_output(["git", "diff", "--name-only", c], cwd=paths.ROOT, text=True) for c in commits]
    return {line for names in told for line in names.splitlines()}


def every_kind(files: set[str]) -> list[Run]:
    """Stored runs of the lowest seed that depend on one of the files: one for each method and variant, for each profile
    and each data set. No other run's numbers can move."""

    def depends(run: Run) -> bool:
        known = {f"{name.replace('.', '/')}.py" for name in code_hashes(run)}
        return not files.isdisjoint(known | {"hamlet/artifact/run.py", "notebooks/01_train_evaluate.ipynb"})

    stored = [
        r for p in profiles.profile_names() if p != "smoke" for d in stored_datasets(p) for r in stored_runs(p, d)
    ]
    stored, chosen = sorted(filter(depends, stored), reverse=True), set()
    for kind in (lambda r: (r.model.partition("_")[0], r.variant), lambda r: r.profile, lambda r: r.dataset):
        seen = {kind(run) for run in chosen}
        chosen |= set({kind(run): run for run in stored if kind(run) not in seen}.values())
    return sorted(chosen)


def outcome(tree: Path, run: Run, folder: Path) -> dict:
    """What a small version of the run comes to with the code of ``tree``; its numbers and the hash of its weights."""
    command = [sys.executable, "-m", "hamlet.artifact.run", "--profile", run.profile, "--dataset", run.dataset]
    command += ["--model", run.model, "--variant", run.variant, "--seed", str(run.seed), "--output", str(folder)]
    for name, value in (profiles.parameters(run) | SMALL).items():  # whatever the other tree's profile says
        command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "HAMLET_CACHE": str(paths.cache_dir())}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or " ").splitlines()[-1]
        raise HamletError(f"{run.profile}/{run.dataset} {run} in {tree}: {last}")
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    numbers = {key: record.get(key) for key in ("metrics", "untrained", "words")}
    numbers["loss"] = record["training"]["final_loss"]
    return {**numbers, "weights": paths.sha256(folder / "model.safetensors"), "code": record["provenance"]["code"]}


def show(commits: list[str], jobs: int) -> Path:
    """Compare the code of each commit with the present one; returns the file that holds the evidence.

    Raises HamletError where a run differs, naming it and what differs, or where no module does.
    """
    runs, modules, weights = every_kind(changed_files(commits)), {commit: {} for commit in commits}, {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        trees = {commit: Path(temporary) / commit for commit in commits}
        try:
            for commit, tree in trees.items():
                subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, commit], cwd=paths.ROOT, check=True)
            trees["now"] = paths.ROOT
            small = [
                {name: pool.submit(outcome, tree, run, Path(temporary) / f"{name}-{i}") for name, tree in trees.items()}
                for i, run in enumerate(runs)
            ]
            for run, made in zip(runs, tqdm(small, desc="small runs", unit="configuration"), strict=True):
                now, where = made["now"].result(), f"{run.profile}/{run.dataset}/{run}"
                weights[where] = now["weights"]
                for commit in commits:
                    old = made[commit].result()
                    if apart := [key for key in old if key != "code" and old[key] != now[key]]:
                        what = ", ".join(apart)
                        raise HamletError(f"{where}: other {what} than with {commit}; its results must be made again")
                    pairs = {n: [old["code"].get(n), now["code"].get(n)] for n in old["code"] | now["code"]}
                    modules[commit] |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        finally:
            pool.shutdown(cancel_futures=True)
            for commit in commits:
                subprocess.run(["git", "worktree", "remove", "--force", trees[commit]], cwd=paths.ROOT, check=False)
    if not any(modules.values()):
        raise HamletError(f"no module that makes numbers differs from {', '.join(commits)}: there is nothing to show")
    known = json.loads(SAME_CODE.read_text(encoding="utf-8")) if SAME_CODE.is_file() else []
    new = [{"compared_with": commit, **SMALL, "modules": modules[commit], "weights": weights} for commit in commits]
    paths.write_json(SAME_CODE, [*known, *new])
    return SAME_CODE


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hamlet.artifact.same", description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="+", help="a commit before the change")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    with one_line(arguments):
        print(f"the same numbers: {show(given.commit, given.jobs)}")


if __name__ == "__main__":
    main()
