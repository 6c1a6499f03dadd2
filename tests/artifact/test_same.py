"""A change of code is shown to move no number by running both versions, and one that moves a number is noticed."""

import json
import shutil
from pathlib import Path

import pytest

from hamlet import paths
from hamlet.artifact import same
from hamlet.artifact.profiles import Run
from hamlet.errors import HamletError

GEM = Run("smoke", "scenes", "gem_resnet18", "default", 0)


def copied(tree: Path) -> Path:
    for name in ("hamlet", "notebooks", "workflow", "data"):
        left_out = shutil.ignore_patterns("__pycache__", *(["cache", "downloads", "models"] if name == "data" else []))
        shutil.copytree(paths.ROOT / name, tree / name, ignore=left_out)
    for name in ("requirements.lock", "run_all.sh"):
        shutil.copy2(paths.ROOT / name, tree / name)
    return tree


def edited(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_other_names_give_the_same_bits_and_another_rate_does_not(tmp_path):
    """The real road, three times: as it is, with a function renamed, and with the gradients clipped elsewhere."""
    here = same.outcome(paths.ROOT, GEM, tmp_path / "here")
    tree = copied(tmp_path / "tree")
    edited(tree, "hamlet/training.py", "fill_batch", "fitting_batch")
    renamed = same.outcome(tree, GEM, tmp_path / "renamed")
    assert renamed["code"] != here["code"]
    assert {k: v for k, v in renamed.items() if k != "code"} == {k: v for k, v in here.items() if k != "code"}
    edited(tree, "hamlet/training.py", "CLIP_NORM = 5.0", "CLIP_NORM = 0.1")
    assert same.outcome(tree, GEM, tmp_path / "clipped")["weights"] != here["weights"]


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What each tree comes to, without running it; and a place of its own for the evidence."""
    found = {"before": {"metrics": 1, "code": {"a": "1", "b": "1"}, "weights": "w"}}
    found["now"] = {"metrics": 1, "code": {"a": "2", "b": "1"}, "weights": "w"}
    monkeypatch.setattr(same, "every_kind", lambda files: [GEM])
    monkeypatch.setattr(same, "SAME_CODE", tmp_path / "same_code.json")
    monkeypatch.setattr(same, "outcome", lambda tree, run, folder: found["now" if tree == paths.ROOT else "before"])
    monkeypatch.setattr(same, "changed_files", lambda commits: {"a.py"})
    monkeypatch.setattr(same.subprocess, "run", lambda *a, **k: None)
    return found


def test_only_the_modules_that_changed_are_written_and_earlier_evidence_stays(told, tmp_path):
    (tmp_path / "same_code.json").write_text('[{"modules": {"z": ["0", "1"]}}]')
    told["before"]["code"]["joined to another"] = "1"
    earlier, new = json.loads(same.show(["abc"], 1).read_text())
    assert earlier == {"modules": {"z": ["0", "1"]}}
    assert new["modules"] == {"a": ["1", "2"], "joined to another": ["1", None]} and new["compared_with"] == "abc"
    assert new["weights"] == {"smoke/scenes/gem_resnet18 seed0": "w"}


def test_a_number_that_moved_is_named_and_nothing_is_written(told, tmp_path):
    told["before"]["metrics"] = 2
    with pytest.raises(HamletError, match="gem_resnet18 seed0: other metrics than with abc"):
        same.show(["abc"], 1)
    assert not (tmp_path / "same_code.json").exists()


def test_the_same_code_is_nothing_to_show(told):
    told["before"]["code"] = told["now"]["code"]
    with pytest.raises(HamletError, match="nothing to show"):
        same.show(["abc"], 1)


def test_only_what_depends_on_a_changed_file_is_run():
    """Of the committed results: a method's own file concerns its runs alone, the training loop all of them."""
    assert {run.model.partition("_")[0] for run in same.every_kind({"hamlet/models/sparse.py"})} == {"sparse"}
    everything = same.every_kind({"hamlet/training.py"})
    assert (
        same.every_kind({"hamlet/artifact/run.py"})
        == same.every_kind({"notebooks/01_train_evaluate.ipynb"})
        == everything
    )
    assert {run.dataset for run in everything} == {"scenes", "grocery", "grocery_unseen"}
    assert same.every_kind({"hamlet/artifact/tables.py", "README.md"}) == []
