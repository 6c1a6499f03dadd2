"""Which code a run's numbers depend on, and what may change without a number changing."""

import shutil

import pytest

from hamlet import paths
from hamlet.artifact import code
from hamlet.artifact.profiles import Run
from hamlet.errors import HamletError

GEM = Run("quick", "scenes", "gem_resnet18", "default", 0)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the package to edit; returns a function that adds text to one of its files."""
    shutil.copytree(paths.ROOT / "hamlet", tmp_path / "hamlet", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(paths.NOTEBOOKS, tmp_path / "notebooks")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")

    def edit(name: str, old: str, new: str) -> dict[str, str]:
        path = tmp_path / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return code.code_hashes(GEM)

    return edit


def test_a_run_depends_on_training_its_method_its_data_set_and_what_they_import():
    found = set(code.code_hashes(GEM))
    assert {"hamlet.training", "hamlet.evaluation", "hamlet.distillation", "hamlet.models.gem"} <= found
    assert {"hamlet.metrics", "hamlet.data.scenes", "hamlet.artifact.run.build_model"} <= found
    assert "hamlet.artifact.run.load_data" in found
    others = {f"hamlet.models.{name}" for name in ("hamlet", "mace", "sparse", "spca", "dscf", "acsa")}
    assert not found & (others | {"hamlet.data.grocery", "hamlet.paths", "hamlet.errors", "hamlet.artifact.build"})
    mlp = code.code_hashes(Run("quick", "grocery_unseen", "mlp_mobilenetv3", "default", 0))
    assert {"hamlet.models.gem", "hamlet.data.grocery"} <= set(mlp)
    assert "hamlet.models.acsa" in code.code_hashes(Run("quick", "scenes", "hamlet_resnet18", "no_text", 0))


def test_prose_costs_nothing_and_code_does(tree):
    before = code.code_hashes(GEM)
    docstring = (paths.ROOT / "hamlet" / "training.py").read_text().splitlines()[0]
    assert tree("hamlet/training.py", docstring, '"""Another sentence.') == before
    assert tree("hamlet/training.py", "import json\n", "# a remark\n\nimport json\n") == before
    assert tree("hamlet/models/mace.py", "import", "x = 1\nimport") == before  # another method's
    after = tree("hamlet/models/gem.py", "import", "x = 1\nimport")
    assert [name for name in after if after[name] != before[name]] == ["hamlet.models.gem"]
    assert code.json_hash(after) != code.json_hash(before)


def test_the_training_notebooks_code_counts_and_its_outputs_do_not(tree):
    before = code.code_hashes(GEM)
    assert tree("notebooks/01_train_evaluate.ipynb", '"outputs": [', '"outputs": [ ') == before
    after = tree("notebooks/01_train_evaluate.ipynb", "trained.curves.tail(6).T.round(4)", "trained.curves.round(5)")
    assert [name for name in after if after[name] != before[name]] == ["notebooks/01_train_evaluate"]


def test_a_model_that_nobody_registers_is_refused():
    with pytest.raises(HamletError, match=r"unknown 'foo': no module of hamlet/models"):
        code.code_hashes(Run("quick", "scenes", "foo_resnet18", "default", 0))
