"""The code behind a number: a hash of each module that one run depends on, without comments and docstrings.

A run depends on training, evaluation and distillation, on the modules that register its method and its data set, on
whatever modules of hamlet these import, on two functions of hamlet.artifact.run, and on the training notebook. A
package's ``__init__`` only registers, so it is not followed: a change in MACE leaves HAMLET's results as they are.
Where a change moves no number, such as another name for a function, hamlet.artifact.same shows that by running both
versions, and stores what it saw in workflow/same_code.json.
"""

import ast
import functools
import hashlib
import json
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from hamlet import paths
from hamlet.artifact.profiles import Run, kind
from hamlet.errors import HamletError

ROOTS = ("training.py", "evaluation.py", "distillation.py")
FUNCTIONS = ("build_model", "load_data")  # of hamlet.artifact.run; the rest of that module only keeps books
SAME_CODE = paths.WORKFLOW / "same_code.json"
NOT_NUMBERS = ("hamlet.errors", "hamlet.paths")


def code_hashes(run: Run) -> dict[str, str]:
    """Module, function or notebook -> sha256 of its code, for everything that the run's numbers depend on."""
    package, found = paths.ROOT / "hamlet", {}
    waiting = [*(package / name for name in ROOTS), registering("models", run.model.partition("_")[0])]
    waiting.append(registering("data", kind(run.dataset)))
    while waiting:
        path = waiting.pop()
        inside = path.is_relative_to(paths.ROOT)
        name = ".".join(path.relative_to(paths.ROOT).with_suffix("").parts) if inside else path.stem
        if name in found or name in NOT_NUMBERS:
            continue
        _, found[name], imported = _module(path, path.stat().st_mtime_ns)
        files = [paths.ROOT / f"{module.replace('.', '/')}.py" for module in imported]
        waiting += [file for file in files if file.is_file()]
    for node in _module(path := package / "artifact" / "run.py", path.stat().st_mtime_ns)[0].body:
        if getattr(node, "name", "") in FUNCTIONS:
            found[f"hamlet.artifact.run.{node.name}"] = json_hash(_plain(node))
    notebook = json.loads((paths.NOTEBOOKS / "01_train_evaluate.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found["notebooks/01_train_evaluate"] = json_hash(cells)
    return dict(sorted(found.items()))


def same_code(name: str, before: str | None, now: str | None) -> bool:
    """Whether a module's two hashes are equal, or joined by changes that were shown to move no number."""
    reached = {before}
    for modules in _shown_equal():
        pair = set(modules.get(name, ()))
        reached |= pair if pair & reached else set()
    return now in reached


@functools.cache
def _shown_equal() -> list[dict[str, list[str]]]:
    """workflow/same_code.json in the order of time: module -> the pair of its hashes."""
    known = json.loads(SAME_CODE.read_text(encoding="utf-8")) if SAME_CODE.is_file() else []
    return [change["modules"] for change in known]


def json_hash(value: object) -> str:
    """sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def registering(room: str, name: str) -> Path:
    """The file of hamlet/<room>, or of a plug-in, that registers a method or a data set."""
    told = re.compile(rf'method = "{name}"' if room == "models" else rf'@register\("{name}"')
    for path in sorted((paths.ROOT / "hamlet" / room).glob("[!_]*.py")):
        if told.search(path.read_text(encoding="utf-8")):
            return path
    for entry in entry_points(group="hamlet.models" if room == "models" else "hamlet.datasets"):
        if entry.name.partition("_")[0] == name or entry.name == name:
            return Path(find_spec(entry.module).origin)
    raise HamletError(f"unknown {name!r}: no module of hamlet/{room} and no plug-in registers it")


@functools.cache
def _module(path: Path, changed: int) -> tuple[ast.Module, str, list[str]]:
    """A file's code, its hash, and what it imports from hamlet."""
    tree, imported = ast.parse(path.read_text(encoding="utf-8"), str(path)), []
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):  # a bare string is a docstring or a remark
            node.body = [s for s in body if not isinstance(s, ast.Expr) or not isinstance(s.value, ast.Constant)]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hamlet":
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tree, json_hash(_plain(tree)), imported


def _plain(node: object) -> object:
    """The tree as lists; empty fields are left out, since Python versions differ in which they have."""
    if isinstance(node, ast.AST):
        fields = [[name, _plain(v)] for name, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, *fields]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)
