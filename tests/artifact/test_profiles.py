"""Profiles are refused where they are wrong, and a stored result that no longer answers is found."""

import json
import re
import shutil

import pytest
import yaml

from hamlet import paths
from hamlet.artifact import profiles as workflow
from hamlet.artifact.profiles import Run
from hamlet.errors import HamletError

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
EXTRA = ["hamlet_resnet18-no_text", "hamlet_mobilenetv3-no_text", "hamlet_resnet18-no_exchange", "gem_resnet18-text"]


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """Writes a profile of its own: smoke.yaml with the changes that a test makes."""
    monkeypatch.setattr(paths, "WORKFLOW", tmp_path)
    original = yaml.safe_load((paths.ROOT / "workflow" / "smoke.yaml").read_text())
    shutil.copy(paths.ROOT / "workflow" / "variants.yaml", tmp_path)

    def write(change, name="mine") -> str:
        content = json.loads(json.dumps(original))
        changed = change(content)
        content = changed if isinstance(changed, dict) and "runs" in changed else content
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return name

    return write


def test_every_profile_holds_the_fifteen_runs_in_the_reports_order():
    assert {"paper", "quick", "smoke"} <= set(workflow.profile_names())
    for name in ("paper", "quick", "smoke"):
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
        (lambda c: c.update(seeds=0), "seeds = 0 lies outside"),
        (lambda c: c.update(datasets={"grocery": {"epoch": 1}}), "'epoch' in .* datasets.grocery"),
        (lambda c: c.update(models={"resnet": {"epochs": 1}}), "unknown model 'resnet'"),
        (lambda c: c["runs"].append("gem_resnet18-txt"), "unknown variant 'txt' in .*; valid: default, .*no_exchange"),
        (lambda c: c["runs"].append("gem_resnet18"), "different names"),
        (lambda c: c["runs"].append("../x"), "'../x' is no run; expected <model> or <model>-<variant>"),
        (lambda c: c["runs"].append(3), "3 is no run"),
        (lambda c: c["parameters"].update(margin=float("inf")), "margin = inf lies outside"),
        (lambda c: c["parameters"].update(margin=float("nan")), "margin = nan lies outside"),
        (lambda c: c.update(runs="gem_resnet18"), "runs: expected a list of different names"),
        (lambda c: c["parameters"].update(pretrained="["), "neither true, false, .packaged. nor a file"),
        (
            lambda c: c["parameters"].update(pretrained=1),
            "pretrained = 1 is neither true, false, .packaged. nor a file",
        ),
        (lambda c: c.update(datasets=["scenes"]), "datasets: expected a mapping"),
        (lambda c: c.update(parameters=None), "parameters: expected a mapping .*, got nothing"),
        (lambda c: c.update(models={"gem_resnet18": 3}), "models.gem_resnet18: expected a mapping"),
        (lambda c: c.update(datasets={"scenes": {"seeds": "2"}}), "seeds must be int"),
        (lambda c: c.update(datasets={"scenes": {"runs": ["gem"]}}), "unknown run 'gem' in .*scenes runs"),
        (lambda c: c["efficiency"].pop("repeats"), "efficiency: missing repeats"),
    ],
)
def test_a_wrong_profile_is_refused(profile, change, message):
    with pytest.raises(HamletError, match=message):
        workflow.load_profile(profile(change))


def test_an_unknown_profile_names_the_valid_ones():
    with pytest.raises(HamletError, match=r"unknown profile 'qick'; valid: .*paper,.*quick,.*smoke"):
        workflow.load_profile("qick")


