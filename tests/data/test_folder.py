import os
import unicodedata
import warnings

import numpy as np
import pytest

from hamlet.data import DataError, cache, identity_of, load_dataset
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
    # fixed for good: another draw would make other data sets of the folders that results are stored of
    assert (sets[1], sets[2]) == ({"c05", "c07"}, {"c04", "c06", "c00"})
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
        ("file,caption\nc00/0.png,x\nc00/1.png,y\nc00/0.png,z\n", r"line 4: 'c00/0\.png' has a line already, line 2"),
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
        (4, 5, {"split_by": "image"}, r"a class with 6 \(training\) images"),
        (6, 3, {"split_by": "colour"}, "'colour' is none of"),
        (6, 3, {"missing_captions": "no"}, "'no' is none of"),
        (6, 3, {"split": 1}, "unknown option 'split'; valid: split_by, seed, missing_captions"),
        (0, 0, {}, "no image below"),
    ],
)
def test_what_has_no_single_reading_is_refused(tree, classes, images, options, message):
    with pytest.raises(DataError, match=message):
        load(tree(classes, images), **options)


# --- splits that the folder names itself


def split_of(data):
    return {path: name for name, split in data.splits.items() for path in split.paths}


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Training", "val", "testing")])
def test_folders_named_as_splits_are_kept_and_a_class_in_several_is_one(tree, names):
    for name in names:
        root = tree(3, prefix=f"{name}/")
    data = load(root)
    assert data.class_names == ["c00", "c01", "c02"] == data.coarse_names
    told = dict(zip(names, SPLITS, strict=True))
    assert {told[path.split("/")[0]] for path in data.query.paths} == {"query"}
    assert all(told[path.split("/")[0]] == split for path, split in split_of(data).items())
    assert data.query.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(data.train) == 9
    assert data.train.captions[0] == "a photo of a c00"


def test_splits_above_coarse_classes(tree):
    for name in ("train/fruit", "val/fruit", "test/tools"):
        root = tree(2, prefix=f"{name}/")
    data = load(root)
    assert data.class_names == ["fruit/c00", "fruit/c01", "tools/c00", "tools/c01"]
    assert data.coarse_names == ["fruit", "tools"] and set(data.query.labels.tolist()) == {2, 3}


def test_validation_is_held_out_of_train_by_image_where_test_shares_the_classes(tree):
    tree(3, 10, prefix="train/")
    data = load(tree(3, 2, prefix="test/"))
    assert np.bincount(data.validation.labels).tolist() == [2, 2, 2] and len(data.train) == 24
    assert all(path.startswith("train/") for path in data.validation.paths)


def test_validation_is_held_out_by_class_where_test_classes_are_others(tmp_path, picture):
    for c in range(9):
        for i in range(2):
            picture(tmp_path / ("train" if c < 6 else "test") / f"c{c}" / f"{i}.png", 10 * c + i)
    data = load(tmp_path)
    sets = [{*data.splits[name].labels.tolist()} for name in SPLITS]
    assert [len(s) for s in sets] == [4, 2, 3] and len(set.union(*sets)) == 9


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (["train/", "test/", "cars/"], r"train/ of .* names a split but cars/ does not|test/ of .* cars/ does not"),
        (["train/", "val/"], "expected train, test and one validation"),
        (["train/", "val/", "validation/", "test/"], "expected train, test and one validation"),
        (["train/", "test/a/"], "depths that no one layout explains"),
        (["train/a/b/", "test/a/b/"], "depths that no one layout explains"),
    ],
)
def test_unclear_splits_are_refused(tree, layouts, message):
    for prefix in layouts:
        root = tree(3, prefix=prefix)
    with pytest.raises(DataError, match=message):
        load(root)
    with pytest.raises(DataError, match=message):
        load(root, split_by="image")


def test_classes_called_train_and_test_are_refused_but_one_among_others_is_a_class(tmp_path, picture):
    for name in ("train", "test"):
        for i in range(3):
            picture(tmp_path / name / f"{i}.png", i)
    with pytest.raises(DataError, match=r"are test, train of .* classes or splits\?"):
        load(tmp_path)
    for name in "abcde":
        for i in range(2):
            picture(tmp_path / name / f"{i}.png", ord(name) + i)
    assert "train" in load(tmp_path).class_names


def test_split_by_contradicts_named_splits(tree):
    for name in ("train", "val", "test"):
        root = tree(2, prefix=f"{name}/")
    with pytest.raises(DataError, match="says its splits itself"):
        load(root, split_by="class")


# --- labels.csv


