"""Thumbnails: what is packed comes back by name, and what cannot be packed or read is refused in one line."""

import numpy as np
import pytest

from hamlet.artifact.pictures import pack, unpack
from hamlet.errors import HamletError


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_each_thumbnail_comes_back_under_its_own_name(count):
    shades = np.linspace(10, 240, count).astype(np.uint8)
    images = np.broadcast_to(shades[:, None, None, None], (count, 16, 16, 3))
    names = [f"class ü/{i}.jpg" for i in range(count)]
    back = unpack(pack(images, names))
    assert list(back) == names
    for name, shade in zip(names, shades, strict=True):
        assert back[name].shape == (16, 16, 3)
        assert abs(back[name].astype(int) - int(shade)).max() <= 4


def test_large_images_become_thumbnails():
    back = unpack(pack(np.full((3, 200, 200, 3), 90, np.uint8), ["a", "b", "c"]))
    assert back["c"].shape == (96, 96, 3) and abs(back["c"].astype(int) - 90).max() <= 4


@pytest.mark.parametrize(
    "images, names, words",
    [
        (np.zeros((1, 4, 4, 3), np.float32), ["a"], "uint8"),
        (np.zeros((1, 4, 5, 3), np.uint8), ["a"], r"\(N,s,s,3\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), ["a", "a"], "different names"),
        (np.zeros((0, 4, 4, 3), np.uint8), [], "different names"),
    ],
)
def test_what_cannot_be_packed_is_refused(images, names, words):
    with pytest.raises(HamletError, match=words):
        pack(images, names)


@pytest.mark.parametrize("sheet", [b"", b"no picture"])
def test_another_file_is_refused(sheet):
    with pytest.raises(HamletError, match="sheet of thumbnails"):
        unpack(sheet)
