"""run_all.sh and hamlet.artifact.build from a user's side, in a copy of the project whose path has a space.

Training is replaced by a stand-in that writes results in the contract's form within a moment; the shell script,
the driver, Snakemake and the Snakefile are the real ones. The active conda environment is played by the
environment that runs the tests, so no set-up is made.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hamlet import paths
from hamlet.artifact import profiles as workflow

STUB = """
import argparse, hashlib, json, os, sys, time
from hamlet import paths
from hamlet.artifact import inventory, profiles as workflow

def finish(folder, record, wall):
    partial = folder.with_name("." + folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "curves.csv").write_text("epoch,loss")
    (partial / "executed.ipynb").write_text("{}")
    time.sleep(wall)
    record["files"] = {"curves.csv": hashlib.sha256(b"epoch,loss").hexdigest()}
    record["digest"] = workflow.digest(record)
    (partial / "result.json").write_text(json.dumps(record))
    os.rename(partial, folder)

parser = argparse.ArgumentParser()
parser.add_argument("what", nargs="*")
for name in ("profile", "dataset", "model", "variant"):
    parser.add_argument("--" + name)
parser.add_argument("--seed", type=int)
given = parser.parse_args()
if given.what == ["prepare"]:
    stamp = workflow.stamp(given.profile, given.dataset)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"dataset_hash": os.environ.get("STUB_HASH", "abc")}))
elif given.what:
    records = [json.loads((r.folder / "result.json").read_text())
               for r in workflow.stored_runs(given.profile, given.dataset)]
    scores = [[r["run"]["model"], r["run"]["variant"], r["metrics"]["default"]["mAP"]] for r in records]
    for path in inventory.reports(given.profile, given.dataset)[given.what[1]]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores))
else:
    run = workflow.Run(given.profile, given.dataset, given.model, given.variant, given.seed)
    if os.environ.get("STUB_FAIL") == run.run_name:
        partial = run.folder.with_name("." + run.folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "executed.ipynb").write_text("{}")
        sys.exit("the loss is not finite at step 3")
    wall = float(os.environ.get("STUB_SECONDS", "0"))
    finish(run.folder, {"schema": 1, "run": vars(run), "parameters": workflow.parameters(run),
        "metrics": {"default": {"mAP": len(run.run_name) / 100}},
        "provenance": {"dataset_hash": os.environ.get("STUB_HASH", "abc"), "wall_seconds": wall,
                       "started": time.time_ns()}}, wall)
"""

STUB_EFFICIENCY = """
import argparse, json
from hamlet import paths
from hamlet.artifact import profiles as workflow
parser = argparse.ArgumentParser()
parser.add_argument("--profile"), parser.add_argument("--dataset")
given = parser.parse_args()
wanted = workflow.load_profile(given.profile)["efficiency"]
first = [run for run in workflow.stored_runs(given.profile, given.dataset) if run.seed == 0]
runs = {run.run_name: json.loads((run.folder / "result.json").read_text())["digest"] for run in first}
record = {"models": dict.fromkeys(runs, {}),
          "parameters": {"image_size": wanted["image_size"], "images": wanted["repeats"], "runs": runs}}
