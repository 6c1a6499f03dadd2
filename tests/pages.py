"""What README.md and the pages under docs/ show, taken out of them so that tests can run it as shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hamlet.paths import ROOT

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What takes too long for a test, or would not end: asked for its help instead. Their roads are walked for real in
# tests/search (serve) and tests/test_cli.py (train, and an index with a trained model).
LONG = ("hamlet train", "hamlet serve", "hamlet index my-photos my-index --model")


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language without a title, in order."""
    return [code for kind, title, code in FENCE.findall(text) if kind == language and not title]


def files(text: str) -> dict[str, str]:
    """The code blocks with a title: file name -> content."""
    return {title: code for _, title, code in FENCE.findall(text) if title}


def commands(text: str) -> list[str]:
    """Every command line of the bash blocks, comments taken off."""
    lines = [line for code in blocks(text, "bash") for line in code.splitlines() if line.strip()]
    return [line.partition(" #")[0].strip() for line in lines]


def photos(folder: Path, classes: int = 3, images: int = 4) -> None:
    """<class>/<image>.jpg of noise in a colour of the class, and one.jpg on top."""
    rng = np.random.default_rng(0)
    for c in range(classes):
        for i in range(images):
            path = folder / f"class{c}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 120, (70, 80, 3)) + 60 * np.eye(3)[c % 3]
            Image.fromarray(noise.astype(np.uint8)).save(path)
    (folder / "one.jpg").write_bytes((folder / "class1" / "2.jpg").read_bytes())


def follow(text: str) -> None:
    """Run a page's ``hamlet`` commands and its Python in the working directory, which holds my-photos."""
    from hamlet.cli import main

    shown = [c for c in commands(text) if c.startswith("hamlet ")]
    assert len(shown) >= 6
    for command in shown:
        words = shlex.split(command)[1:]
        try:
            main([*words[:1], "--help"] if command.startswith(LONG) else words)
        except SystemExit as end:
            assert not end.code, f"{command}: {end.code}"
    (snippet,) = blocks(text, "python")
    space: dict = {}
    exec(snippet, space)
    vectors = space["vectors"]
    assert vectors.dtype == np.float32 and vectors.shape[0] == 1
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def run_all(command: str, folder: Path, environment: dict | None = None) -> subprocess.CompletedProcess:
    """A ``./run_all.sh`` command with --dry-run (or as it is, for --help), from another folder."""
    words = shlex.split(command)[1:]
    extra = [] if {"--help", "--dry-run"} & set(words) else ["--dry-run"]
    return subprocess.run(
        [str(ROOT / "run_all.sh"), *words, *extra], capture_output=True, text=True, cwd=folder, env=environment
    )


def python(words: list[str], folder: Path = ROOT, environment: dict | None = None) -> str:
    """Output of this interpreter on the words; its errors fail the test."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
