import os
import unicodedata
import warnings

import numpy as np
import pytest

from hamlet.data import DataError, cache, load_dataset
from hamlet.data.decode import decode

SPLITS = ("train", "validation", "query")


@pytest.fixture
def tree(tmp_path, picture):
    """tree(classes, images): <tmp>/c00/0.png ..."""

    def make(classes=8, images=3, prefix=""):
        for c in range(classes):
            for i in range(images):
                picture(tmp_path / f"{prefix}c{c:02d}" / f"{i}.png", 100 * c + i)
        return tmp_path

    return make


def load(root, **options):
    return load_dataset("folder", root=root, size=8, **options)


def reasons(dataset):
    return dict(dataset.excluded)


def test_split_by_class_is_disjoint_complete_and_repeatable(tree):
    root = tree(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out, so nothing is said
        data = load(root)
    sets = [{data.class_names[i] for i in data.splits[s].labels} for s in SPLITS]
    assert [len(s) for s in sets] == [5, 2, 3] and len(set.union(*sets)) == 10
    assert sum(len(s) for s in data.splits.values()) == 30
    assert load(root).content_hash == data.content_hash
    assert load(root).train.paths == data.train.paths
    assert any(load(root, seed=s).train.paths != data.train.paths for s in range(1, 4))
    assert data.gallery is None and data.query is data.splits["query"]
    assert data.coarse_names == data.class_names


def test_every_image_carries_its_own_label_caption_and_pixels(tree):
    root = tree()
    data = load(root)
    for split in data.splits.values():
        for i, path in enumerate(split.paths):
            name = path.split("/")[0]
            assert data.class_names[split.labels[i]] == name and split.captions[i] == f"a photo of a {name}"
            assert np.array_equal(split.images[i], decode(root / path, 8))


def test_split_by_image_keeps_classes_in_every_split(tree):
    data = load(tree(3, 10), split_by="image")
    for name, expected in zip(SPLITS, (5, 2, 3), strict=True):
        assert np.bincount(data.splits[name].labels).tolist() == [expected] * 3
    assert not set(data.train.paths) & set(data.query.paths)


def test_limit_is_a_prefix_per_class_and_split(tree):
    root = tree(8, 5)
    full, small = load(root), load(root, limit=2)
    for name in SPLITS:
        whole, part = full.splits[name], small.splits[name]
        expected = [p for p in whole.paths if int(p[-5]) < 2]
        assert part.paths == expected
        keep = [whole.paths.index(p) for p in expected]
        assert np.array_equal(part.images, whole.images[keep])
    assert small.content_hash != full.content_hash


def test_content_hash_follows_bytes_names_and_captions_not_size(tree, picture):
    root = tree()
    before = load(root).content_hash
    assert load_dataset("folder", root=root, size=16).content_hash == before
    picture(root / "c00" / "0.png", 999)
    changed = load(root).content_hash
    assert changed != before
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    (root / "captions.csv").write_text("file,caption\n" + "".join(f"{f},words\n" for f in files))
    assert load(root).content_hash not in (before, changed)


def test_nested_layout_gives_coarse_classes(tree):
    tree(4, prefix="fruit/")
    data = load(tree(4, prefix="tools/"))
    assert data.coarse_names == ["fruit", "tools"] and "tools/c03" in data.class_names
    for split in data.splits.values():
        for path, label, coarse in zip(split.paths, split.labels, split.coarse_labels, strict=True):
            assert data.class_names[label] == path.rsplit("/", 1)[0]
            assert data.coarse_names[coarse] == path.split("/")[0]


def test_mixed_depths_are_refused(tree):
    tree(6)
    with pytest.raises(DataError, match="depths that no one layout explains"):
        load(tree(2, prefix="deeper/"))


def test_everything_left_out_is_listed_with_its_reason_and_one_warning(tree, picture):
    root = tree(8)
    (root / "c00" / "bad.jpg").write_bytes(b"not a jpeg")
    (root / "hollow").mkdir()
    picture(root / "alone" / "1.png", 5)
    picture(root / "stray.png", 6)
    (root / "c01" / "notes.txt").write_text("words")
    (root / "c02" / "dangling.png").symlink_to("nowhere.png")
    for litter in (".DS_Store", "c03/Thumbs.db", "c03/._0.png"):
        (root / litter).write_bytes(b"litter")
    with pytest.warns(UserWarning, match=r"6 left out") as caught:
        data = load(root)
    assert len([w for w in caught if "left out" in str(w.message)]) == 1
    found = reasons(data)
    assert found["hollow"] == "empty folder" and found["alone/1.png"] == "class with one image"
    assert found["c00/bad.jpg"].startswith("broken image: not an image of a known format")
    assert found["stray.png"] == "image outside any class folder"
    assert found["c01/notes.txt"].startswith("not an image")
    assert any("dangling" in path and why == "link to nothing" for path, why in found.items())
    assert len(found) == 6 and data.class_names == [f"c{i:02d}" for i in range(8)]
    assert sum(len(s) for s in data.splits.values()) == 24


def test_a_broken_image_is_tried_again_and_used_once_repaired(tree, picture, monkeypatch):
    monkeypatch.setattr(cache, "RACY_NS", -(10**12))
    root = tree(6)
    whole = (root / "c00" / "0.png").read_bytes()
    (root / "c00" / "0.png").write_bytes(whole[:60])
    with pytest.warns(UserWarning, match="1 left out"):
        first = load(root)
    with pytest.warns(UserWarning, match="1 left out"):
        assert load(root).content_hash == first.content_hash  # the remembered suspect is still broken
    (root / "c00" / "0.png").write_bytes(whole)
    data = load(root)
    assert not data.excluded and sum(len(s) for s in data.splits.values()) == 18


def test_class_left_with_one_image_by_a_broken_one(tree):
    root = tree(7, 2)
    (root / "c04" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning):
        data = load(root)
    assert reasons(data)["c04/0.png"] == "class with one image" and "c04" not in data.class_names


def test_links_loops_and_second_names(tree, tmp_path_factory, picture):
    root = tree(6)
    (root / "c00" / "loop").symlink_to(root)
    (root / "a_second_name").symlink_to(root / "c05")
    outside = tmp_path_factory.mktemp("outside")
    for i in range(2):
        picture(outside / f"{i}.png", 50 + i)
    (root / "linked").symlink_to(outside)
    with pytest.warns(UserWarning, match="2 left out"):
        data = load(root)
    assert set(reasons(data)) == {"c00/loop", "a_second_name"}
    assert "linked" in data.class_names and "c05" in data.class_names


def test_captions_are_read_by_unicode_name_and_uppercase_extension(tree, picture):
    root = tree(6)
    decomposed = unicodedata.normalize("NFD", "Äpfel")
    for i in range(2):
        picture(root / decomposed / f"{i}.PNG", 70 + i)
    table = "".join(f'c{c:02d}/{i}.png,"thing {c}, view {i}"\n' for c in range(6) for i in range(3))
    composed = unicodedata.normalize("NFC", "Äpfel")
    table += f"{composed}/0.PNG,a green apple\n{composed}/1.PNG,りんご\n"
    (root / "captions.csv").write_text("\ufefffile,caption\n" + table, encoding="utf-8")
    data = load(root)
    captions = {p: c for s in data.splits.values() for p, c in zip(s.paths, s.captions, strict=True)}
    assert captions[f"{decomposed}/1.PNG"] == "りんご" and captions["c02/1.png"] == "thing 2, view 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption\nc00/0.png,x\nc00/9.png,y\n", r"line 3: 'c00/9\.png' is not an image"),
        (
            "file,caption\nc00/0.png,x\nc00/1.png,y\nc00/0.png,z\n",
            r"line 4: 'c00/0\.png' has a caption.*line 2",
        ),
        ("name,words\n", "must name the columns file,caption"),
        ("", "must name the columns file,caption"),
        ("file,caption\nc00/0.png,x\n", r"no caption for 17 image\(s\), first c00/1\.png"),
        ("file,caption\nc00/0.png, \n", r"no caption for 18 image\(s\)"),
    ],
)
def test_bad_captions_are_errors(tree, text, message):
    root = tree(6)
    (root / "captions.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load(root)


def test_captions_in_another_encoding_are_an_error(tree):
    root = tree(6)
    (root / "captions.csv").write_bytes("file,caption\nc00/0.png,süß\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a UTF-8 CSV"):
        load(root)


def test_missing_captions_by_choice(tree):
    root = tree(6)
    rows = "".join(f"c{c:02d}/{i}.png,words\n" for c in range(6) for i in range(3) if (c, i) != (2, 1))
    (root / "captions.csv").write_text("file,caption\n" + rows)
    data = load(root, missing_captions="class")
    captions = {p: c for s in data.splits.values() for p, c in zip(s.paths, s.captions, strict=True)}
    assert captions["c02/1.png"] == "a photo of a c02" and len(captions) == 18
    with pytest.warns(UserWarning, match="1 x no caption"):
        data = load(root, missing_captions="exclude")
    assert data.excluded == [("c02/1.png", "no caption")]


@pytest.mark.parametrize(
    ("classes", "images", "options", "message"),
    [
        (5, 3, {}, r"5 usable classes are too few.*split_by='image'"),
        (1, 9, {"split_by": "image"}, "at least two classes"),
        (4, 5, {"split_by": "image"}, "a class with 6 images"),
        (6, 3, {"split_by": "colour"}, "'colour' is none of"),
        (6, 3, {"missing_captions": "no"}, "'no' is none of"),
        (6, 3, {"split": 1}, "unknown option 'split'; valid: split_by, seed, missing_captions"),
        (0, 0, {}, "no image below"),
    ],
)
def test_what_has_no_single_reading_is_refused(tree, classes, images, options, message):
    with pytest.raises(DataError, match=message):
        load(tree(classes, images), **options)


def test_names_that_are_not_utf8_are_listed(tree):
    root = tree(6)
    os.close(os.open(os.fsencode(root / "c00") + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    with pytest.warns(UserWarning, match="name is not UTF-8"):
        data = load(root)
    assert len(data.excluded) == 1 and "udcff" in data.excluded[0][0]
