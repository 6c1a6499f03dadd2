"""Damaged files, wrong words and kills, over the roads that people walk.

Whatever happens to a file, the answer is right or one line says what is wrong; nothing of a person's is deleted and
nothing is left half-written (campaigns.py: seeds, lengths and the invariants).
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from campaigns import SECONDS, SEED, campaign, photos, restored

from hamlet import paths
from hamlet.artifact import build, profiles, results, run
from hamlet.artifact.profiles import Run
from hamlet.data import load_dataset
from hamlet.models import create_model, load_model, save_model
from hamlet.search import Index
from hamlet.training import seed_everything, train


def test_a_damaged_model_is_refused_or_still_a_model(tmp_path):
    seed_everything(0)
    (tmp_path / "good").mkdir()
    save_model(create_model("gem", backbone="test_resnet"), tmp_path / "good" / "model.safetensors")
    campaign("model", restored(tmp_path / "good", tmp_path / "bad"), load_model)


def test_a_damaged_index_is_refused_or_answers_as_before(tmp_path):
    rows = np.random.default_rng(0).standard_normal((40, 16)).astype("float32")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = Index("flat", dimension=16)
    index.add(rows, [f"{i}.jpg" for i in range(40)])
    index.save(tmp_path / "good")
    before = index.query(rows[:3], 5)

    def road(file: Path) -> None:
        found = Index.load(tmp_path / "bad").query(rows[:3], 5)
        assert found["path"].equals(before["path"])

    campaign("index", restored(tmp_path / "good", tmp_path / "bad"), road)


def test_a_damaged_result_is_never_sound(tmp_path, monkeypatch):
    asked = Run("quick", "scenes", "gem_resnet18", "default", 0)
    source = paths.output_dir("results", "quick", "scenes") / "gem_resnet18" / "seed0"
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    before = results.check_result(asked, folder=source)

    def road(file: Path) -> None:
        listed = {"result.json", *results.read_verified(source / "result.json")["files"]}
        state, why = results.check_result(asked, folder=asked.folder)
        untouched = (source / file.name).read_bytes() == (file.read_bytes() if file.is_file() else None)
        if file.name in listed and not untouched:
            assert state in ("broken", "absent") and "\n" not in why
        else:
            assert (state, why) == before

    campaign("result", restored(source, asked.folder), road)


def test_a_damaged_profile_is_refused_or_a_profile(tmp_path, monkeypatch):
    shutil.copytree(paths.WORKFLOW, tmp_path / "good")
    monkeypatch.setattr(paths, "WORKFLOW", tmp_path / "workflow")

    def road(file: Path) -> None:
        for name in profiles.profile_names():
            profiles.expand(name, "scenes")

    campaign("profile", restored(tmp_path / "good", tmp_path / "workflow", "*.yaml"), road)


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_a_damaged_cache_is_made_again_and_damaged_photos_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    root = photos(tmp_path / "photos")
    before = load_dataset("folder", root, size=32, split_by="image")
    shutil.copytree(tmp_path / "cache", tmp_path / "good")

    def through_the_cache(file: Path) -> None:
        found = load_dataset("folder", root, size=32, split_by="image")
        for name, split in before.splits.items():
            assert np.array_equal(found.splits[name].images, split.images)

    campaign("cache", restored(tmp_path / "good", tmp_path / "cache"), through_the_cache)
    shutil.copytree(root, tmp_path / "whole")

    def through_the_photos(file: Path) -> None:
        found = load_dataset("folder", tmp_path / "damaged", size=32, split_by="image", missing_captions="class")
        used = sum(len(split) for split in found.splits.values())
        assert used + len(found.excluded) >= 23

    campaign("photos", restored(tmp_path / "whole", tmp_path / "damaged"), through_the_photos)


def test_a_damaged_checkpoint_begins_anew_or_goes_on(toy_data, settings, tmp_path):
    def once(folder: Path):
        seed_everything(0)
        model = create_model("gem", backbone="test_resnet")
        train(model, toy_data, settings | {"epochs": 1}, 0, folder)
        return model.state_dict()

    expected = once(tmp_path / "good")

    def road(file: Path) -> None:
        found = once(tmp_path / "bad")
        if file.exists() or file.parent.glob("*.damaged-*"):
            assert found.keys() == expected.keys()
            assert all(torch.isfinite(value.float()).all() for value in found.values())

    campaign("checkpoint", restored(tmp_path / "good", tmp_path / "bad"), road)


AWAY = ["--output", "x"]
WRONG = [
    ["--set", "pretrained=[", *AWAY],
    ["--set", "epochs=1e9", *AWAY],
    ["--set", "nothing=1", *AWAY],
    ["--set", "epochs", *AWAY],
    ["--profile", "no"],
    ["--model", "no_resnet18"],
    ["--dataset", "no"],
    ["--variant", "no"],
    ["--seed", "-1"],
    ["notebook", "no"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_a_wrong_word_at_a_runs_command_line_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run.main(words)
    said = str(ended.value) if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert "Traceback" not in said and "error:" in said and len(said.strip().splitlines()[-1]) < 1500


@pytest.mark.parametrize("content", ["", "runs: [", "[]", "runs: ['../x']", "seeds: none", "parameters: 3"])
def test_a_wrong_profile_at_the_builds_command_line_is_one_line(content, tmp_path, monkeypatch):
    shutil.copytree(paths.WORKFLOW, tmp_path / "workflow")
    monkeypatch.setattr(paths, "WORKFLOW", tmp_path / "workflow")
    good = yaml.safe_load((paths.WORKFLOW / "smoke.yaml").read_text())
    changed = content
    if content.startswith(("runs: ['", "seeds", "parameters")):
        changed = yaml.safe_dump(good | yaml.safe_load(content))
    (paths.WORKFLOW / "smoke.yaml").write_text(changed)
    with pytest.raises(SystemExit) as ended:
        build.main(["smoke", "--dry-run"])
    assert str(ended.value).startswith("error: ") and "smoke.yaml" in str(ended.value)


def test_somebody_elses_folder_is_never_deleted(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    words = ["--profile", "smoke", "--model", "gem_resnet18", "--set", "epochs=1", "--output", str(mine)]
    with pytest.raises(SystemExit, match="other files than a result"):
        run.main(words)
    (mine / "result.json").write_text("{}")
    with pytest.raises(SystemExit, match="may not be used"):
        run.main(words)
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_indexing_killed_at_any_moment_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    root, rng = photos(tmp_path / "photos", classes=4, images=30), random.Random(SEED)
    command = [sys.executable, "-m", "hamlet", "index", str(root), str(tmp_path / "index")]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(max(2, int(5 * SECONDS / 12))):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(2, 14))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "index").is_dir() and any((tmp_path / "index").glob("*.faiss")):
            Index.load(tmp_path / "index")  # a reader is never disturbed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = subprocess.run([*command[:-1], str(tmp_path / "other")], env=environment, capture_output=True, check=True)
    assert again.returncode == 0
    one, two = Index.load(tmp_path / "index"), Index.load(tmp_path / "other")
    assert len(one) == len(two) == 120
    ids = range(120)
    first = dict(zip([str(one.photo(i)) for i in ids], one.vectors(), strict=True))
    second = dict(zip([str(two.photo(i)) for i in ids], two.vectors(), strict=True))
    assert first.keys() == second.keys()
    assert all(np.allclose(first[path], second[path], atol=1e-5) for path in first)
