"""A model of one's own: what ``hamlet train`` asks of the training, and what the file it writes knows."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hamlet import finetune, models
from hamlet.artifact import profiles
from hamlet.paths import cache_dir

NAMES = ["apple", "kiwi", "lemon", "pear"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Four classes of six small photos."""
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path / "cache"))
    for c, name in enumerate(NAMES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng([c, i]).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def asked(monkeypatch):
    """What training was asked for; it moves the first weights and lasts a moment."""
    calls = []

    def train(model, data, settings, seed, folder):
        initial = next(model.backbone.parameters())
        calls.append((model, data, settings, seed, folder, initial.detach().clone()))
        initial.data += 1.0
        curves = {"epoch": [1, 2], "validation_mAP": [0.1, 0.75], "validation_P@1": [0.5, float("nan")]}
        return SimpleNamespace(curves=pd.DataFrame(curves))

    monkeypatch.setattr(finetune, "train", train)
    return calls


def test_the_settings_are_those_of_the_profile_that_chose_them():
    told = profiles.load_profile("pretrained")["parameters"]
    own = {key: value for key, value in finetune.SETTINGS.items() if key != "device"}
    assert own == {key: told[key] for key in own}
    assert set(told) - set(finetune.SETTINGS) == {"epochs", "limit", "pretrained"}
    assert finetune.SETTINGS["device"] == "auto"


def test_training_starts_from_imagenet_on_photos_of_every_class_and_the_file_is_what_it_ends_with(
    photos, asked, tmp_path
):
    last = finetune.fine_tune(photos, "fruit", "gem_efficientnetlite0", 7, tmp_path / "fruit.safetensors")
    (model, data, settings, _, folder, initial) = asked[0]
    assert settings == finetune.SETTINGS | {"epochs": 7}
    assert folder == cache_dir() / "training" / "fruit"
    assert model.initial_weights["source"] == "packaged" and model.text_tower is not None
    first = next(models.create_model("gem_efficientnetlite0", pretrained="packaged").backbone.parameters())
    assert torch.equal(initial, first)
    assert data.size == 160 and set(data.train.labels) == set(data.validation.labels) == {0, 1, 2, 3}
    assert set(data.train.captions) == {f"a photo of a {name}" for name in NAMES}
    assert (last["epoch"], last["validation_mAP"]) == (2, 0.75)

    kept = models.load_model(tmp_path / "fruit.safetensors")
    assert torch.equal(next(kept.backbone.parameters()), initial + 1.0)
    assert kept.card["metrics"] == {"validation_mAP": 0.75}  # what was not measured is not told
    assert kept.card["classes"] == NAMES and kept.initial_weights == model.initial_weights
    assert kept.card["image_size"] == 160 and kept.card["teacher"] == "sentence"
    assert kept.card["data"] == f"{len(data.train)} photos of 4 classes, {data.content_hash[:12]}"
