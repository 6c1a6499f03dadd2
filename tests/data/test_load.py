import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import hamlet.data
from hamlet import paths
from hamlet.data import DataError, Protocol, Split, identity_of, list_datasets, load_dataset, scenes
from hamlet.data.dataset import Listing, assemble, content_hash, limited
from hamlet.data.decode import fit

ROWS = pd.DataFrame(
    {
        "split": ["train", "train", "train", "query", "query"],
        "path": ["a", "b", "c", "d", "e"],
        "label": [0, 0, 1, 1, 0],
        "coarse_label": [0, 0, 0, 0, 0],
        "caption": ["one", "two", "three", "four", "five"],
    }
)
IMAGES = np.arange(5, dtype=np.uint8).repeat(2 * 2 * 3).reshape(5, 2, 2, 3)
PROTOCOLS = {"default": Protocol("query", None, "x")}


def made(rows=ROWS, images=IMAGES, classes=("x", "y"), protocols=PROTOCOLS, **options):
    return assemble("toy", Listing("toy", rows, classes, ["z"], protocols, **options), images, "0" * 64)


NAMES = [
    "cifar10", "coco_captions", "cub200", "flickr30k", "flickr8k", "flowers102", "folder", "grocery",
    "grocery_unseen", "pets", "scenes",
]  # fmt: skip


def test_names():
    assert list_datasets() == NAMES
    with pytest.raises(DataError, match=r"unknown data set 'grocer'; valid: cifar10, .*, grocery, grocery_unseen"):
        load_dataset("grocer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size must be a whole number in 8..1024, got 4"),
        ({"size": 96.0}, "size must be a whole number"),
        ({"size": None}, "size must be a whole number"),
        ({"limit": 0}, "limit must be a whole number"),
        ({"limit": True}, "limit must be a whole number"),
        ({"verfy": False}, "unknown option 'verfy'; valid: verify, download, source"),
        ({"root": "/no/such/folder"}, "root '/no/such/folder' is not a folder"),
    ],
)
def test_arguments_are_checked_at_the_door(options, message):
    with pytest.raises(DataError, match=message):
        load_dataset("grocery", **options)


def test_assemble_cuts_rows_and_images_alike():
    data = made()
    assert data.train.paths == ["a", "b", "c"] and data.query.captions == ["four", "five"]
    assert data.query.images[:, 0, 0, 0].tolist() == [3, 4] and data.query.labels.dtype == np.int64
    assert np.shares_memory(data.train.images, IMAGES) and len(data.query) == 2 and data.size == 2
    assert data.gallery is None and list(data.splits) == ["train", "query"]
    turned = made(protocols={"default": Protocol("train", "query", "x")})  # whatever the splits are called
    assert turned.query is turned.splits["train"] and turned.gallery is turned.splits["query"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ROWS.iloc[[0, 3, 1, 2, 4]].reset_index(drop=True)}, "not adjacent"),
        ({"classes": ["x"]}, r"label must lie in 0\.\.0"),
        ({"classes": ["x", "x"]}, "share a name"),
        ({"rows": ROWS.assign(caption=["one", " ", "3", "4", "5"])}, "empty caption for b"),
        ({"images": IMAGES.astype(np.int16)}, "images must be uint8"),
        ({"images": IMAGES[:4]}, "unequal length"),
        ({"protocols": {"default": Protocol("query", "gallery", "x")}}, r"needs the split\(s\) \['gallery'\]"),
    ],
)
def test_assemble_refuses(change, message):
    with pytest.raises(DataError, match=message):
        made(**change)


def test_exclusions_are_counted_in_one_warning():
    excluded = [("p", "broken image: E1"), ("q", "broken image: E2"), ("r", "empty class")]
    with pytest.warns(UserWarning, match=r"toy: 3 left out \(2 x broken image; 1 x empty class\)") as caught:
        assert made(excluded=excluded).excluded == excluded
    assert len(caught) == 1


def test_split_checks_lengths():
    labels = np.zeros(2, np.int64)
    with pytest.raises(DataError, match="unequal length"):
        Split("s", IMAGES[:2], labels, labels, ["a"], ["p", "q"])
    with pytest.raises(DataError, match="int64"):
        Split("s", IMAGES[:2], labels.astype(np.int32), labels, ["a", "b"], ["p", "q"])


def test_limited_is_a_prefix():
    assert limited(ROWS, 1).path.tolist() == ["a", "c", "d", "e"] and limited(ROWS, None).equals(ROWS)


def hashed(rows, digests):
    return content_hash(rows.assign(digest=list(digests)))


