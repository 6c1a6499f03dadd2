"""What is loaded is what a run wrote, and what no longer answers to its inputs is labelled."""

import json
import shutil

import pytest
import stored

from hamlet import paths
from hamlet.artifact import code, results
from hamlet.artifact.code import code_hashes
from hamlet.artifact.profiles import Run, options, parameters

RUN = Run("smoke", "scenes", "gem_resnet18", "text", 0)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    return tmp_path


@pytest.fixture
def record(root) -> dict:
    """A sound result of RUN on disk."""
    (RUN.folder).mkdir(parents=True)
    (RUN.folder / "curves.csv").write_text("epoch,loss\n0,1.0\n")
    origin = {"dataset_hash": "abc", "code": code_hashes(RUN), "versions": {"torch": "2.13.0+cpu"}}
    content = {
        "run": vars(RUN),
        "parameters": parameters(RUN),
        "options": options(RUN),
        "metrics": {"default": {"mAP": 0.5, "P@1": 0.5, "P@5": 0.5, "P@10": 0.5}},
        "provenance": origin,
        "files": {"curves.csv": paths.sha256(RUN.folder / "curves.csv")},
    }
    stored.seal(content, RUN.folder / "result.json")
    return content


def test_a_sound_result_is_accepted(record):
    assert results.check_result(RUN) == results.check_result(RUN, "abc") == ("sound", "")
    assert results.stored_runs("smoke", "scenes") == [RUN]
    assert results.stored_datasets("smoke") == ["scenes"]
    assert list(results.load_results("smoke", "scenes")["stale"]) == [False]
    assert results.check_result(Run("smoke", "scenes", "gem_resnet18", "text", 1))[0] == "absent"


def change(record: dict, *keys: str, to: object) -> dict:
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    stored.seal({key: value for key, value in record.items() if key != "digest"}, RUN.folder / "result.json")
    return record


@pytest.mark.parametrize(
    ("keys", "value", "why"),
    [
        (("parameters", "epochs"), 2, "epochs 2 -> 1"),
        (("options",), {"width": 8}, "options {'width': 8} -> {}"),
        (("provenance", "versions"), {"torch": "2.12.0"}, "torch 2.12.0 -> 2.13.0"),
        (("provenance", "code", "hamlet.models.gem"), "0", "other code: hamlet.models.gem"),
        (("provenance", "code", "hamlet.models.gone"), "0", "other code: hamlet.models.gone"),
    ],
)
def test_what_was_made_otherwise_is_stale_and_says_why(record, keys, value, why):
    change(record, *keys, to=value)
    assert results.check_result(RUN) == ("stale", why)
    row = results.load_results("smoke", "scenes").iloc[0]
    assert (row["stale"], row["stale_why"]) == (True, why)


def test_packages_that_make_no_number_may_change(record):
    change(record, "provenance", "versions", to={"torch": "2.13.0", "mkdocs": "0.1", "pandas": "1.0"})
    assert results.check_result(RUN)[0] == "sound"


def test_a_machine_with_a_card_has_versions_of_its_own(record):
    change(record, "provenance", "versions", to={"torch": "2.11.0+cu130"})
    assert results.check_result(RUN)[0] == "stale"
    change(record, "provenance", "driver", to="13.0")
    assert results.check_result(RUN) == ("sound", "")


def test_auto_is_answered_by_any_device_and_a_named_one_by_itself(record):
    change(record, "parameters", "device", to="auto")
    assert results.check_result(RUN) == ("stale", "device 'auto' -> 'cpu'")
    change(record, "parameters", "device", to="cpu")
    assert results.check_result(RUN, settings=parameters(RUN) | {"device": "auto"}) == ("sound", "")


def test_a_change_that_was_shown_to_move_no_number_leaves_a_result_sound(record, tmp_path, monkeypatch):
    shown, now = tmp_path / "same_code.json", record["provenance"]["code"]["hamlet.models.gem"]
    monkeypatch.setattr(code, "SAME_CODE", shown)
    code._shown_equal.cache_clear()
    change(record, "provenance", "code", "hamlet.models.gem", to="first")
    assert results.check_result(RUN)[0] == "stale"
    pairs = [{"modules": {"hamlet.models.gem": pair}} for pair in (["first", "second"], ["second", now])]
    shown.write_text(json.dumps(pairs))
    code._shown_equal.cache_clear()
    assert results.check_result(RUN) == ("sound", "")
    change(record, "provenance", "code", "hamlet.training", to="first")  # shown for another module
    assert results.check_result(RUN) == ("stale", "other code: hamlet.training")
    code._shown_equal.cache_clear()


