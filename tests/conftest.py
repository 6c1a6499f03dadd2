"""Shared fixtures: one torch thread, and a small synthetic data set with the real interface."""

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def settings() -> dict:
    """Run parameters of the smoke profile, smaller still."""
    from hamlet.artifact.profiles import Run, parameters

    small = {"epochs": 2, "image_size": 64, "train_size": 64, "batch_size": 8, "images_per_class": 2}
    return parameters(Run("smoke", "scenes", "gem_resnet18", "default", 0)) | small | {"device": "cpu"}


@pytest.fixture(scope="session")
def toy_data():
    """Four classes of flat colours with noise: 32 training, 16 validation and 16 query images of 72 px."""
    from hamlet.data import Protocol, RetrievalDataset, Split

    rng = np.random.default_rng(0)
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [190, 190, 60]])
    names = ["red", "green", "blue", "yellow"]

    def split(name: str, n: int) -> Split:
        labels = np.arange(n, dtype=np.int64) % 4
        images = colours[labels][:, None, None] + rng.integers(-50, 50, (n, 72, 72, 3))
        captions = [f"a {names[c]} sheet, number {i}" for i, c in enumerate(labels)]
        paths = [f"{name}/{i:03d}.png" for i in range(n)]
        return Split(name, images.clip(0, 255).astype(np.uint8), labels, labels // 2, captions, paths)

    splits = {"train": split("train", 32), "validation": split("validation", 16), "query": split("query", 16)}
    protocols = {
        "default": Protocol("query", None, "leave-one-out"),
        "validation": Protocol("validation", None, "leave-one-out"),
    }
    return RetrievalDataset("toy", 72, "0" * 64, names, ["warm", "cold"], splits, protocols, [])
