"""Results that were tampered with, copied or mixed are refused by name."""

import json

import pytest
import stored

from hamlet.artifact import results as report


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("tamper", ["digit", "file", "lost", "half"])
def test_a_changed_result_is_refused_by_name(root, tamper):
    folder = stored.store_run(root, "gem_resnet18", 0, 0.4)
    result, parquet = folder / "result.json", folder / "per_query.parquet"
    if tamper == "digit":
        content = json.loads(result.read_text())
        content["metrics"]["default"]["mAP"] += 0.01
        result.write_text(json.dumps(content))
    elif tamper == "file":
        parquet.write_bytes(parquet.read_bytes() + b"x")
    elif tamper == "lost":
        parquet.unlink()
    else:
        result.write_text(result.read_text()[:100])
    named = "result.json" if tamper in ("digit", "half") else "per_query.parquet"
    with pytest.raises(report.ResultError, match=f"{named}.*build again"):
        report.load_results("quick", "flat")


def test_a_copied_run_and_a_mixture_of_data_are_refused(root):
    folder = stored.store_run(root, "gem_resnet18", 0, 0.4)
    folder.parent.rename(folder.parent.with_name("mace_resnet18"))
    with pytest.raises(report.ResultError, match="belongs to"):
        report.load_results("quick", "flat")
    folder.parent.with_name("mace_resnet18").rename(folder.parent)
    other = {**stored.PROVENANCE, "dataset_hash": "e" * 64}
    stored.store_run(root, "mace_resnet18", 0, 0.4, provenance=other)
    with pytest.raises(report.ResultError, match="different versions of flat"):
        report.load_results("quick", "flat")


def test_no_results_name_the_command(root):
    with pytest.raises(FileNotFoundError, match=r"run_all\.sh quick --dataset flat"):
        report.load_results("quick", "flat")
    with pytest.raises(FileNotFoundError, match=r"hamlet\.efficiency --profile quick --dataset flat"):
        report.load_efficiency("quick", "flat")
