"""What a build says before it begins, on real folders."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import stored
from PIL import Image

from hamlet.artifact import build, profiles
from hamlet.artifact.run import source_of


@pytest.fixture
def photos(tmp_path):
    """Make a folder of ``classes`` classes with ``each`` small photos."""

    def make(classes: int, each: int):
        root, rng = tmp_path / f"photos{classes}x{each}", np.random.default_rng(0)
        for c in range(classes):
            (root / f"class{c}").mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"class{c}" / f"{i}.png")
        return root

    return make


def test_the_time_told_beforehand_goes_with_the_number_of_photos(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HAMLET_DATA", "")  # the command sets it; put back afterwards
    told = []
    for each in (8, 80):
        command = ["pretrained", "--dataset", "folder", "--data-root", str(photos(12, each)), "--dry-run"]
        assert build.main([*command, "--seeds", "1", "--jobs", "1"]) == 0
        told.append(int(re.search(r"about (\d+) min \(estimated", capsys.readouterr().out)[1]))
    assert told[0] < 8 < told[1] < 25


@pytest.mark.parametrize(("cards", "source"), [(0, "estimated"), (1, "recorded")])
def test_the_time_of_a_card_is_no_estimate_for_a_processor(monkeypatch, capsys, cards, source):
    """Of the ablation on scenes the runs that were made on a card."""

    def verify(self, data_hash, whole=build.Build.verify):
        whole(self, data_hash)
        records = {run: json.loads((run.folder / "result.json").read_text()) for run in self.kept}
        self.kept = [run for run, record in records.items() if record["provenance"]["driver"]]
        assert len(self.kept) > 30

    monkeypatch.setattr(build.Build, "verify", verify)
    monkeypatch.setattr(profiles, "cards", lambda: cards)
    monkeypatch.setattr(build.Build, "data_hash", lambda self: None)
    assert build.main(["ablation", "--dataset", "scenes", "--seeds", "4", "--jobs", "1", "--dry-run"]) == 0
    assert f"min ({source} times)" in capsys.readouterr().out


def test_a_measurement_is_not_given_up_for_one_without_hamlet(tmp_path, monkeypatch):
    """In a clone, where the weights of what is stored are missing, a new row stays without a cost."""
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    runs = ["hamlet_resnet18", "gem_resnet18"]
    folders = {run: stored.store_run(tmp_path, run, 0, 0.5) for run in [*runs, "mlp_resnet18"]}
    path = stored.store_efficiency(tmp_path, runs)
    content = json.loads(path.read_text())
    digests = {run: json.loads((folders[run] / "result.json").read_text())["digest"] for run in folders}
    content["parameters"] |= {"images": 30, "runs": {run: digests[run] for run in runs}}

    def fault(*names: str) -> str | None:
        stored.seal(content, path)
        return build.efficiency_fault("quick", "flat", {*names})

    assert fault(*runs) is None
    assert fault(*folders) is None  # HAMLET's weights are not there
    (folders["hamlet_resnet18"] / "model.safetensors").touch()
    assert fault(*folders) == "it lacks mlp_resnet18"
    content["models"]["mlp_resnet18"] = content["models"]["gem_resnet18"]
    content["parameters"]["runs"] |= {"mlp_resnet18": digests["mlp_resnet18"], "gem_resnet18": "another"}
    assert fault(*folders) is None  # trained again, and not all weights are there to measure all anew
    for folder in folders.values():
        (folder / "model.safetensors").touch()
    assert fault(*folders) == "trained again since: gem_resnet18"
    for broken in ("{}", "[]", "{"):
        (folders["mlp_resnet18"] / "result.json").write_text(broken)
        assert fault(*folders) == "trained again since: gem_resnet18, mlp_resnet18"


def test_a_folders_slot_remembers_how_its_photos_are_split(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HAMLET_DATA", str(photos(8, 8)))
    slots = []
    for words, expected in (([], "class"), (["--split-by", "image"], "image")):
        slots.append(build.folder_slot(build.parse(["pretrained", "--dataset", "folder", "--name", "my own", *words])))
        source = json.loads(source_of(slots[-1]).read_text())
        assert source["options"] == {"split_by": expected, "missing_captions": "class"}
        assert source["root"].endswith("photos8x8")
    assert slots[0] != slots[1] and all(re.fullmatch(r"folder-my_own-[0-9a-f]{8}", slot) for slot in slots)


def test_models_and_seeds_reach_the_engine_and_a_full_disk_is_told_before(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    monkeypatch.setattr(build, "load_data", lambda *_: SimpleNamespace(train=range(9), content_hash="abc"))
    monkeypatch.setattr(build, "snakemake", lambda slots, jobs, *_, **config: told.append((slots, jobs, config)) or 1)
    monkeypatch.setattr(build.signal, "signal", lambda *_: None)
    command = ["smoke", "--models", "gem_resnet18,mlp_resnet18", "--seeds", "2", "--jobs", "3"]
    assert build.main(command) == 1
    assert told == [(["smoke/scenes"], 3, {"models": "gem_resnet18+mlp_resnet18", "seeds": 2})]
    assert "2 configurations x 2 seeds, 4 runs" in capsys.readouterr().out
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(SystemExit, match=r"not enough disk: .* 0\.0 GB free"):
        build.main([*command, "--dry-run"])


def test_all_is_made_by_every_core_unless_told_otherwise(tmp_path, monkeypatch):
    told, remade = [], []
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    monkeypatch.setattr(build, "cores", lambda: 7)
    monkeypatch.setattr(build.runpy, "run_path", lambda _: {"remake": remade.append})
    monkeypatch.setattr(build, "snakemake", lambda slots, jobs, *_, **config: told.append((slots, jobs, config)) or 0)
    assert build.main(["all"]) == build.main(["all", "--jobs", "2"]) == 0
    assert told == [([], jobs, {"stored": 1, "once": 1}) for jobs in (7, 2)]
    assert remade == [tmp_path] * 6
