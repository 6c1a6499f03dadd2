import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import stored
import torch
from filelock import FileLock

import hamlet.data
from hamlet import evaluation, paths, training
from hamlet.artifact import cost, profiles, results, run
from hamlet.artifact.code import code_hashes
from hamlet.artifact.profiles import Run
from hamlet.distillation import LSA_DIM
from hamlet.errors import HamletError
from hamlet.models import create_model, load_model

SMOKE_NAMES = ("smoke", "scenes", "gem_resnet18", "default")
SMOKE = Run(*SMOKE_NAMES, 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One real smoke run through the command line, in a folder with a space, without git."""
    root = tmp_path_factory.mktemp("a b")
    env = os.environ | {"HAMLET_OUTPUT": str(root), "PYTHONPATH": str(paths.ROOT), "GIT_DIR": str(root / "none")}
    command = [sys.executable, "-m", "hamlet.artifact.run", "--profile", "smoke", "--dataset", "scenes"]
    torn = root / "results/smoke/scenes/gem_resnet18/.seed0.partial/.checkpoint.77.partial.safetensors"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"a killed process wrote this")
    done = subprocess.run(
        [*command, "--model", "gem_resnet18"], env=env, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_result_is_whole_and_says_where_it_came_from(made, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(made))
    assert results.check_result(SMOKE) == ("sound", "")
    record = json.loads((SMOKE.folder / "result.json").read_text())
    origin = record["provenance"]
    assert origin["commit"] is None
    assert origin["threads"] == 1
    assert origin["initial_weights"]["source"] == "random"
    assert {"dataset_hash", "lock_sha256", "code_sha256", "versions", "wall_seconds", "peak_memory_mb"} <= set(origin)
    assert {"default", "seen", "validation", "hierarchical", "equal_bytes"} <= set(record["metrics"])
    assert record["untrained"]["default"]["queries"] == record["metrics"]["default"]["queries"] > 0
    assert record["untrained"]["default"]["mAP"] != record["metrics"]["default"]["mAP"]
    assert set(record["files"]) == {"per_query.parquet", "neighbours.parquet", "curves.csv", "thumbnails.webp"}
    kept = pd.read_parquet(SMOKE.folder / "per_query.parquet")
    graded = kept.groupby("protocol")["HAP"].mean()  # for single queries as in the mean, on the default protocol alone
    assert graded["default"] == pytest.approx(record["metrics"]["hierarchical"]["HAP"], abs=1e-12)
    assert graded.drop("default").isna().all()
    curves = pd.read_csv(SMOKE.folder / "curves.csv")
    assert record["training"]["final_loss"] == pytest.approx(curves["loss"].iloc[-1])
    assert (SMOKE.folder / "executed.ipynb").is_file()
    assert not list(SMOKE.folder.parent.glob(".*.partial"))
    assert not list(SMOKE.folder.glob(".*"))


def test_a_stored_result_is_not_made_again_and_an_altered_one_is_refused(made, monkeypatch, capsys):
    monkeypatch.setenv("HAMLET_OUTPUT", str(made))
    monkeypatch.setattr(run, "execute", lambda *a, **k: pytest.fail("the notebook must not run"))
    run.make(SMOKE)
    assert "nothing to do" in capsys.readouterr().out
    path = SMOKE.folder / "result.json"
    kept = path.read_text()
    record = json.loads(kept)
    record["metrics"]["default"]["mAP"] = 0.99
    path.write_text(json.dumps(record))
    with pytest.raises(HamletError, match="may not be used"):
        run.make(SMOKE)
    path.write_text(kept)


def test_a_result_of_other_settings_is_set_aside_unless_it_is_to_be_kept(made, tmp_path, monkeypatch):
    def reached(*_):
        raise HamletError("trains")

    monkeypatch.setattr(run, "execute", reached)
    source, target = made / "results/smoke/scenes/gem_resnet18/seed0", tmp_path / "mine"
    shutil.copytree(source, target)
    assert run.make(SMOKE, overrides={"epochs": 2}, output=str(target), keep=True) == target
    with pytest.raises(HamletError, match="trains"):
        run.make(SMOKE, overrides={"epochs": 2}, output=str(target))
    assert (tmp_path / "mine.previous-1" / "result.json").is_file()


def test_a_notebook_without_a_result_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    monkeypatch.setattr(run, "execute", lambda *a, **k: None)
    monkeypatch.setattr(run.os, "environ", dict(os.environ))
    with pytest.raises(HamletError, match="without a result"):
        run.make(SMOKE)
    assert not SMOKE.folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gem_resnet19"}, "it has hamlet_resnet18"),
        ({"profile": "fast"}, "valid: .*paper.*quick.*smoke"),
        ({"dataset": "foo"}, "unknown data set 'foo'; valid: .*grocery.*scenes"),
        ({"seed": -1}, "seed must be"),
        ({"overrides": {"learning_rte": 1e-3}}, "learning_rate"),
        ({"overrides": {"learning_rate": "1e-3"}}, "must be float"),
        ({"overrides": {"epochs": 0}}, "outside"),
    ],
)
def test_names_and_types_are_checked_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        run.open_job(**{"profile": "smoke", "dataset": "scenes", "model": "gem_resnet18"} | changes)


def test_overrides_never_end_in_a_profile(capsys):
    with pytest.raises(SystemExit):
        run.main(["--profile", "smoke", "--set", "epochs=3"])
    assert "--output" in capsys.readouterr().err


def test_a_folder_with_other_files_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "execute", lambda *a, **k: pytest.fail("the notebook must not run"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(HamletError, match="other files"):
        run.make(SMOKE, output=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_unknown_notebook_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="01_train_evaluate"):
        run.execute("99_none", tmp_path / "x.ipynb", {})


def test_a_runs_model_follows_its_seed_and_has_the_layers_of_its_text_terms():
    settings = profiles.parameters(SMOKE)

    def made(seed: int = 0, **changes):
        return run.build_model(Run(*SMOKE_NAMES, seed), settings | changes)

    first, again, other = (next(made(seed).backbone.parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    plain, aligned, worded = made(), made(text_alignment=1.0), made(text_proxies=1.0)
    assert plain.text_tower is None and plain.text_projection is None
    assert aligned.text_projection is not None and aligned.text_tower is None
    assert worded.text_tower is not None and worded.text_projection is None
    both = made(text_proxies=1.0, text_alignment=1.0, text_teacher="lsa")
    # on a processor bfloat16 helps a ResNet and hinders the others
    assert not plain.float32_backbone
    assert run.build_model(Run("smoke", "scenes", "gem_mobilenetv3", "default", 0), settings).float32_backbone
    cut = run.build_model(Run("smoke", "scenes", "hamlet_resnet18", "no_exchange", 0), settings)
    assert cut.options["exchange"] is False  # as the variant says
    lite = Run("pretrained", "scenes", "gem_efficientnetlite0", "default", 0)
    assert run.build_model(lite, profiles.parameters(lite)).initial_weights["source"] == "packaged"
    assert both.text_tower.in_features == both.text_projection.out_features == LSA_DIM


def test_what_is_set_at_the_command_line_reaches_the_run(tmp_path):
    job = run.open_job(*SMOKE_NAMES, output=str(tmp_path), overrides={"epochs": 7, "margin": 1})
    assert job.settings == profiles.parameters(SMOKE) | {"epochs": 7, "margin": 1.0}
    assert job.folder == tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_the_workers_of_a_killed_kernel_end_with_it():
    import psutil

    code = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from hamlet.artifact.run import open_job
open_job("smoke", "scenes", "gem_resnet18")
with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""
    env = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as kernel:
        worker = psutil.Process(int(kernel.stdout.readline()))
        kernel.kill()
        worker.wait(timeout=10)
    assert not worker.is_running()


def test_the_cost_is_of_the_stored_weights_or_of_new_ones_that_cost_the_same(made, monkeypatch, tmp_path):
    monkeypatch.setenv("HAMLET_OUTPUT", str(made))
    found = []
    for weights in ("stored", "new"):
        file = SMOKE.folder / cost.WEIGHTS
        if weights == "new":
            file.rename(tmp_path / "kept")
        record = results.read_verified(cost.measure("smoke", "scenes"))
        given, row = record["parameters"], record["models"]["gem_resnet18"]
        assert given["new_weights"] == (["gem_resnet18"] if weights == "new" else [])
        assert given["runs"] == {"gem_resnet18": results.read_verified(SMOKE.folder / "result.json")["digest"]}
        assert row["latency_ms_q25"] <= row["latency_ms"] <= row["latency_ms_q75"]
        found.append((row["parameters"], row["macs"], row["descriptor_bytes"]))
    (tmp_path / "kept").rename(file)
    assert found[0] == found[1]
    assert cost.weights_of(Run("smoke", "scenes", "hamlet_resnet18", "default", 0), {}, tmp_path) is None


@pytest.mark.parametrize("teacher", ["sentence", "lsa"])
def test_a_stored_run_says_what_was_measured_before_and_after_and_how_it_was_trained(tmp_path, toy_data, teacher):
    settings = profiles.parameters(SMOKE) | {"text_teacher": teacher, "images_per_class": 1, "image_size": 64}
    job = run.Job(Run(*SMOKE_NAMES[:3], "no_exchange", 0), settings, tmp_path / "out")
    mixed = np.random.default_rng(0).permutation(toy_data.query.labels)  # so that a mAP tells two models apart
    toy_data = replace(toy_data, splits=toy_data.splits | {"query": replace(toy_data.query, labels=mixed)})
    torch.manual_seed(0)
    before, model = (create_model("gem", backbone="test_resnet", text="proxies") for _ in range(2))
    model.initial_weights = {"source": "file", "tag": "x", "sha256": "y"}
    untrained, after = (evaluation.evaluate(net, toy_data, 64, ("default",)) for net in (before, model))
    curves = pd.DataFrame({"epoch": [1, 2], "loss": [3.0, 2.0], "metric_loss": [1.0, 0.5]})
    trained = training.Trained(curves, 123, 4.5, torch.device("cpu"), True, 4)
    record = json.loads(run.store(job, toy_data, model, untrained, trained, after).read_text())
    assert record["training"] == {
        "epochs": 2, "images": 123, "seconds": 4.5, "final_loss": 2.0, "bf16": True, "batch_size": 48,
        "images_per_class": 4,
    }  # fmt: skip
    assert record["untrained"] == untrained.metrics != after.metrics == record["metrics"]
    assert record["parameters"] == settings and record["options"] == {"exchange": False}
    # words of a teacher that is fitted anew to each list of sentences would be measured in unrelated spaces
    assert record.get("words") == (evaluation.words(model, toy_data, after) if teacher == "sentence" else None)
    origin = record["provenance"]
    assert origin["initial_weights"] == model.initial_weights and origin["dataset_hash"] == toy_data.content_hash
    assert set(origin["code"]) == set(code_hashes(job.run)) and 0 < origin["wall_seconds"] < 1e6
    kept = load_model(tmp_path / "out" / "model.safetensors")
    assert torch.equal(kept.head[0].weight, model.head[0].weight)
    assert kept.card["metrics"] == after.metrics["default"] and kept.card["teacher"] == teacher
    per_query = pd.read_parquet(tmp_path / "out" / "per_query.parquet")
    assert per_query["AP"].tolist() == after.per_query["AP"].tolist()


def test_data_come_at_the_size_and_limit_of_the_settings_and_a_folder_with_its_own_options(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path))
    monkeypatch.setattr(hamlet.data, "load_dataset", lambda *names, **how: asked.append((names, how)))
    settings = {"image_size": 224, "train_size": 112, "limit": 3}
    run.load_data("scenes", settings)
    source = {"root": "/photos", "options": {"split_by": "image", "missing_captions": "class"}}
    paths.write_json(run.source_of("folder-mine-01234567"), source)
    run.load_data("folder-mine-01234567", settings)
    how = {"root": None, "size": 256, "limit": 3}
    assert asked == [(("scenes",), how), (("folder",), how | {"root": "/photos"} | source["options"])]


def test_the_notebook_is_told_the_run_and_a_checkpoint_of_other_code_is_set_aside(tmp_path, monkeypatch):
    def execute(name, output, given):
        told.append((name, given))
        raise HamletError("enough")

    told, work = [], tmp_path / ".mine.partial"
    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run.os, "environ", dict(os.environ))
    for code in ("{}", json.dumps(code_hashes(SMOKE))):
        work.mkdir(exist_ok=True)
        (work / "code.json").write_text(code)
        (work / "checkpoint.pt").write_bytes(code.encode())
        with pytest.raises(HamletError, match="enough"):
            run.make(SMOKE, "/data", {"epochs": 2}, str(tmp_path / "mine"))
    assert (work / "checkpoint.pt").is_file()  # the second's, of the present code
    assert (work / "checkpoint.pt.other-code-1").read_bytes() == b"{}"
    given = vars(SMOKE) | {"data_root": "/data", "output": str(work), "overrides": {"epochs": 2}}
    assert told == [("01_train_evaluate", given)] * 2


def test_a_run_takes_the_first_card_that_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(run.os, "environ", {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"})
    monkeypatch.setattr(run.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(profiles, "cards", lambda: 2)
    with run.leased_card("cpu"):
        assert "CUDA_VISIBLE_DEVICES" not in run.os.environ
    (tmp_path / "hamlet-cards").mkdir()
    with FileLock(tmp_path / "hamlet-cards" / "0.lock"), run.leased_card("auto"):
        assert run.os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_cost_is_of_queries_spread_over_all_of_them_as_the_runs_were_told(tmp_path, monkeypatch, toy_data):
    model = create_model("gem", backbone="test_resnet")
    model.mean, model.std = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)
    expected = torch.from_numpy(toy_data.query.images[[0, 5, 10, 15]]).permute(0, 3, 1, 2)
    expected = evaluation.evaluation_transform(48, model.mean, model.std)(expected)
    assert torch.equal(cost.query_images(toy_data, 4, 48, model), expected)

    def compare(weights, images, device="cpu"):
        seen.update(images=images, device=device, threads=torch.get_num_threads())
        return {name: {} for name in weights}

    seen, asked = {}, profiles.load_profile("quick")["efficiency"]
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    stored.store_run(tmp_path, "gem_resnet18", 0, 0.4)  # told 64 px
    monkeypatch.setattr(cost, "load_data", lambda _, settings: seen.update(size=settings["image_size"]) or toy_data)
    monkeypatch.setattr(cost, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(cost, "provenance", lambda _: {})
    monkeypatch.setattr(cost, "compare", compare)
    torch.set_num_threads(2)
    try:
        told = results.read_verified(cost.measure("quick", "flat"))["parameters"]
    finally:
        torch.set_num_threads(1)
    side = asked["image_size"]
    assert seen.pop("images").shape == (asked["repeats"], 3, side, side)
    assert seen == {"size": 64, "device": "cuda", "threads": 1} and told["device"] == "cuda"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_commit_with_changes_in_what_makes_numbers_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_DIR", raising=False)
    own = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*own, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*own, "commit", "-q", "--allow-empty", "-m", "first"], cwd=tmp_path, check=True)
    for folder, dirty in (("docs", False), ("hamlet", True)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "new.py").touch()
        origin = run.provenance("cpu")
        assert len(origin["commit"]) == 40 and origin["dirty"] is dirty
