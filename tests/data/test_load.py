import hashlib
import json
import sys
import types

import numpy as np
import pandas as pd
import pytest

import hamlet.data
from hamlet.data import DataError, Protocol, Split, cache, list_datasets, load_dataset
from hamlet.data.dataset import assemble, content_hash, limited

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
    return assemble("toy", rows, images, "0" * 64, list(classes), ["z"], protocols, **options)


def test_names():
    assert list_datasets() == [
        "scenes",
        "grocery",
        "grocery_unseen",
        "folder",
        "cifar10",
        "flowers102",
        "pets",
    ]
    with pytest.raises(
        DataError, match=r"unknown data set 'grocer'; valid: scenes, grocery, grocery_unseen, folder, cifar10"
    ):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ROWS.iloc[[0, 3, 1, 2, 4]].reset_index(drop=True)}, "not adjacent"),
        ({"classes": ["x"]}, r"label must lie in 0\.\.0"),
        ({"classes": ["x", "x"]}, "share a name"),
        ({"rows": ROWS.assign(caption=["one", " ", "3", "4", "5"])}, "empty caption for b"),
        ({"images": IMAGES.astype(np.int16)}, "images must be uint8"),
        ({"images": IMAGES[:4]}, "unequal length"),
        (
            {"protocols": {"default": Protocol("query", "gallery", "x")}},
            r"needs the split\(s\) \['gallery'\]",
        ),
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


def test_content_hash_by_hand_and_what_it_depends_on():
    rows = ROWS.iloc[[1, 0]]
    lines = ['["a", "d0", 0, 0, "train", "one"]', '["b", "d1", 0, 0, "train", "two"]']
    assert [json.dumps(json.loads(line)) for line in lines] == lines
    assert content_hash(rows, ["d1", "d0"]) == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    base = content_hash(ROWS, list("vwxyz"))
    assert content_hash(ROWS.iloc[::-1], list("zyxwv")) == base  # order of the rows does not matter
    changed = [
        ROWS.assign(**{c: [*ROWS[c][:4], v]}) for c, v in zip(ROWS, ["s", "p", 9, 9, "c"], strict=True)
    ]
    hashes = {
        base,
        content_hash(ROWS, list("vwxyy")),
        *(content_hash(rows, list("vwxyz")) for rows in changed),
    }
    assert len(hashes) == 7


# --- scenes, with a renderer of this test's own


@pytest.fixture
def renderer(monkeypatch, tmp_path):
    """A stand-in for hamlet.data.scenes: 2 classes, 4 splits in mixed order, flat images of value seed."""
    calls = []

    def plan(limit=None):
        names = ("train", "query", "gallery", "validation", "seen_query", "seen_gallery")
        rows = [(s, label, k) for k in range(2) for label in range(2) for s in names if k < (limit or 9)]
        table = pd.DataFrame(rows, columns=["split", "label", "k"])
        table["coarse_label"], table["seed"] = 0, np.arange(len(table)) + 100 * table.k
        table["path"] = [f"{s}/{c}-{k}" for s, c, k in rows]
        table["caption"] = "a thing"
        return table[["split", "path", "label", "coarse_label", "seed", "caption"]]

    def render_all(rows, workers=None, progress=True):
        calls.append(len(rows))
        return np.stack([np.full((16, 16, 3), seed, np.uint8) for seed in rows.seed])

    module = types.ModuleType("hamlet.data.scenes")
    (tmp_path / "scenes.py").write_text("version = 1\n")
    module.__dict__.update(
        SIZE=16, plan=plan, render_all=render_all, class_names=lambda: ["p", "q"], coarse_names=lambda: ["all"],
        __file__=str(tmp_path / "scenes.py"), calls=calls,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "hamlet.data.scenes", module)
    monkeypatch.setattr(hamlet.data, "scenes", module, raising=False)
    return module


def test_scenes_are_rendered_once_and_other_sizes_derived(renderer):
    native = load_dataset("scenes", size=16)
    small = load_dataset("scenes", size=8)
    again = load_dataset("scenes", size=16)
    assert renderer.calls == [24] and again.content_hash == native.content_hash == small.content_hash
    seeds = renderer.plan().set_index("path").seed
    for data, size in ((native, 16), (small, 8)):
        for split in data.splits.values():
            expected = [np.full((size, size, 3), seeds[path], np.uint8) for path in split.paths]
            assert np.array_equal(split.images, np.stack(expected))
    assert native.protocols["default"].gallery == "gallery" and native.gallery is native.splits["gallery"]
    assert native.protocols["seen"].query == "seen_query" and native.protocols["validation"].gallery is None


def test_scenes_limit_and_changed_renderer_have_their_own_cache(renderer):
    full = load_dataset("scenes", size=16)
    small = load_dataset("scenes", size=16, limit=1)
    assert renderer.calls == [24, 12] and small.content_hash != full.content_hash
    with open(renderer.__file__, "a") as out:
        out.write("version = 2\n")
    load_dataset("scenes", size=16)
    assert renderer.calls == [24, 12, 24]


def test_cache_folder_holds_no_pickle(renderer):
    images = load_dataset("scenes", size=16).train.images
    assert isinstance(images, np.memmap)
    for file in (cache.paths.cache_dir() / "images").glob("*.npy"):
        np.load(file, allow_pickle=False)
