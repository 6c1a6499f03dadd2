"""The code behind a number: a hash of each module that one run depends on, without comments and docstrings.

A run depends on training, evaluation and distillation, its method's module, its data set's module, whatever these
import from hamlet, the two functions below, and the code cells of the training notebook. A package's ``__init__``
only registers and passes on, so a name imported from one counts as the module that defines it: a change in MACE
leaves HAMLET's results as they are.
"""

import ast
import functools
import hashlib
import json
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from hamlet import paths
from hamlet.artifact.profiles import Run, kind
from hamlet.errors import HamletError

ROOTS = ("hamlet.training", "hamlet.evaluation", "hamlet.distillation")
FUNCTIONS = ("build_model", "load_data")  # of hamlet.artifact.run; the rest of that module only keeps books
NOT_NUMBERS = ("hamlet.errors", "hamlet.paths", "hamlet.data.archive")
NOTEBOOK = "01_train_evaluate"


def code_hashes(run: Run) -> dict[str, str]:
    """Module (or notebook, or function) -> sha256 of its code, for everything that the run's numbers depend on."""
    waiting = [*ROOTS, registered_in("models", run.model), registered_in("data", kind(run.dataset))]
    found: dict[str, str] = {}
    while waiting:
        if (name := waiting.pop()) not in found:
            path = _file(name, paths.ROOT) or Path(find_spec(name).origin)
            found[name], imported = _module(path, paths.ROOT, path.stat().st_mtime_ns)
            waiting += imported
    for node in _parsed(_file("hamlet.artifact.run", paths.ROOT)).body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            found[f"hamlet.artifact.run.{node.name}"] = _hash(node)
    cells = json.loads((paths.NOTEBOOKS / f"{NOTEBOOK}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = json.dumps(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    found[f"notebooks/{NOTEBOOK}"] = hashlib.sha256(code.encode()).hexdigest()
    return dict(sorted(found.items()))


def combined(hashes: dict[str, str]) -> str:
    """One sha256 for all of them."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def registered_in(package: str, name: str) -> str:
    """The module of hamlet.<package> that registers a model or a data set, or of the plug-in that does.

    A model is called <method>_<backbone>. Raises HamletError where nobody registers the name.
    """
    method = name.partition("_")[0] if package == "models" else name
    for path in sorted((paths.ROOT / "hamlet" / package).glob("[!_]*.py")):
        if {name, method} & _registered(path, path.stat().st_mtime_ns):
            return f"hamlet.{package}.{path.stem}"
    for entry in entry_points(group="hamlet.models" if package == "models" else "hamlet.datasets"):
        if entry.name in (name, method):
            return entry.module
    for module in (f"hamlet.data.{name}", f"hamlet.data.{name.partition('_')[0]}", "hamlet.data.public"):
        if package == "data" and _file(module, paths.ROOT):
            return module
    raise HamletError(f"unknown model {name!r}: no module of hamlet/{package} registers {method!r}")


@functools.cache
def _registered(path: Path, changed: int) -> frozenset[str]:
    """Names in a module's decorators ``@register("name")`` and class attributes ``method = "name"``."""
    nodes = list(ast.walk(_parsed(path)))
    calls = [c for n in nodes for c in getattr(n, "decorator_list", []) if isinstance(c, ast.Call)]
    texts = [a for call in calls for a in [*call.args, *(k.value for k in call.keywords)]]
    classes = [statement for n in nodes if isinstance(n, ast.ClassDef) for statement in n.body]
    texts += [
        s.value for s in classes if isinstance(s, ast.Assign) and getattr(s.targets[0], "id", "") == "method"
    ]
    return frozenset(t.value for t in texts if isinstance(t, ast.Constant) and isinstance(t.value, str))


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def _module(path: Path, root: Path, changed: int) -> tuple[str, list[str]]:
    tree = _parsed(path)
    imported = [
        _defining(node.module, alias.name, root)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hamlet"
        for alias in node.names
    ]
    imported += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.startswith("hamlet.")
    ]
    kept = {module for module in imported if module and _file(module, root)} - {*NOT_NUMBERS}
    return _hash(tree), sorted(kept)


def _file(name: str, root: Path) -> Path | None:
    path = root / Path(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def _defining(module: str, name: str, root: Path) -> str | None:
    """The module behind ``from module import name``; None for what a package's __init__ defines itself."""
    if (
        _file(f"{module}.{name}", root)
        or not (init := root / Path(*module.split(".")) / "__init__.py").is_file()
    ):
        return f"{module}.{name}" if _file(f"{module}.{name}", root) else module
    for node in ast.walk(_parsed(init)):
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return _defining(node.module, name, root)
    return None


def _hash(tree: ast.AST) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a bare string is a docstring or a remark
            node.body = [s for s in body if not isinstance(getattr(s, "value", None), ast.Constant)
                         or not isinstance(s, ast.Expr)]  # fmt: skip
    return hashlib.sha256(json.dumps(_plain(tree)).encode()).hexdigest()


def _plain(node: object) -> object:
    """The tree as lists; empty fields are left out, since Python versions differ in which they have."""
    if isinstance(node, ast.AST):
        fields = [[name, _plain(v)] for name, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, *fields]
    return [_plain(item) for item in node] if isinstance(node, list) else repr(node)