def test_runs_made_on_two_machines_are_set_side_by_side(record, tmp_path):
    """The same configuration and seed in a profile and in the one that it extends, nothing else being different."""
    assert results.trained_twice("smoke", "scenes").empty  # extends none
    for profile, device, score in (("pretrained", "CPU (A)", 0.5), ("ablation", "Card B", 0.6)):
        run = Run(profile, "scenes", "gem_efficientnetlite0", "default", 0)
        run.folder.mkdir(parents=True)
        told = {"run": vars(run), "parameters": parameters(run), "files": {}}
        told["metrics"] = {"default": record["metrics"]["default"] | {"mAP": score}}
        told["provenance"] = record["provenance"] | {"device": device, "code": code_hashes(run)}
        stored.seal(told, run.folder / "result.json")
    twice = results.trained_twice("ablation", "scenes")
    assert list(twice.iloc[0]) == ["gem_efficientnetlite0", 0, "Card B", "CPU (A)", 0.6, 0.5]
    change(told, "parameters", "epochs", to=1)
    stored.seal({k: v for k, v in told.items() if k != "digest"}, run.folder / "result.json")
    assert results.trained_twice("ablation", "scenes").empty


def test_changed_data_and_results_without_a_hash_of_each_module_are_stale(record):
    assert results.check_result(RUN, "abd") == ("stale", "the content of the data set differs")
    del record["provenance"]["code"]
    change(record, "provenance", "code_sha256", to="0" * 64)
    assert "recorded no hash of each module" in results.check_result(RUN)[1]


def test_a_new_parameter_with_a_default_leaves_older_results_as_they_are(record):
    del record["parameters"]["frozen_levels"]
    change(record, "parameters", "epochs", to=1)
    assert results.check_result(RUN)[0] == "sound"
    change(record, "parameters", "frozen_levels", to=1)
    assert results.check_result(RUN) == ("stale", "frozen_levels 1 -> 0")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", "null", '{"digest": "x"}'])
def test_a_file_that_is_no_result_is_broken(record, text):
    (RUN.folder / "result.json").write_text(text)
    assert results.check_result(RUN)[0] == "broken"
    with pytest.raises(results.ResultError, match=r"result\.json is no"):
        results.load_results("smoke", "scenes")
    (RUN.folder / "result.json").unlink()
    assert results.check_result(RUN)[0] == "broken"  # other files lie there


def test_a_result_edited_or_moved_by_hand_is_broken(record):
    path = RUN.folder / "result.json"
    text = path.read_text()
    path.write_text(text.replace("0.5", "0.9"))
    assert "was changed after its run" in results.check_result(RUN)[1]
    path.write_text(text)
    other = Run(*list(vars(RUN).values())[:4], 3)
    shutil.copytree(RUN.folder, other.folder)
    assert results.check_result(other)[0] == "broken" and "another run" in results.check_result(other)[1]
    with pytest.raises(results.ResultError, match="seed3 holds the result of"):
        results.load_results("smoke", "scenes")
    (RUN.folder / "curves.csv").write_text("epoch,loss\n0,0.1\n")
    assert "curves.csv was changed" in results.check_result(RUN)[1]
    (RUN.folder / "curves.csv").unlink()
    assert "curves.csv is listed in result.json and missing" in results.check_result(RUN)[1]


def test_runs_come_by_name_and_seed_and_the_lowest_seed_stands_for_a_run(root):
    for run, seed in (("gem_resnet18", 1), ("gem_resnet18-aligned", 0), ("gem_resnet18", 0)):
        stored.store_run(root, run, seed, 0.4)
    rows = results.load_results("quick", "flat")
    assert list(zip(rows["run"], rows["seed"], strict=True)) == [
        ("gem_resnet18", 0), ("gem_resnet18", 1), ("gem_resnet18-aligned", 0)
    ]  # fmt: skip
    assert {name: run.seed for name, run in results.first_runs("quick", "flat").items()} == {
        "gem_resnet18": 0, "gem_resnet18-aligned": 0
    }  # fmt: skip


def test_runs_that_an_extended_profile_shares_are_stored_runs_of_the_one_that_extends_it(record):
    shared = Run("ablation", "scenes", "hamlet_efficientnetlite0", "shuffled", 0)
    assert results.stored_runs("captions", "scenes") == []
    shared.folder.mkdir(parents=True)
    stored.seal(record | {"run": vars(shared), "files": {}}, shared.folder / "result.json")
    assert results.stored_runs("captions", "scenes") == [shared] == results.stored_runs("ablation", "scenes")
    assert results.load_results("captions", "scenes")["run"].tolist() == [shared.run_name]


def test_without_a_run_the_command_that_makes_one_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"run_all\.sh quick --dataset flat"):
        results.load_results("quick", "flat")
    with pytest.raises(results.ResultError, match=r"run_all\.sh quick --dataset flat"):
        results.load_efficiency("quick", "flat")


def test_runs_of_different_versions_of_the_data_cannot_share_a_table(root):
    stored.store_run(root, "gem_resnet18", 0, 0.4)
    stored.store_run(root, "gem_resnet18", 1, 0.4, provenance=stored.PROVENANCE | {"dataset_hash": "e" * 64})
    with pytest.raises(results.ResultError, match="different versions of flat"):
        results.load_results("quick", "flat")


def test_the_digest_is_that_of_the_canonical_json(record):
    content = json.loads((RUN.folder / "result.json").read_text())
    assert content["digest"] == results.digest(content) == results.digest({**content, "digest": "x"})
    assert results.digest(content | {"extra": 1}) != content["digest"]
