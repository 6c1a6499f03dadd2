"""Profiles are refused where they are wrong, and a stored result that no longer answers is found."""

import hashlib
import json
import re

import pytest
import yaml

from hamlet import paths
from hamlet.artifact import profiles as workflow
from hamlet.artifact.profiles import Run

SEVEN = [
    "hamlet_resnet18",
    "hamlet_mobilenetv3",
    "sparse_resnet18",
    "sparse_mobilenetv3",
    "mace_resnet18",
    "spca_resnet18",
    "dscf_resnet18",
]
CONTROLS = ["gem_resnet18", "gem_mobilenetv3", "mlp_resnet18", "mlp_mobilenetv3"]
EXTRA = [
    "hamlet_resnet18-no_text",
    "hamlet_mobilenetv3-no_text",
    "hamlet_resnet18-no_exchange",
    "gem_resnet18-text",
]


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Writes a profile of its own: smoke.yaml with the changes that a test makes."""
    monkeypatch.setattr(paths, "WORKFLOW", tmp_path)
    original = yaml.safe_load((paths.ROOT / "workflow" / "smoke.yaml").read_text())

    def write(change) -> str:
        content = json.loads(json.dumps(original))
        change(content)
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return "mine"

    return write


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A sound result of one run under a results folder of the test's own."""
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    run = Run("smoke", "scenes", "gem_resnet18", "text", 0)
    run.folder.mkdir(parents=True)
    (run.folder / "curves.csv").write_text("epoch,loss\n0,1.0\n")
    record = {
        "schema": 1,
        "run": {
            "profile": "smoke",
            "dataset": "scenes",
            "model": "gem_resnet18",
            "variant": "text",
            "seed": 0,
        },
        "parameters": workflow.parameters(run),
        "metrics": {"default": {"mAP": 0.5}},
        "provenance": {"dataset_hash": "abc"},
        "files": {"curves.csv": hashlib.sha256(b"epoch,loss\n0,1.0\n").hexdigest()},
    }
    write(run, record)
    return run, record


def write(run: Run, record: dict) -> None:
    record["digest"] = workflow.digest(record)
    (run.folder / "result.json").write_text(json.dumps(record, indent=1))


def test_every_profile_holds_the_fifteen_runs_in_the_reports_order():
    assert workflow.profile_names() == ["paper", "quick", "smoke"]
    for name in workflow.profile_names():
        assert workflow.load_profile(name)["runs"] == SEVEN + CONTROLS + EXTRA


def test_paper_is_the_reports_protocol():
    loaded = workflow.load_profile("paper")
    values = loaded["parameters"]
    assert loaded["seeds"] == 5
    assert (values["image_size"], values["train_size"], values["batch_size"]) == (224, 224, 32)
    assert values["pretrained"] is True and values["limit"] is None


def test_every_value_carries_its_reason():
    """Each parameter's line in quick.yaml, the profile that readers tune, has a comment."""
    text = (paths.WORKFLOW / "quick.yaml").read_text()
    block = text.split("\nparameters:\n")[1].split("\ndatasets:")[0]
    bare = [line.strip() for line in block.splitlines() if not re.search(r"#\s*\S", line)]
    assert not [line for line in bare if line.split(":")[0] not in ("weight_decay", "margin", "scale")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["parameters"].update(epoch=3), "unknown key 'epoch' in .*; valid: epochs"),
        (lambda c: c["parameters"].update(epochs="3"), "epochs must be int, got '3'"),
        (lambda c: c["parameters"].update(epochs=True), "epochs must be int, got True"),
        (lambda c: c["parameters"].update(epochs=0), "epochs = 0 lies outside"),
        (lambda c: c["parameters"].update(epochs=None), "epochs must be int, got None"),
        (lambda c: c["parameters"].update(learning_rate="1e-4"), "write 1.0e-4"),
        (lambda c: c["parameters"].update(loss="softmax"), "unknown loss 'softmax' in .*; valid: cosface"),
        (lambda c: c["parameters"].pop("limit"), "missing limit"),
        (lambda c: c.update(extra=1), "unknown section"),
        (lambda c: c.pop("seeds"), "missing section seeds"),
        (lambda c: c.update(seeds=0), "seeds must be"),
        (lambda c: c.update(datasets={"grocery": {"epoch": 1}}), "'epoch' in .* datasets.grocery"),
        (lambda c: c.update(models={"resnet": {"epochs": 1}}), "unknown model 'resnet'"),
        (
            lambda c: c["runs"].append("gem_resnet18-txt"),
            "unknown variant 'txt' in .*; valid: default, no_text, no_exchange, text",
        ),
        (lambda c: c["runs"].append("gem_resnet18"), "different names"),
    ],
)
def test_a_wrong_profile_is_refused(profile, change, message):
    with pytest.raises(ValueError, match=message):
        workflow.load_profile(profile(change))


