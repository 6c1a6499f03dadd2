"""What a build says before it begins, on real folders."""

import re

import numpy as np
import pytest
from PIL import Image

from hamlet.artifact import build


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