def table(root, header, rows):
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def test_a_table_gives_classes_splits_and_captions_to_a_flat_folder(tmp_path, picture):
    splits = ["train", "val", "test"]
    rows = []
    for i in range(12):
        picture(tmp_path / f"{i:02d}.png", i)
        rows.append(f'{i:02d}.png,{"ab"[i % 2]}/x,{splits[i // 4]},"number {i}, seen"')
    picture(tmp_path / "stray.png")
    table(tmp_path, "file,class,split,caption", rows)
    with pytest.warns(UserWarning, match="1 x not in labels"):
        data = load(tmp_path)
    assert data.class_names == ["a_x", "b_x"] and data.excluded == [("stray.png", "not in labels.csv")]
    assert data.query.paths == ["08.png", "10.png", "09.png", "11.png"]
    assert data.query.captions[0] == "number 8, seen" and data.validation.labels.tolist() == [0, 0, 1, 1]
    table(tmp_path, "file,class", [",".join(row.split(",")[:2]) for row in rows])
    with pytest.warns(UserWarning, match="not in labels"):
        assert load(tmp_path, split_by="image").query.captions[0] == "a photo of a a x"


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("file,class,splt", "1.png,b,test", "line 1: column 'splt' is given twice, or none of"),
        ("file,class,class", "1.png,b,c", "line 1: column 'class' is given twice"),
        ("file,kind", "1.png,b", "must name the columns file,class"),
        ("file,class", "9.png,b", r"line 2: '9\.png' is not an image"),
        ("file,class", "1.png,", r"line 2: '1\.png' has no class"),
        ("file,class", "1.png,b,c", "line 2: 3 cells for 2 columns"),
        ("file,class", "1.png", "line 2: 1 cells for 2 columns"),
        ("file,class,split", "1.png,b,tset", "line 2: split 'tset' is none of"),
        ("file,class,split", "1.png,b,", "line 2: split '' is none of"),
        ("file,class,split", "1.png,b,train", "must name train and test"),
        ("file,class", '1.png,"b', "line 2: not a sound CSV file"),
    ],
)
def test_faults_in_the_table_name_the_line(tmp_path, picture, header, row, message):
    picture(tmp_path / "1.png")
    table(tmp_path, header, [row])
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_flat_folder_without_classes_is_sent_to_the_index(tmp_path, picture):
    picture(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"holds images but no classes.*hamlet index "):
        load(tmp_path)


# --- captions.csv, once misread in silence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,caption\nc00/0.png,a red, shiny apple\n", r"line 2: 3 cells for 2 columns; .* in double quotes"),
        (b"file,caption,caption\nc00/0.png,a,b\n", "column 'caption' is given twice"),
        (b"file,caption\nc00/0.png,a\nc00/1.png,b\0c\n", r"line 3: a NUL byte"),
        (b"file,caption\nc00/0.png,a\nc00/1.png,s\xfc\xdf\n", "line 3: not a UTF-8 CSV file"),
        (None, r"captions\.csv: expected a CSV file that can be read \(Is a directory\)"),
    ],
)
def test_misreadable_captions_are_refused_with_the_line(tree, content, message):
    root = tree(6)
    if content is None:
        (root / "captions.csv").mkdir()
    else:
        (root / "captions.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(root)


def test_captions_in_both_tables_are_refused(tree):
    root = tree(2)
    table(root, "file,class,caption", ["c00/0.png,a,b"])
    (root / "captions.csv").write_text("file,caption\nc00/0.png,a\n")
    with pytest.raises(DataError, match=r"in labels\.csv and in captions\.csv"):
        load(root)


# --- names


def test_two_folders_have_two_names_and_changed_content_another(tree, tmp_path, picture):
    root = tree(6)
    first = load(root)
    assert first.name == f"{root.name}-{first.content_hash[:8]}" == identity_of("folder", root)[0]
    picture(root / "c00" / "0.png", 4711)
    changed = load(root)
    assert changed.name != first.name and identity_of("folder", root) == (changed.name, changed.content_hash)
    assert load(root, name="my-fruit.2").name == "my-fruit.2"
    with pytest.raises(DataError, match=r"name '\.\./x'; expected letters"):
        load(root, name="../x")


def test_identity_counts_a_broken_image_as_loading_does(tree):
    root = tree(7)
    (root / "c00" / "0.png").write_bytes(b"broken")
    identity = identity_of("folder", root)
    with pytest.warns(UserWarning, match="broken image"):
        data = load(root)
    assert identity == (data.name, data.content_hash)


def test_names_that_are_not_utf8_are_listed(tree):
    root = tree(6)
    os.close(os.open(os.fsencode(root / "c00") + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    with pytest.warns(UserWarning, match="name is not UTF-8"):
        data = load(root)
    assert len(data.excluded) == 1 and "udcff" in data.excluded[0][0]
