import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from hamlet import paths
from hamlet.artifact import cost, profiles, results, run
from hamlet.artifact.profiles import Run
from hamlet.distillation import LSA_DIM
from hamlet.errors import HamletError

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
