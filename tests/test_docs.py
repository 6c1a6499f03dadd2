"""The documentation builds without a warning, needs no network, names all that is public; its examples run as shown."""

import ast
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pages
import pytest
import yaml
from PIL import Image

from hamlet.paths import ROOT

DOCS = ROOT / "docs"
MODULES = [page.stem for page in sorted((DOCS / "api").glob("*.md")) if page.stem != "hamlet"]
PUBLIC = {"hamlet.models", "hamlet.data", "hamlet.search"}  # packages, whose __all__ says what is public


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")
    found = {}
    for html in site.rglob("*.html"):
        outside = loaded.findall(html.read_text(encoding="utf-8"))
        found |= {html.name: outside} if outside else {}
    assert not found


@pytest.mark.parametrize("module", MODULES)
def test_reference_names_all_that_is_public(site, module):
    """Every name of a package's __all__, every public function and class of a module has its entry."""
    name = f"hamlet.{module}"
    source = ROOT / "hamlet" / module / "__init__.py" if name in PUBLIC else ROOT / "hamlet" / f"{module}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    if name in PUBLIC:
        listed = next(s.value for s in tree.body if isinstance(s, ast.Assign) and s.targets[0].id == "__all__")
        public = ast.literal_eval(listed)
    else:
        kinds = (ast.FunctionDef, ast.ClassDef)
        public = [s.name for s in tree.body if isinstance(s, kinds) and not s.name.startswith("_")]
    public = [n for n in public if not n.isupper()]  # constants stand in the text of what uses them
    html = (site / "api" / f"{module}.html").read_text(encoding="utf-8")
    assert not [n for n in public if f'id="{name}.{n}"' not in html]


def test_every_page_is_in_the_navigation():
    def leaves(nav):
        for entry in nav:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else leaves(value)

    listed = set(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def test_the_first_lines_of_python(capsys):
    (snippet,) = pages.blocks(page("index.md"), "python")
    exec(snippet, {})
    assert 0 < float(capsys.readouterr().out) < 1


def installed(text: str, folder: Path) -> dict[str, str]:
    """Lay a page's files out as pip would install them; the environment in which they are found."""
    shown = pages.files(text)
    project = tomllib.loads(shown["pyproject.toml"])["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for name, code in shown.items():
        if name.endswith(".py"):
            (folder / name).write_text(code)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "HAMLET_CACHE": str(folder / "cache")}


def test_a_method_from_outside(tmp_path):
    text = page("add_a_method.md")
    environment = installed(text, tmp_path)
    assert pages.python(["use_it.py"], tmp_path, environment) == pages.files(text)["prints"]


@pytest.mark.slow
def test_its_run(tmp_path):
    text = page("add_a_method.md")
    environment = installed(text, tmp_path)
    (command,) = pages.commands(text)
    output = str(tmp_path / "twolevels")
    words = [output if word == "twolevels" else word for word in shlex.split(command)[1:]]
    pages.python(words, ROOT, environment)
    assert list((tmp_path / "twolevels").rglob("result.json"))


def leaves(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for part in ("train", "validation", "query"):
        for genus, species in (("acer", "acer rubrum"), ("acer", "acer nigrum"), ("tilia", "tilia cordata")):
            for i in range(2):
                rows.append((f"{part}-{species[:6]}-{i}.png", species, genus, part))
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / rows[-1][0])
    with open(folder / "leaves.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "species", "genus", "part"), *reversed(rows)])


def test_a_data_set_from_outside(tmp_path):
    text = page("add_a_data_set.md")
    environment = installed(text, tmp_path)
    leaves(tmp_path / "my-leaves")
    said = pages.python(["use_it.py"], tmp_path, environment).splitlines()
    assert said == ["True", "6 (6, 64, 64, 3) ['acer nigrum', 'acer rubrum', 'tilia cordata']"]
    (command,) = pages.commands(text)
    done = pages.run_all(command.replace("my-leaves", str(tmp_path / "my-leaves")), tmp_path, environment)
    assert done.returncode == 0, done.stderr


def test_a_number_followed_back():
    """The two commands that read run; the one that trains for minutes names a run that there is."""
    text = page("follow_a_number_back.md")
    *reading, training = pages.commands(text)
    record, cell = (pages.python(shlex.split(command)[1:]) for command in reading)
    mean = json.loads(record)["metrics"]["default"]["mAP"]
    assert float(cell) == pytest.approx(mean, abs=1e-9)
    from hamlet.artifact.profiles import expand

    words = shlex.split(training)
    option = {key: words[words.index(f"--{key}") + 1] for key in ("profile", "dataset", "model", "seed")}
    runs = expand(option["profile"], option["dataset"])
    assert any((str(r.model), str(r.seed)) == (option["model"], option["seed"]) for r in runs)


@pytest.mark.parametrize("command", pages.commands(page("artifact.md")))
def test_commands_of_the_artifact(command, tmp_path):
    done = pages.run_all(command, tmp_path)
    assert done.returncode == 0, done.stderr


def test_own_photos_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    pages.photos(tmp_path / "my-photos")
    pages.follow(page("photos.md"))


def test_sizes_at_which_the_kind_of_index_changes():
    """The page's table says for 1280 values what the index chooses."""
    from hamlet.search.index import choose_kind

    flat, graph = (int(n.replace(",", "")) for n in re.findall(r"up to ([\d,]+) \|", page("photos.md")))
    chosen = [choose_kind(n, 1280)[0] for n in (flat, flat * 2, graph, graph * 2)]
    assert chosen == ["flat", "hnsw", "hnsw", "ivfpq"]
