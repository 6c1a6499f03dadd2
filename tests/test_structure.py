"""Two rooms without an arrow back: import-linter's contracts of pyproject.toml, and no private name taken elsewhere."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hamlet import paths


def lint(folder: Path) -> subprocess.CompletedProcess:
    """import-linter on the package below ``folder``, which must be whole."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(paths.ROOT / "hamlet", tmp_path / "hamlet", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(paths.ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold():
    found = lint(paths.ROOT)
    assert found.returncode == 0 and "2 kept, 0 broken" in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("metrics.py", "from hamlet.artifact import tables"),  # an arrow back to the second room
        ("data/scenes.py", "from hamlet import training"),  # upwards in the list of layers
        ("artifact/profiles.py", "from hamlet.artifact import build"),  # a circle
        ("somewhere.py", ""),  # a module that no layer names
    ],
)
def test_a_broken_contract_is_noticed(copy, module, line):
    with (copy / "hamlet" / module).open("a") as file:
        file.write(f"\n{line}\n")
    found = lint(copy)
    assert found.returncode == 1 and "0 broken" not in found.stdout, found.stdout + found.stderr


@pytest.mark.parametrize("path", sorted((paths.ROOT / "hamlet").rglob("*.py")), ids=lambda path: path.stem)
def test_no_private_name_of_another_module(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in MODULES:
            names.append(node.attr)
        assert not [name for name in names if name.startswith("_") and not name.endswith("__")], path


MODULES = {path.stem for path in (paths.ROOT / "hamlet").rglob("*.py")}
