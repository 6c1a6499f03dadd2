"""run_all.sh and hamlet.artifact.build from a user's side, in a copy of the project whose path has a space.

The notebooks and the measurement of costs are replaced by stand-ins that write files in the contract's form within a
moment; the shell script, the driver, Snakemake, the Snakefile, hamlet.artifact.run and all checks are the real ones.
The active conda environment is played by the environment that runs the tests, so no set-up is made.
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

# at the end of the copy's hamlet/artifact/run.py, before its last lines
STUB = """
def load_data(dataset, settings, root=None):
    from types import SimpleNamespace

    return SimpleNamespace(train=range(120), content_hash=os.environ.get("STUB_HASH", "abc"))


def execute(name, output, asked):
    from hamlet.artifact import build, results

    paths.write_json(output, {})
    if name != "01_train_evaluate":
        runs = results.stored_runs(asked["profile"], asked["dataset"])
        records = [json.loads((run.folder / "result.json").read_text()) for run in runs]
        scores = [[str(run), record["metrics"]["default"]["mAP"]] for run, record in zip(runs, records)]
        for path in build.reports(asked["profile"], asked["dataset"])[name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(scores))
        return
    job = open_job(**{key: asked[key] for key in (*Run.__dataclass_fields__, "output", "overrides")})
    if os.environ.get("STUB_FAIL") == job.run.run_name:
        raise HamletError("the loss is not finite at step 3")
    (job.folder / "curves.csv").write_text("epoch,loss")
    time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
    record = {"run": vars(job.run), "parameters": job.settings, "options": profiles.options(job.run),
        "metrics": {"default": {"mAP": len(job.run.run_name) / 100}},
        "provenance": {"dataset_hash": os.environ.get("STUB_HASH", "abc"), "code": code_hashes(job.run),
                       "wall_seconds": 1.0, "started": time.time_ns()},
        "files": {"curves.csv": paths.sha256(job.folder / "curves.csv")}}
    paths.write_json(job.folder / "result.json", record | {"digest": digest(record)})


"""

STUB_COST = """
import argparse, json

from hamlet import paths
from hamlet.artifact import profiles, results


def measure(profile, dataset):
    wanted = profiles.load_profile(profile)["efficiency"]
    first = {run.run_name: run for run in reversed(results.stored_runs(profile, dataset))}
    digests = {n: json.loads((run.folder / "result.json").read_text())["digest"] for n, run in first.items()}
    record = {"models": dict.fromkeys(digests, {}), "provenance": {},
              "parameters": {"image_size": wanted["image_size"], "images": wanted["repeats"], "runs": digests}}
    path = paths.output_dir("results", profile, dataset) / "efficiency" / "result.json"
    paths.write_json(path, record | {"digest": results.digest(record)})


parser = argparse.ArgumentParser()
parser.add_argument("--profile"), parser.add_argument("--dataset")
parser.add_argument("--with-parent", action="store_true")
given = parser.parse_args()
measure(given.profile, given.dataset)
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
    for name in ("hamlet", "workflow", "notebooks", "data/paper", "data/scenes"):
        shutil.copytree(paths.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "requirements.lock", "environment.yml"):
        shutil.copy2(paths.ROOT / name, root / name)
    (root / "workflow" / "reports.yaml").write_text(REPORTS)
    module = root / "hamlet" / "artifact" / "run.py"
    module.write_text(module.read_text().replace('if __name__ == "__main__":', STUB + 'if __name__ == "__main__":'))
    (root / "hamlet" / "artifact" / "cost.py").write_text(STUB_COST)
    return root


@pytest.fixture
def project(copy) -> Path:
    """The copy without results."""
    for name in ("results", "tables", "figures", "logs", ".snakemake"):
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


