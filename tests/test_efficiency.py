"""Efficiency: counts against hand-computed ones, order of the timing, memory that grows with the weights."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hamlet import efficiency, models


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
    assert [[name for name, *_ in turn] for turn in turns] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert all({image for _, image, _ in turn} == {i} for i, turn in enumerate(turns))
    assert all(values.shape == (4,) and (values > 0).all() for values in spent.values())


def test_multiply_adds_of_a_convolution_and_a_linear_layer():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 10 * 12, 5))
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


def test_time_is_told_in_milliseconds(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 4))
    spent = efficiency.latencies({"a": Recorder("a", [])}, torch.zeros(3, 3, 2, 2))
    assert spent["a"].tolist() == [250.0] * 3


@pytest.mark.parametrize("told", [[10.0, 30.0, 20.0], [10.0, None, 20.0]])
def test_every_cost_stands_under_its_own_name(monkeypatch, told):
    class Adaptive(nn.Module):
        descriptor_bytes = 12

        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(1, 1), nn.Linear(2, 2)

        def forward(self, images):
            kept = int(images.max())
            return torch.ones(1, kept) @ torch.ones(kept, 7)

    memory = iter(told)
    monkeypatch.setattr(efficiency, "peak_memory", lambda *_: next(memory))
    monkeypatch.setattr(efficiency, "load_model", lambda *_: Adaptive())
    images = torch.arange(1.0, 6.0)[:, None, None, None].expand(5, 3, 4, 4)
    times = np.array([9.0, 2.0, 3.0, 4.0, 1.0])
    monkeypatch.setattr(
        efficiency, "latencies", lambda models, given: {name: times for name in models if given.equal(images)}
    )
    measured = (20.0, 15.0, 25.0) if all(told) else (None, None, None)
    assert efficiency.compare({"a": Path("a")}, images) == {
        "a": {
            **{"latency_ms": 3.0, "latency_ms_q25": 2.0, "latency_ms_q75": 4.0},
            **dict(zip(("memory_mb", "memory_mb_q25", "memory_mb_q75"), measured, strict=True)),
            **{"parameters": 8, "macs": 3 * 7, "descriptor_bytes": 12},
        }
    }


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
def test_a_model_that_cannot_be_measured_is_named(weights, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        efficiency.peak_memory(broken, torch.rand(1, 3, 64, 64), "cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_memory_on_a_card_holds_the_weights(weights):
    image = torch.rand(1, 3, 64, 64)
    megabytes = 4 * sum(p.numel() for p in models.load_model(weights["gem_resnet18"]).parameters()) / 1e6
    assert megabytes <= efficiency.peak_memory(weights["gem_resnet18"], image, "cuda") < megabytes + 80
