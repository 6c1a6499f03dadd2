"""A small real model made of nothing but pixels, photos that differ, and the packaged model for the whole road."""

import numpy as np
import pytest
from PIL import Image


class Colours:
    """Mean colour of the 16 parts of a photo, centred, L2-normalised: float32 (N, 48)."""

    image_size = 32

    def encode(self, images, batch_size=32, progress=True):
        from hamlet.data.decode import decode

        rows = np.stack([decode(image, self.image_size) for image in images]).astype(np.float32) - 127.5
        rows = rows.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4)).reshape(len(images), -1)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def colours() -> Colours:
    return Colours()


def photo(path, seed: int, size: int = 48):
    """Write a photo of large random squares; the same seed gives the same picture at any size."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(squares).resize((size, size), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Twelve photos in two folders."""
    for i in range(12):
        photo(tmp_path / "photos" / ("a" if i < 6 else "b") / f"{i:02d}.png", i)
    return tmp_path / "photos"
