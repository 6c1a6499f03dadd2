"""Shared fixtures: one torch thread, and a small synthetic data set with the real interface."""

import shutil

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def settings() -> dict:
    """Training settings of seconds, every key that hamlet.training reads."""
    return {
        "epochs": 2,
        "image_size": 64,
        "train_size": 64,
        "batch_size": 8,
        "images_per_class": 2,
        "crop_scale": 0.7,
        "limit": None,
        "pretrained": False,
        "frozen_levels": 0,
        "backbone_share": 1.0,
        "learning_rate": 1e-3,
        "backbone_learning_rate": 1e-3,
        "proxy_learning_rate": 1e-2,
        "weight_decay": 1e-4,
        "warmup": 0.1,
        "loss": "cosface",
        "margin": 0.2,
        "scale": 16.0,
        "text_source": "class_mean",
        "text_teacher": "sentence",
        "text_alignment": 0.0,
        "text_proxies": 0.0,
        "text_guidance": 0.0,
        "precision": "float32",
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium as wide as a phone; skips where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="the browser tests need selenium")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("the browser tests need chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = paths[0]
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", "window-size=360,740"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(paths[1]))
    yield driver
    driver.quit()


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