record["digest"] = workflow.digest(record)
path = paths.results_dir(given.profile, given.dataset) / "efficiency" / "result.json"
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps(record))
"""
# Two notebooks instead of all keep the tests short.
REPORTS = """
02_accuracy: {tables: [table1_accuracy], figures: [accuracy]}
00_read_me_first: {after: [02_accuracy]}
"""
TWO = ["--models", "gem_resnet18,gem_resnet18-text"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("a folder") / "the project"
    (root / "hamlet").mkdir(parents=True)
    for name in ("run_all.sh", "requirements.lock", "environment.yml"):
        shutil.copy2(paths.ROOT / name, root / name)
    shutil.copytree(paths.ROOT / "workflow", root / "workflow")
    (root / "workflow" / "reports.yaml").write_text(REPORTS)
    for name in ("paths.py", "workflow.py", "inventory.py", "build.py"):
        shutil.copy2(paths.ROOT / "hamlet" / name, root / "hamlet" / name)
    # A regular package: a namespace package would lose to the project's own, wherever that stands on the path.
    (root / "hamlet" / "__init__.py").write_text("")
    (root / "hamlet" / "run.py").write_text(STUB)
    (root / "hamlet" / "efficiency.py").write_text(STUB_EFFICIENCY)
    (root / "notebooks").mkdir()
    return root


@pytest.fixture
def project(copy) -> Path:
    """The copy without results."""
    for name in ("results", "tables", "figures", "logs", "data", ".snakemake"):
        shutil.rmtree(copy / name, ignore_errors=True)
    return copy


def environment(**extra: str) -> dict[str, str]:
    dropped = ("HAMLET_", "CONDA_", "STUB_", "PYTEST_", "PYTHONPATH", "UV_TORCH")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return env | {"CONDA_PREFIX": sys.prefix} | extra


def run_all(project: Path, *args: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(project / "run_all.sh"), *args],
        cwd=cwd or project.parent,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def start(project: Path, *args: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(project / "run_all.sh"), *args],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell starts its background jobs with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, seconds: float = 240) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.05)


def result(project: Path, name: str) -> Path:
    return project / "results" / "smoke" / "scenes" / name / "seed0" / "result.json"


def marked(project: Path) -> list[psutil.Process]:
    """Processes that belong to a build of the project."""
    mark, found = str(project / "results" / "smoke" / "scenes"), []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HAMLET_BUILD") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--frob"], "unknown option '--frob'; valid: --dataset, --data-root, --models"),
        (["qick"], "unknown command 'qick'; valid: quick, smoke, paper, test, lab"),
        (
            ["--models", "gem_resnet18,resnet"],
            "unknown model 'resnet' in profile quick; valid: hamlet_resnet18,",
        ),
        (["smoke", "--dataset=mnist"], "unknown data set 'mnist'; valid: scenes, grocery, folder"),
        (["--jobs", "0"], "--jobs takes a whole number from 1 to 9999, got '0'"),
        (["--seeds=two"], "--seeds takes a whole number from 1 to 9999, got 'two'"),
        (["--seeds", "99999999999999999999"], "--seeds takes a whole number from 1 to 9999"),
        (["--models", ","], "--models takes names, got ','; valid: hamlet_resnet18"),
        (["--seeds"], "--seeds needs a value"),
        (["--fresh=1"], "--fresh takes no value"),
        (["--data-root", "/nowhere/at all"], "data root '/nowhere/at all' is not a folder"),
        (["--dataset", "folder"], "--dataset folder needs --data-root DIR"),
        (["quick", "smoke"], "one command at a time"),
        (["test", "--fresh"], "test takes --jobs, --data-root and --dry-run alone"),
        (["quick", "--", "-x"], "arguments after -- are for test and lab alone"),
    ],
)
def test_a_wrong_call_lists_what_is_valid(project, args, expected):
    done = run_all(project, *args, CONDA_PREFIX="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(expected)
    assert not (project / ".venv").exists()


def test_help_names_every_command_option_data_set_and_model(project):
    done = run_all(project, "--help", CONDA_PREFIX="")
    assert done.returncode == 0
    words = set(re.findall(r"[\w-]+", done.stdout))
    assert {"quick", "smoke", "paper", "test", "lab", "HAMLET_DATA", "UV_TORCH_BACKEND"} <= words
    assert {"--dataset", "--data-root", "--models", "--seeds", "--jobs", "--fresh", "--dry-run"} <= words
    assert {"scenes", "grocery", "folder", "hamlet_resnet18", "gem_resnet18-text"} <= words


@pytest.mark.skipif(workflow.cards() > 0, reason="an NVIDIA GPU is there")
def test_a_profile_for_cards_says_where_there_is_none(project):
    told = "no NVIDIA GPU here: that time is meant for one"
    assert told in run_all(project, "paper", "--dry-run").stdout
    assert told not in run_all(project, "smoke", "--dry-run").stdout


def test_a_dry_run_changes_nothing(project):
    before = run_all(project, "smoke", "--dry-run", CONDA_PREFIX="")
    assert before.returncode == 0
    assert "would set up" in before.stdout and "15 configurations x 1 seeds" in before.stdout
    after = run_all(project, "smoke", "--dry-run", *TWO)
    assert after.returncode == 0, after.stderr
    assert "2 configurations x 1 seeds, 2 runs" in after.stdout
    assert "to make             2" in after.stdout and "GB free" in after.stdout
    assert not (project / "results").exists() and not (project / ".venv").exists()


@pytest.mark.slow
def test_what_is_there_stays_and_what_was_tampered_with_is_made_again(project):
    """One story: build, again, delete the tables and edit a result, take a run away and start afresh."""
    done = run_all(project, "smoke", *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] gem_resnet18" in done.stdout and "mAP 0.1" in done.stdout
    table = project / "tables" / "smoke" / "scenes" / "table1_accuracy.csv"
    assert "  tables/smoke/scenes/table1_accuracy.csv\n" in done.stdout
    assert "  figures/smoke/scenes/accuracy.png\n" in done.stdout
    first, content = table.stat().st_mtime_ns, table.read_text()
    plain, text = result(project, "gem_resnet18"), result(project, "gem_resnet18-text")
    made = plain.read_text()

    again = run_all(project, "smoke", *TWO)
    assert again.returncode == 0 and "there and verified  2" in again.stdout
    assert table.stat().st_mtime_ns == first and plain.read_text() == made

    shutil.rmtree(project / "tables")
    shutil.rmtree(project / "figures")
    text.write_text(text.read_text().replace("0.17", "0.99"))
    shutil.copytree(plain.parent, plain.parent.with_name("seed5"))  # not asked for, but in the tables
    edited = run_all(project, "smoke", *TWO)
    assert edited.returncode == 0
    assert "rejected            gem_resnet18-text seed0: result.json was changed" in edited.stdout
    assert json.loads(text.read_text())["metrics"]["default"]["mAP"] == 0.17
    aside = project / "results" / "smoke" / "scenes" / "aside"
    assert "0.99" in (aside / "gem_resnet18-text" / "seed0.rejected-1" / "result.json").read_text()
    assert plain.read_text() == made and table.read_text() == content
    assert "rejected            gem_resnet18 seed5: it is the result of another run" in edited.stdout
    assert (aside / "gem_resnet18" / "seed5.rejected-1" / "result.json").read_text() == made
    other = run_all(project, "smoke", "--models", "gem_resnet18", "--dry-run")
    assert "in the tables too   1 stored runs of other seeds or configurations" in other.stdout

    shutil.rmtree(text.parent.parent)
    fresh = run_all(project, "smoke", "--models", "gem_resnet18", "--fresh")
    assert fresh.returncode == 0
    assert (aside / "gem_resnet18.previous-1" / "seed0" / "result.json").read_text() == made
    assert plain.read_text() != made
    assert "text" not in table.read_text()  # the tables follow what is there


@pytest.mark.slow
def test_a_failure_names_its_log_and_another_data_set_hash_is_noticed(project):
    done = run_all(project, "smoke", *TWO, STUB_FAIL="gem_resnet18")
    assert done.returncode == 1
    assert "FAILED run: logs/smoke/scenes/gem_resnet18-seed0.log" in done.stdout
    assert "gem_resnet18-seed0: the loss is not finite at step 3" in done.stdout
    assert "executed notebook: results/smoke/scenes/gem_resnet18/.seed0.partial/executed.ipynb" in done.stdout
    kept = result(project, "gem_resnet18-text")
    made = kept.read_text()
    assert not (project / "tables").exists()
    shutil.rmtree(project / "data")  # the cache, and with it what is known of the data set
    again = run_all(project, "smoke", *TWO, STUB_HASH="changed")
    assert again.returncode == 0
    assert "set aside: gem_resnet18-text seed0" in again.stdout
    assert kept.read_text() != made and result(project, "gem_resnet18").exists()


@pytest.mark.slow
def test_kill_9_and_start_again(project):
    process = start(project, "smoke", *TWO, "--jobs", "1", STUB_SECONDS="5")
    both = [result(project, "gem_resnet18"), result(project, "gem_resnet18-text")]
    limit = time.monotonic() + 240
    while not any(path.exists() for path in both):
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert marked(project), "the engine outlives the driver, or this test shows nothing"
    kept = next(path for path in both if path.exists())
    made = kept.read_text()
    done = run_all(project, "smoke", *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there and verified  1" in done.stdout
    assert kept.read_text() == made and all(path.exists() for path in both)


@pytest.mark.slow
@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    reason="started with SIGINT ignored, as background jobs are",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_everything_and_a_second_start_is_refused(project, number):
    process = start(project, "smoke", *TWO, STUB_SECONDS="600")
    wait_for(result(project, "gem_resnet18").parent.with_name(".seed0.partial"))
    second = run_all(project, "smoke", *TWO)
    assert second.returncode == 1 and "Another build of results/smoke/scenes is running" in second.stderr
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "give the same command again" in output
    assert not marked(project)