def test_content_hash_by_hand_and_what_it_depends_on():
    rows = ROWS.iloc[[1, 0]]
    lines = ['["a", "d0", 0, 0, "train", "one"]', '["b", "d1", 0, 0, "train", "two"]']
    assert [json.dumps(json.loads(line)) for line in lines] == lines
    assert hashed(rows, ["d1", "d0"]) == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    base = hashed(ROWS, "vwxyz")
    assert hashed(ROWS.iloc[::-1], "zyxwv") == base  # order of the rows does not matter
    assert hashed(ROWS.assign(captions=[[c] for c in ROWS.caption]), "vwxyz") == base
    changed = [
        *(ROWS.assign(**{c: [*ROWS[c][:4], v]}) for c, v in zip(ROWS, ["s", "p", 9, 9, "c"], strict=True)),
        ROWS.assign(captions=[[c, "a second sentence"] for c in ROWS.caption]),
    ]
    assert len({base, hashed(ROWS, "vwxyy"), *(hashed(rows, "vwxyz") for rows in changed)}) == 8


def test_a_split_carries_all_sentences():
    assert made().train.all_captions == [["one"], ["two"], ["three"]]
    sentences = [[caption, caption.upper()] for caption in ROWS.caption]
    data = made(rows=ROWS.assign(captions=sentences))
    assert data.query.all_captions == sentences[3:] and data.query.captions == ["four", "five"]
    assert data.has_classes and not made(rows=ROWS.assign(label=range(5)), classes=list("abcde")).has_classes


# --- data sets of other packages

PLUGIN = """
import numpy as np
import pandas as pd
from hamlet.data import Listing, Protocol, register

@register("dots")
def load(root, limit, *, brightness=7):
    rows = pd.DataFrame({"split": ["train", "train", "query", "query"], "path": list("abcd"), "label": 0})
    rows = rows.assign(coarse_label=0, caption="a dot", digest=[f"{p} {brightness}" for p in rows.path])
    pixels = lambda rows, size: (np.full((size, size, 3), brightness, np.uint8) for _ in rows.path)
    return Listing("dots", rows, ["dot"], ["dot"], {"default": Protocol("query", None, "")}, pixels=pixels)
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Two installed packages: one with a data set, one that cannot be imported."""
    for name, text in (("dotty", PLUGIN), ("broken", "raise ImportError('no such thing')")):
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "entry_points.txt").write_text(f"[hamlet.datasets]\n{name}={name}\n")
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for table in (hamlet.data.LOADERS, sys.modules):
        for name in ("dots", "dotty"):
            table.pop(name, None)


def test_a_data_set_from_another_package_is_found_by_itself(plugins):
    with pytest.warns(UserWarning, match=r"data set broken .*no such thing"):
        assert list_datasets() == sorted([*NAMES, "dots"])
        data = load_dataset("dots", size=8, brightness=9)
    assert (data.query.images == 9).all() and len(data.train) == 2
    with pytest.warns(UserWarning, match="broken"), pytest.raises(DataError, match="valid: brightness"):
        load_dataset("dots", colour=3)


def test_a_name_cannot_be_taken_twice():
    def load(root, limit):
        raise NotImplementedError

    with pytest.raises(DataError, match=r"'scenes' is registered already, by hamlet\.data\.scenes"):
        hamlet.data.register("scenes")(load)


# --- scenes


def test_scenes_are_rendered_once_and_other_sizes_derived(monkeypatch):
    native = load_dataset("scenes", size=128, limit=1, workers=1)
    monkeypatch.setattr(scenes, "render", None)  # whoever renders again fails
    small, again = (load_dataset("scenes", size=size, limit=1) for size in (8, 128))
    assert again.content_hash == native.content_hash == small.content_hash
    assert identity_of("scenes", limit=1) == ("scenes", native.content_hash)
    expected = [fit(Image.fromarray(image), 8) for image in native.query.images]
    assert np.array_equal(small.query.images, np.stack(expected))
    assert native.protocols["default"].gallery == "gallery" and native.gallery is native.splits["gallery"]
    assert native.protocols["seen"].query == "seen_query" and native.protocols["validation"].gallery is None
    assert isinstance(native.train.images, np.memmap)


def test_scenes_in_full_are_known_without_rendering(monkeypatch):
    """The hash that the stored results name."""
    monkeypatch.setattr(scenes, "render", None)
    expected = "9147cde5e48077470dfd85218dec4ae11e17f0412675817f173bed45cd2c8708"
    assert identity_of("scenes") == ("scenes", expected)


def test_scenes_rendered_differently_are_refused(monkeypatch):
    monkeypatch.setattr(scenes, "render", lambda seed, label: np.zeros((128, 128, 3), np.uint8))
    with pytest.raises(DataError, match="are not the published"):
        load_dataset("scenes", workers=1)


def test_importing_and_listing_render_and_load_nothing_heavy():
    code = (
        "import sys, hamlet.data; assert 'hamlet.data.scenes' not in sys.modules; hamlet.data.list_datasets(); "
        "assert 'torch' not in sys.modules and 'pooch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(paths.ROOT)})