def test_expand_runs_seed_by_seed(profile):
    name = profile(lambda c: c.update(runs=["gem_resnet18", "gem_resnet18-text"], datasets={"grocery": {"seeds": 3}}))
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
    with pytest.raises(HamletError, match=r"unknown model 'gem'.*valid: gem_resnet18, gem_resnet18-text"):
        workflow.expand(name, "scenes", models=["gem"])
    with pytest.raises(HamletError, match=r"unknown data set 'foo'; valid: .*grocery.*scenes"):
        workflow.expand(name, "foo")
    with pytest.raises(HamletError, match=r"seeds = 1001 lies outside \[1, 1000\]"):
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1", r"mine\.yaml, line \d: not YAML"),
        ("seeds: 1\n\tepochs: 2\n", r"mine\.yaml, line 2: not YAML"),
        ("", r"mine\.yaml: expected a mapping .*, got nothing"),
        ("- a\n- b\n", r"mine\.yaml: expected a mapping"),
        (b"\xff\xfe", r"mine\.yaml: not UTF-8"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name_and_line(profile, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HamletError, match=message):
        workflow.load_profile("mine")


def child(**sections):
    return lambda _: {"extends": "mine", "runs": ["gem_resnet18", "hamlet_resnet18-no_exchange"], **sections}


def test_an_extending_profile_inherits_and_shares_identical_runs(profile):
    profile(lambda c: c.update(runs=["gem_resnet18", "mlp_resnet18"], seeds=2))
    name = profile(child(datasets={"scenes": {"seeds": 3}}), "child")
    runs = workflow.expand(name, "scenes")
    assert [(run.profile, str(run)) for run in runs[:3]] == [
        ("mine", "gem_resnet18 seed0"),
        ("child", "hamlet_resnet18-no_exchange seed0"),
        ("mine", "gem_resnet18 seed1"),
    ]
    assert len(runs) == 6 and len(workflow.expand(name, "grocery")) == 4
    assert workflow.parameters(runs[1])["epochs"] == 1  # inherited
    other = profile(child(models={"gem_resnet18": {"epochs": 9}}), "other")
    assert {run.profile for run in workflow.expand(other, "scenes")} == {"other"}  # told something else
    profile(lambda c: c.update(runs=["mlp_resnet18"]))
    assert {run.profile for run in workflow.expand(name, "scenes")} == {"child"}  # the parent has no such run


def test_a_profile_that_extends_nothing_or_itself_is_refused(profile):
    with pytest.raises(HamletError, match=r"unknown profile 'absent' in workflow/mine.yaml extends"):
        workflow.load_profile(profile(lambda c: {"extends": "absent", "runs": ["gem_resnet18"]}))
    with pytest.raises(HamletError, match="extends itself through mine -> mine"):
        workflow.load_profile(profile(lambda c: {"extends": "mine", "runs": ["gem_resnet18"]}))


def test_a_data_set_may_name_its_runs_and_a_model_its_seeds(profile):
    name = profile(
        lambda c: c.update(datasets={"grocery": {"runs": ["mlp_resnet18"]}}, models={"gem_resnet18": {"seeds": 2}})
    )
    assert [str(run) for run in workflow.expand(name, "grocery")] == ["mlp_resnet18 seed0"]
    twice = [run for run in workflow.expand(name, "scenes") if run.seed == 1]
    assert {run.model for run in twice} == {"gem_resnet18"}


def test_a_variant_is_a_line_of_data(profile, tmp_path):
    text = (tmp_path / "variants.yaml").read_text()
    line = "slow: {text: true, options: {width: 8}, parameters: {epochs: 5, text_proxies: 2.0}}\n"
    (tmp_path / "variants.yaml").write_text(text + line)
    name = profile(lambda c: c["runs"].append("gem_resnet18-slow"))
    run = Run(name, "scenes", "gem_resnet18", "slow", 0)
    told = workflow.parameters(run)
    assert (told["epochs"], told["text_proxies"], told["text_guidance"] > 0) == (5, 2.0, True)
    assert workflow.options(run) == {"width": 8}
    (tmp_path / "variants.yaml").write_text(text + "slow: {epochs: 5}\n")
    with pytest.raises(HamletError, match=r"unknown key 'epochs' in workflow/variants.yaml slow"):
        workflow.load_profile(name)


def test_a_folder_of_photos_takes_the_settings_of_folder(profile):
    name = profile(lambda c: c.update(datasets={"folder": {"epochs": 4}}))
    assert workflow.parameters(Run(name, "folder-shoes-0a1b2c3d", "gem_resnet18", "default", 0))["epochs"] == 4
    slot = "folder-my_photos-0a1b2c3d"  # as the build names it: folder-<name>-<content>
    assert {run.dataset for run in workflow.expand(name, slot)} == {slot}
    with pytest.raises(HamletError, match="unknown data set"):
        workflow.expand(name, "folder-../x")
