"""Efficiency: counts against hand-computed ones, order of the timing, memory that grows with the weights."""

import json

import numpy as np
import pytest
import stored
import torch
from torch import nn

from hamlet import efficiency, models
from hamlet.artifact import results as report
from hamlet.artifact.results import digest


class Recorder(nn.Module):
    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def forward(self, images):
        self.log.append((self.name, int(images[0, 0, 0, 0]), images.shape[0]))
        return images.flatten(1)[:, :4]


def test_models_take_turns_on_every_image_in_rotated_order():
    log = []
    networks = {name: Recorder(name, log) for name in "abc"}
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    spent = efficiency.latencies(networks, images, warmup=2)
    assert log[:6] == [(name, i, 1) for name in "abc" for i in (0, 1)]
    turns = [log[6 + 3 * i : 9 + 3 * i] for i in range(4)]
    assert [[name for name, *_ in turn] for turn in turns] == [
        list("abc"),
        list("bca"),
        list("cab"),
        list("abc"),
    ]
    assert all({image for _, image, _ in turn} == {i} for i, turn in enumerate(turns))
    assert all(values.shape == (4,) and (values > 0).all() for values in spent.values())


def test_multiply_adds_of_a_convolution_and_a_linear_layer():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 10 * 12, 5)
    )
    expected = 8 * 10 * 12 * 3 * 9 + 8 * 10 * 12 * 5
    assert efficiency.multiply_adds(network, torch.rand(2, 3, 10, 12)) == expected


def test_multiply_adds_are_the_mean_over_images():
    class Adaptive(nn.Module):
        def forward(self, images):
            kept = int(images.max())
            return torch.ones(1, kept) @ torch.ones(kept, 7)

    images = torch.tensor([2.0, 6.0])[:, None, None, None].expand(2, 3, 4, 4)
    assert efficiency.multiply_adds(Adaptive(), images) == (2 * 7 + 6 * 7) / 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for name in ("gem_resnet18", "gem_mobilenetv3"):
        models.save_model(models.create_model(name), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ("gem_resnet18", "gem_mobilenetv3")}


@pytest.mark.slow
def test_compare_gives_every_cost(weights):
    rows = efficiency.compare(weights, torch.rand(3, 3, 64, 64))
    for name, row in rows.items():
        model = models.load_model(weights[name])
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["latency_ms_q25"] <= row["latency_ms"] <= row["latency_ms_q75"]
        assert row["descriptor_bytes"] == 4 * 512
        # at 64 px the weights are nearly all there is: never less, and not twice as much and 40 MB more
        megabytes = 4 * row["parameters"] / 1e6
        assert megabytes < row["memory_mb"] < 2 * megabytes + 40
    assert rows["gem_resnet18"]["memory_mb"] > rows["gem_mobilenetv3"]["memory_mb"] + 15
    assert rows["gem_resnet18"]["macs"] > 4 * rows["gem_mobilenetv3"]["macs"]


@pytest.mark.slow
@pytest.mark.skipif(not efficiency.FORKS, reason="measured by forks on Linux alone")
def test_a_forked_process_grows_as_a_fresh_interpreter_does(weights):
    image, files = torch.rand(1, 3, 64, 64), list(weights.values())
    forked = efficiency.peak_memory(files, image, "cpu")
    fresh = [efficiency.peak_memory([file], image, "cpu")[0] for file in files]
    assert forked == pytest.approx(fresh, rel=0.1, abs=4)  # loading alone varies by some MB from call to call


@pytest.mark.slow
def test_a_model_that_cannot_be_measured_is_named(weights, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(RuntimeError, match=r"broken\.safetensors"):
        efficiency.peak_memory([broken], torch.rand(1, 3, 64, 64), "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_memory_on_a_card_holds_the_weights(weights):
    image = torch.rand(1, 3, 64, 64)
    megabytes = 4 * sum(p.numel() for p in models.load_model(weights["gem_resnet18"]).parameters()) / 1e6
    assert megabytes <= efficiency.peak_memory([weights["gem_resnet18"]], image, "cuda")[0] < megabytes + 80


def test_measure_writes_a_sealed_record_of_every_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_OUTPUT", str(tmp_path))
    folders = {run: stored.store_run(tmp_path, run, 0, 0.4) for run in ("gem_resnet18", "mlp_resnet18")}
    with pytest.raises(FileNotFoundError, match=r"gem_resnet18.*safetensors.*build again"):
        efficiency.measure("quick", "flat", "cpu")
    for folder in folders.values():
        (folder / "model.safetensors").touch()
    seen = {}

    def compare(weights, images, device):
        seen.update(weights=weights, shape=tuple(images.shape), threads=torch.get_num_threads())
        return {name: {"latency_ms": 1.0} for name in weights}

    monkeypatch.setattr(efficiency, "compare", compare)
    monkeypatch.setattr(efficiency, "provenance", lambda device: {"device": device})
    monkeypatch.setattr(efficiency, "load_data", lambda name, given: stored.dataset())
    threads = torch.get_num_threads()
    path = efficiency.measure("quick", "flat", "cpu", repeats=5)
    record = json.loads(path.read_text())
    assert record["digest"] == digest(record) and report.load_efficiency("quick", "flat") == record
    assert seen["shape"] == (5, 3, 224, 224) and seen["threads"] == 1 and torch.get_num_threads() == threads
    assert set(seen["weights"]) == set(folders) == set(record["models"])
    for run, folder in folders.items():
        assert record["parameters"]["runs"][run] == json.loads((folder / "result.json").read_text())["digest"]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_query_images_are_the_evaluations_own(monkeypatch):
    from hamlet.evaluation import evaluation_transform

    data = stored.dataset()
    monkeypatch.setattr(efficiency, "load_data", lambda name, given: data)
    images = efficiency.query_images("flat", 3, {}, 32)
    pixels = torch.from_numpy(np.stack([data.query.images[i] for i in (0, 12, 23)])).permute(0, 3, 1, 2)
    assert torch.equal(images, evaluation_transform(32)(pixels))
