"""The notebooks stay thin, well formed, and run on stored results."""

import itertools
import os
import re
from pathlib import Path

import nbformat
import pytest
import stored
from nbconvert import HTMLExporter

from hamlet import paths
from hamlet.artifact import build, figures, pictures, tables
from hamlet.artifact import results as stored_results

NOTEBOOKS = sorted(path for path in paths.NOTEBOOKS.glob("*.ipynb") if not path.name.startswith("."))
NUMBERS = [path.stem[:2] for path in NOTEBOOKS]
REPORTING = [
    *("02_accuracy", "03_efficiency", "04_tradeoff", "05_backbones", "06_claims", "09_ablation", "10_words"),
    "00_read_me_first",
]

FEW = ("spca_resnet18", "dscf_resnet18", "gem_resnet18-text", "hamlet_resnet18-no_text", "mlp_mobilenetv3")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=nbformat.NO_CONVERT)


def plain(cell) -> str:
    """A cell's Python without IPython's magics."""
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_reporting_notebooks_are_there():
    assert {*REPORTING, "01_train_evaluate"} <= {path.stem for path in NOTEBOOKS}


def test_numbered_without_gaps():
    assert [f"{number:02d}" for number in range(len(NUMBERS))] == NUMBERS


def test_every_picture_has_its_alternative_text(notebook):
    for cell in code(notebook):
        for output in cell.outputs:
            for kind in output.get("data", {}):
                if kind.startswith("image/"):
                    assert len(output.metadata.get(kind, {}).get("alt", "")) > 40, cell.source


def test_thin(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code(notebook)]
    assert max(lengths) <= 15 and sum(lengths) <= 120
    for cell in code(notebook):
        assert not re.search(r"^\s*(async\s+def|def|class)\s", cell.source, re.M), cell.source


def test_prose_before_each_code_cell_and_around_the_story(notebook):
    cells = notebook.cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown" and len(before.source.split()) >= 12, cell.source
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert all(part in prose for part in ("**Question.**", "does not show"))


def test_format_ids_kernel_and_no_trace_of_papermill(notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z0-9-]*", name) for name in ids)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    assert not any("papermill" in cell.metadata for cell in notebook.cells)


def test_one_parameters_cell_of_literals(notebook):
    tagged = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec(tagged[0].source, {}, values)
    assert {"profile", "dataset"} <= set(values)
    assert all(isinstance(value, str | int | float | bool | dict | type(None)) for value in values.values())


def test_no_path_of_a_machine(notebook):
    text = nbformat.writes(notebook)
    assert not re.search(r"/(home|root|Users|tmp|work)/", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_table_is_cut_off_in_a_page_of_1200_pixels(path, browser, tmp_path):
    (tmp_path / "page.html").write_text(HTMLExporter().from_filename(str(path))[0], encoding="utf-8")
    browser.set_window_size(1200, 900)
    browser.get((tmp_path / "page.html").as_uri())
    inside = "[...document.querySelectorAll('table')].map(t => [t.scrollWidth, t.parentElement.clientWidth])"
    tables = browser.execute_script(f"return {inside}")
    wide = [table for table in tables if table[0] > table[1] + 2]
    assert tables and not wide


@pytest.mark.parametrize("name", REPORTING)
def test_reporting_notebooks_run_and_write_what_the_workflow_expects(name, tmp_path, monkeypatch):
    """Executed in this process on stored test results: a kernel start per notebook would cost minutes."""
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    monkeypatch.setattr(figures, "RESOLUTIONS", (40,))
    stored.store_profile(tmp_path, without=FEW)
    notebook, values = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4), {}
    for cell in code(notebook):
        exec(plain(cell), values)
        if "parameters" in cell.metadata.get("tags", []):
            values |= {"profile": "quick", "dataset": "flat"}
    expected = set(build.reports("quick", "flat").get(name, []))
    written = {path for root in ("tables", "figures") for path in (tmp_path / root).rglob("*") if path.is_file()}
    assert expected <= written
    assert bool(written) == (name != "00_read_me_first")
    contents = {path: path.read_bytes() for path in written}
    for path in written:
        os.unlink(path)
    for cell in code(notebook):
        if "parameters" not in cell.metadata.get("tags", []):
            exec(plain(cell), values)
    assert {path: path.read_bytes() for path in written} == contents


def test_only_notebooks_write_tables_and_figures():
    for module in (stored_results, tables, figures, pictures):
        source = Path(module.__file__).read_text()
        assert 'output_dir("tables"' not in source and 'output_dir("figures"' not in source
