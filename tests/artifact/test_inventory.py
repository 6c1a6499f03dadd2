"""hamlet.artifact.inventory: what the tables are made of, and when they have to be made again."""

import json

import pytest

from hamlet import paths
from hamlet.artifact import inventory
from hamlet.artifact import profiles as workflow
from hamlet.artifact.profiles import Run

RUN = Run("smoke", "scenes", "gem_resnet18", "text", 0)


@pytest.fixture(autouse=True)
def own_output(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))


@pytest.fixture
def measured():
    """A sound efficiency measurement of one stored run, with a function that changes it."""
    RUN.folder.mkdir(parents=True)
    (RUN.folder / "result.json").write_text('{"digest": "d"}')
    wanted = workflow.load_profile("smoke")["efficiency"]
    given = {"image_size": wanted["image_size"], "images": wanted["repeats"], "runs": {RUN.run_name: "d"}}
    path = paths.results_dir("smoke", "scenes") / "efficiency" / "result.json"
    path.parent.mkdir()

    def write(models=(RUN.run_name,), **changes) -> None:
        record = {"parameters": given | changes, "models": {name: {} for name in models}}
        path.write_text(json.dumps(record | {"digest": workflow.digest(record)}))

    write()
    return write


def check(*names: str) -> str | None:
    return inventory.check_efficiency("smoke", "scenes", set(names or [RUN.run_name]))


def test_reports_name_files_of_the_profile_and_data_set():
    reports = inventory.reports("quick", "scenes")
    assert list(reports)[-1] == "00_read_me_first"
    assert paths.tables_dir("quick", "scenes") / "table1_accuracy.csv" in reports["02_accuracy"]
    everything = [path for files in reports.values() for path in files]
    assert len(everything) == len(set(everything))


def test_the_listing_changes_with_runs_and_unfinished_builds_alone():
    inventory.note([RUN])
    path = inventory.listing("smoke", "scenes")
    mark = path.with_suffix(".building")
    first = path.stat().st_mtime_ns
    mark.unlink()
    inventory.note([RUN])
    assert path.stat().st_mtime_ns == first
    inventory.note([RUN])  # the mark of a build that did not end is there now
    second = path.stat().st_mtime_ns
    assert second > first
    mark.unlink()
    inventory.note([RUN, Run("smoke", "scenes", "gem_resnet18", "default", 0)])
    third = path.stat().st_mtime_ns
    assert third > second
    path.with_suffix(".building").unlink()
    other = Run("smoke", "grocery", "gem_resnet18", "default", 1).folder / "result.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")  # the probability of improvement is over all data sets
    inventory.note([RUN, Run("smoke", "scenes", "gem_resnet18", "default", 0)])
    assert path.stat().st_mtime_ns > third


def test_the_listing_follows_code_cells_but_not_stored_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    cell = {"cell_type": "code", "source": "1 + 1", "outputs": []}

    def noted(**changes) -> str:
        (tmp_path / "02_accuracy.ipynb").write_text(json.dumps({"cells": [cell | changes]}))
        inventory.note([RUN])
        return inventory.listing("smoke", "scenes").read_text()

    first = noted()
    assert noted(outputs=[{"text": "2"}]) == first
    assert noted(source="1 + 2") != first


def test_a_sound_measurement_is_kept(measured):
    assert check() is None


def test_a_measurement_that_no_longer_answers_is_found(measured):
    assert check(RUN.run_name, "mlp_resnet18") == "it lacks mlp_resnet18"
    measured(image_size=64)
    assert "another image size" in check()
    path = paths.results_dir("smoke", "scenes") / "efficiency" / "result.json"
    measured()
    path.write_text(path.read_text().replace("224", "225"))
    assert "changed after" in check()
    path.write_text("{")
    assert "cannot be read" in check()
    path.unlink()
    assert check() == "not there yet"


def test_a_run_trained_again_counts_only_where_the_weights_are(measured):
    measured(runs={RUN.run_name: "other"})
    assert check() is None
    (RUN.folder / "model.safetensors").write_bytes(b"")
    assert check() == "trained again since: gem_resnet18-text"
