"""Every data test gets its own cache and sees no data root but the one it names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hamlet import paths


@pytest.fixture(autouse=True)
def private_places(tmp_path_factory, monkeypatch, request):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("HAMLET_DATA", raising=False)
    if "grocery" not in request.keywords:
        monkeypatch.setattr(paths, "data_roots", lambda root=None: [Path(root)] if root else [])


@pytest.fixture
def picture():
    """picture(path, seed, size): write a random image of low frequency, so that JPEG keeps it nearly."""

    def write(path: Path, seed: int = 0, size: tuple[int, int] = (24, 18)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).save(path)
        return path

    return write