def test_an_unknown_profile_names_the_valid_ones():
    with pytest.raises(ValueError, match="unknown profile 'qick'; valid: paper, quick, smoke"):
        workflow.load_profile("qick")


def test_expand_runs_seed_by_seed(profile):
    name = profile(
        lambda c: c.update(runs=["gem_resnet18", "gem_resnet18-text"], datasets={"grocery": {"seeds": 3}})
    )
    runs = workflow.expand(name, "scenes", seeds=2)
    assert [str(run) for run in runs] == [
        "gem_resnet18 seed0",
        "gem_resnet18-text seed0",
        "gem_resnet18 seed1",
        "gem_resnet18-text seed1",
    ]
    assert len(workflow.expand(name, "grocery")) == 6
    assert runs[1] == Run(name, "scenes", "gem_resnet18", "text", 0)
    only = workflow.expand(name, "scenes", models=["gem_resnet18-text"])
    assert [run.run_name for run in only] == ["gem_resnet18-text"]
    with pytest.raises(ValueError, match=r"unknown model 'gem'.*valid: gem_resnet18, gem_resnet18-text"):
        workflow.expand(name, "scenes", models=["gem"])
    with pytest.raises(ValueError, match="unknown data set 'foo'; valid: scenes, grocery"):
        workflow.expand(name, "foo")
    with pytest.raises(ValueError, match=r"1\.\.1000, got 1001"):
        workflow.expand(name, "scenes", seeds=1001)


def test_parameters_merge_and_say_who_uses_text(profile):
    def change(content):
        content["datasets"] = {"grocery": {"epochs": 7, "seeds": 2}}
        content["models"] = {"mlp_resnet18": {"epochs": 9}}

    name = profile(change)

    def told(dataset, model, variant="default"):
        return workflow.parameters(Run(name, dataset, model, variant, 0))

    assert told("scenes", "gem_resnet18")["epochs"] == 1
    assert told("grocery", "gem_resnet18")["epochs"] == 7
    assert told("grocery", "mlp_resnet18")["epochs"] == 9
    assert "seeds" not in told("grocery", "gem_resnet18")
    weights = {
        key: told("scenes", *key)["text_guidance"] > 0
        for key in [
            ("hamlet_resnet18", "default"),
            ("hamlet_resnet18", "no_text"),
            ("hamlet_resnet18", "no_exchange"),
            ("gem_resnet18", "default"),
            ("gem_resnet18", "text"),
        ]
    }
    assert list(weights.values()) == [True, False, True, False, True]


def test_a_sound_result_is_accepted(stored):
    run, _ = stored
    assert workflow.check_result(run) is None
    assert workflow.check_result(run, "abc") is None
    assert workflow.stored_runs("smoke", "scenes") == [run]


def test_the_digest_is_that_of_the_canonical_json(stored):
    _, record = stored
    rest = {key: record[key] for key in sorted(record) if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert record["digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_result_changed_by_hand_is_noticed(stored):
    run, _ = stored
    path = run.folder / "result.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    assert "changed after the run" in workflow.check_result(run)


def test_a_changed_or_missing_file_beside_it_is_noticed(stored):
    run, _ = stored
    (run.folder / "curves.csv").write_text("epoch,loss\n0,0.1\n")
    assert "curves.csv was changed" in workflow.check_result(run)
    (run.folder / "curves.csv").unlink()
    assert "curves.csv is missing" in workflow.check_result(run)


def test_another_profile_data_set_or_run_is_noticed(stored):
    run, record = stored
    assert "data set has changed" in workflow.check_result(run, "abd")
    record["parameters"]["epochs"] = 2
    write(run, record)
    assert "epochs 2 -> 1" in workflow.check_result(run)
    record["run"]["seed"] = 1
    write(run, record)
    assert "another run" in workflow.check_result(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_an_unreadable_result_is_noticed(stored, text):
    run, _ = stored
    (run.folder / "result.json").write_text(text)
    assert "cannot be read" in workflow.check_result(run)
    (run.folder / "result.json").unlink()
    assert "result.json is missing" in workflow.check_result(run)


def test_the_stamp_depends_on_size_and_data_root(profile, tmp_path, monkeypatch):
    monkeypatch.delenv("HAMLET_DATA", raising=False)
    name = profile(lambda c: None)
    first = workflow.stamp(name, "scenes")
    assert workflow.stamp(name, "scenes") == first != workflow.stamp(name, "grocery")
    monkeypatch.setenv("HAMLET_DATA", str(tmp_path))
    assert workflow.stamp(name, "scenes") != first
    monkeypatch.delenv("HAMLET_DATA")
    profile(lambda c: c["parameters"].update(image_size=96))
    assert workflow.stamp(name, "scenes") != first