def of_project(project: Path) -> list[psutil.Process]:
    """Processes that work for a build of the project, their command lines told."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(project) in " ".join(process.cmdline()) + process.cwd():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.pid != os.getpid()]


def wait_until_gone(project: Path, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while left := [p for p in of_project(project) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < limit, left
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["qick"], "unknown command 'qick'; valid: quick, smoke, pretrained, ablation, captions, paper, all, test"),
        (["quick", "smoke"], "one command at a time"),
        (["test", "--fresh"], "test takes --jobs N and --dry-run alone"),
        (["quick", "--", "-x"], "arguments after -- are for test, lab, endurance and docs alone"),
    ],
)
def test_a_wrong_command_ends_before_any_set_up(project, args, expected):
    done = run_all(project, *args, CONDA_PREFIX="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(expected)
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["--frob"], 2, "unrecognized arguments: --frob"),
        (["--models", "gem_resnet18,resnet"], 1, "unknown model 'resnet' in profile 'quick'; valid: hamlet_resnet18,"),
        (["--models", ","], 1, "unknown model '' in profile 'quick'"),
        (["smoke", "--dataset=mnist"], 1, "unknown data set 'mnist'; valid: cifar10, "),
        (["--jobs", "0"], 2, "--jobs takes a whole number of at least 1, got 0"),
        (["--name", "x"], 2, "--name and --split-by are for a folder of photos: --dataset folder"),
        (["--dataset", "grocery", "--split-by", "class"], 2, "are for a folder of photos"),
        (["--seeds=two"], 2, "argument --seeds: invalid int value: 'two'"),
        (["--seeds", "99999999999999999999"], 1, "lies outside [1, 1000]"),
        (["--seeds"], 2, "argument --seeds: expected one argument"),
        (["--data-root", "/nowhere/at all"], 1, "data root '/nowhere/at all' is not a folder"),
        (["--dataset", "folder"], 1, "--dataset folder needs --data-root DIR"),
    ],
)
def test_a_wrong_call_is_one_line_that_lists_what_is_valid(project, args, code, expected):
    done = run_all(project, *args)
    assert done.returncode == code
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not (project / "results").exists()


def test_help_names_every_command_and_option_that_python_takes(project):
    done = run_all(project, "--help", CONDA_PREFIX="")
    assert done.returncode == 0
    words = set(re.findall(r"[\w-]+", done.stdout))
    assert {*workflow.profile_names(), "all", "test", "lab", "endurance", "docs"} <= words
    source = (paths.ROOT / "hamlet" / "artifact" / "build.py").read_text()
    assert set(re.findall(r'add_argument\("(--[\w-]+)"', source)) <= words
    assert {"HAMLET_DATA", "UV_TORCH_BACKEND", "HAMLET_PYTHON"} <= words


def test_a_profile_with_a_mistake_and_a_reader_that_leaves_end_in_one_line(project):
    bad = project / "workflow" / "smoke.yaml"
    text = bad.read_text()
    bad.write_text("seeds: [1\n" + text)
    try:
        done = run_all(project, "smoke", "--dry-run")
        assert done.returncode == 1 and "smoke.yaml, line" in done.stderr and "Traceback" not in done.stderr
        assert "Traceback" in run_all(project, "smoke", "--dry-run", "--traceback").stderr
    finally:
        bad.write_text(text)
    command = f"'{project}/run_all.sh' smoke --dry-run | head -1"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.skipif(workflow.cards() > 0, reason="an NVIDIA GPU is there")
def test_a_profile_for_cards_says_where_there_is_none(project):
    told = "no NVIDIA GPU here: that time is meant for one"
    assert told in run_all(project, "paper", "--dry-run").stdout
    assert told not in run_all(project, "smoke", "--dry-run").stdout


def test_the_code_is_that_beside_the_script_whatever_folder_one_stands_in(project, tmp_path):
    (tmp_path / "hamlet").mkdir()
    (tmp_path / "hamlet" / "__init__.py").write_text("raise SystemExit('another checkout')")
    done = run_all(project, "smoke", *TWO, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(project, "gem_resnet18").exists()


def test_a_dry_run_changes_nothing(project):
    before = run_all(project, "smoke", "--dry-run", CONDA_PREFIX="")
    assert before.returncode == 0 and "would set up" in before.stdout
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
    assert re.search(r"gem_resnet18 seed0 +mAP 0.120", done.stdout)
    assert "steps (100%) done" in done.stderr
    table = project / "tables" / "smoke" / "scenes" / "table1_accuracy.csv"
    assert "  tables/smoke/scenes/table1_accuracy.csv\n" in done.stdout
    assert "  figures/smoke/scenes/accuracy.png\n" in done.stdout
    content = table.read_text()
    plain, text = result(project, "gem_resnet18"), result(project, "gem_resnet18-text")
    made = plain.read_text()

    again = run_all(project, "smoke", *TWO)
    assert again.returncode == 0 and "there and verified  2" in again.stdout
    assert table.read_text() == content and plain.read_text() == made

    shutil.rmtree(project / "tables")
    shutil.rmtree(project / "figures")
    text.write_text(text.read_text().replace("0.17", "0.99"))
    shutil.copytree(plain.parent, plain.parent.with_name("seed5"))  # not asked for, but in the tables
    edited = run_all(project, "smoke", *TWO)
    assert edited.returncode == 0
    assert re.search(r"rejected +gem_resnet18-text seed0: .*was changed after its run", edited.stdout)
    assert re.search(r"rejected +gem_resnet18 seed5: .*the result of another run", edited.stdout)
    assert json.loads(text.read_text())["metrics"]["default"]["mAP"] == 0.17
    aside = project / "results" / "smoke" / "scenes" / "aside"
    assert "0.99" in (aside / "gem_resnet18-text" / "seed0.rejected-1" / "result.json").read_text()
    assert (aside / "gem_resnet18" / "seed5.rejected-1" / "result.json").read_text() == made
    assert plain.read_text() == made and table.read_text() == content

    shutil.rmtree(text.parent.parent)
    planned = run_all(project, "smoke", "--models", "gem_resnet18", "--fresh", "--dry-run").stdout
    assert "gem_resnet18 would be set aside first" in planned and "to make             1," in planned
    fresh = run_all(project, "smoke", "--models", "gem_resnet18", "--fresh")
    assert fresh.returncode == 0
    assert (aside / "gem_resnet18.previous-1" / "seed0" / "result.json").read_text() == made
    assert plain.read_text() != made
    assert "text" not in table.read_text()  # the tables follow what is there


@pytest.mark.slow
def test_results_of_other_code_are_named_and_trained_again_or_kept_as_asked(project):
    one = ["smoke", "--models", "gem_resnet18,mace_resnet18"]
    assert run_all(project, *one).returncode == 0
    gem, mace = result(project, "gem_resnet18"), result(project, "mace_resnet18")
    made = gem.read_text(), mace.read_text()
    module = project / "hamlet" / "models" / "gem.py"
    source = module.read_text()
    try:
        module.write_text(source.replace('"""', '"""Other words. ', 1))
        assert "there and verified  2" in run_all(project, *one, "--dry-run").stdout
        module.write_text(source + "\nX = 1\n")
        dry = run_all(project, *one, "--dry-run").stdout
        told = "made otherwise      gem_resnet18 seed0: other code: hamlet.models.gem; to be set aside"
        assert told in dry and "there and verified  1" in dry and "to make             1" in dry
        kept = run_all(project, *one, "--keep")
        assert kept.returncode == 0 and "kept, and labelled in the tables" in kept.stdout
        assert (gem.read_text(), mace.read_text()) == made
        again = run_all(project, *one)
        assert again.returncode == 0, again.stdout + again.stderr
        assert gem.read_text() != made[0] and mace.read_text() == made[1]
        aside = project / "results" / "smoke" / "scenes" / "aside" / "gem_resnet18" / "seed0.rejected-1"
        assert (aside / "result.json").read_text() == made[0]
    finally:
        module.write_text(source)


@pytest.mark.slow
def test_a_failure_says_why_and_changed_data_is_noticed(project):
    done = run_all(project, "smoke", *TWO, STUB_FAIL="gem_resnet18")
    assert done.returncode == 1
    assert "gem_resnet18-seed0: error: the loss is not finite at step 3; more in logs/" in done.stdout
    assert "what was finished is kept" in done.stdout
    kept = result(project, "gem_resnet18-text")
    made = kept.read_text()
    assert not (project / "tables").exists()
    again = run_all(project, "smoke", *TWO, STUB_HASH="changed")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the content of the data set differs" in again.stdout
    assert kept.read_text() != made and result(project, "gem_resnet18").exists()


@pytest.mark.slow
def test_kill_9_leaves_nothing_running_and_the_next_start_goes_on(project):
    process = start(project, "smoke", *TWO, "--jobs", "1", STUB_SECONDS="5")
    both = [result(project, "gem_resnet18"), result(project, "gem_resnet18-text")]
    limit = time.monotonic() + 240
    while not any(path.exists() for path in both):
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.kill()
    process.communicate()
    wait_until_gone(project)
    kept = next(path for path in both if path.exists())
    made = kept.read_text()
    done = run_all(project, "smoke", *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there and verified  1" in done.stdout
    assert kept.read_text() == made and all(path.exists() for path in both)


@pytest.mark.slow
@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="started with SIGINT ignored, as background jobs are"
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_everything_and_a_second_start_is_refused(project, number):
    process = start(project, "smoke", *TWO, STUB_SECONDS="600")
    wait_for(result(project, "gem_resnet18").parent.with_name(".seed0.partial"))
    second = run_all(project, "smoke", *TWO)
    assert second.returncode == 1 and "another build of results/smoke/scenes is running" in second.stderr
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from here" in output
    wait_until_gone(project)
