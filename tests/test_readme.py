"""Every command and snippet of the README runs, and its tables are the files they claim to be."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hamlet.artifact.readme import refreshed
from hamlet.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BASH = [
    line.partition(" #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SHELL = [c for c in BASH if c.startswith("./run_all.sh")]
PYTHON = [c for c in BASH if c.startswith(".venv/bin/python")]


def photos(folder, classes=8, images=8):
    rng = np.random.default_rng(0)
    for c in range(classes):
        for i in range(images):
            path = folder / f"class{c}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(path)


def test_every_line_is_covered():
    assert len(SHELL) >= 9
    assert len(PYTHON) >= 5
    assert set(BASH) == {*SHELL, *PYTHON}


@pytest.mark.parametrize("command", SHELL)
def test_run_all_commands_are_understood(command, tmp_path):
    photos(tmp_path / "my-images", 1, 1)
    words = shlex.split(command.replace("my-images", str(tmp_path / "my-images")))[1:]
    extra = [] if "--help" in words else ["--dry-run"]
    done = subprocess.run(
        [str(ROOT / "run_all.sh"), *words, *extra], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in PYTHON if "hamlet." not in c and "benchmarks/" not in c])
def test_commands_that_follow_a_number_back(command):
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in PYTHON if "benchmarks/" in c])
def test_benchmark_commands_on_a_small_size(command, tmp_path):
    words = shlex.split(command)[1:]
    output = tmp_path / ("measured.csv" if "search.py" in command else "table")
    small = {
        "benchmarks/ranking.py": ["--size", "300", "--repeats", "1"],
        "benchmarks/search.py": ["--sizes", "400", "--queries", "20", "--repeats", "1"],
        "benchmarks/library_differences.py": [],
    }[words[0]]
    small += ["--growth", "300", "600", "--queries", "20"] if "--growth" in words else []
    words = [sys.executable, *words, *small, "--output", str(output)]  # the last value of an option holds
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".csv").stat().st_size > 100


def test_the_run_command_names_a_run_that_there_is(monkeypatch):
    from hamlet.artifact import run

    asked = []
    monkeypatch.setattr(run, "make", lambda *arguments: asked.append(arguments[0]))
    (command,) = [c for c in PYTHON if "hamlet.artifact.run" in c]
    run.main(shlex.split(command)[3:])
    run.open_job(*vars(asked[0]).values())


def test_own_images_snippet_and_search(tmp_path, monkeypatch, capsys):
    from hamlet.models import save_model
    from hamlet.search.photos import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    photos(tmp_path / "my-images")
    shutil.copytree(tmp_path / "my-images" / "class0", tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "3.jpg", tmp_path / "photos" / "one.jpg")
    space: dict = {}
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(snippet, space)
    assert space["descriptors"].shape == (len(space["data"].query), 512)
    save_model(space["model"], "model.safetensors")
    for command in [c for c in PYTHON if "hamlet.search" in c]:
        main(shlex.split(command)[3:])
    best = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["1"])
    assert best.endswith(("3.jpg", "one.jpg"))


def test_tables_are_the_files():
    assert "<!-- begin tables/" in TEXT
    assert refreshed(TEXT) == TEXT, "run: python -m hamlet.artifact.readme"


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
