"""The published layouts of CUB, Flickr and COCO with captions, in miniature copies that each test writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from hamlet.data import DataError, load_dataset
from hamlet.data.decode import decode


def load(name, root, **options):
    return load_dataset(name, root=root, size=8, **{"verify": False, **options})


@pytest.fixture
def birds(tmp_path, picture):
    """Twelve classes of three images, two sentences each."""
    folder = tmp_path / "cub200" / "CUB_200_2011"
    lists = {"images": [], "image_class_labels": [], "classes": []}
    for c in range(1, 13):
        name = f"{c:03d}.Black_Bird_{c}"
        lists["classes"].append(f"{c} {name}")
        for i in range(3):
            number = len(lists["images"]) + 1
            lists["images"].append(f"{number} {name}/Bird_{i}.jpg")
            lists["image_class_labels"].append(f"{number} {c}")
            picture(folder / "images" / name / f"Bird_{i}.jpg", number)
            text = tmp_path / "cub200" / "cvpr2016_cub" / "text_c10" / name / f"Bird_{i}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"a bird of kind {c}, view {i} .\n\nanother  sentence\n")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_cub200(birds):
    data = load("cub200", birds)
    classes = {name: sorted({*split.labels.tolist()}) for name, split in data.splits.items()}
    assert classes == {"train": [0, 1, 2, 3, 5], "validation": [4], "query": [6, 7, 8, 9, 10, 11]}
    assert data.class_names[0] == "Black_Bird_1" and data.has_classes and data.gallery is None
    assert data.query.captions[0] == "a bird of kind 7, view 0 ."
    assert data.query.all_captions[4] == ["a bird of kind 8, view 1 .", "another sentence"]
    path = birds / "cub200/CUB_200_2011/images" / data.query.paths[0]
    assert np.array_equal(data.query.images[0], decode(path, 8))
    with pytest.raises(DataError, match=r"12 classes \(published: 200\), 36 images \(published: 11788\)"):
        load("cub200", birds, verify=True)


def test_cub200_sentences_count_and_their_absence_is_said(birds):
    before = load("cub200", birds).content_hash
    texts = birds / "cub200/cvpr2016_cub/text_c10"
    file = texts / "001.Black_Bird_1" / "Bird_0.txt"
    file.write_text(file.read_text() + "a third\n")
    assert load("cub200", birds).content_hash != before
    file.write_text("\n")
    with pytest.raises(DataError, match=r"Bird_0\.txt holds no caption"):
        load("cub200", birds)
    file.unlink()
    with pytest.raises(DataError, match=r"captions of 001\.Black_Bird_1/Bird_0\.jpg cannot be read"):
        load("cub200", birds)
    texts.rename(texts.with_name("elsewhere"))
    with pytest.warns(UserWarning, match="captions not found"):
        assert load("cub200", birds).train.captions[0] == "a photo of a Black Bird 1"


@pytest.fixture
def flickr(tmp_path, picture):
    """flickr(columns, name): twelve photos with two sentences each, commas among them, quoted and bare."""

    def make(columns="image,caption", name="flickr8k"):
        lines = [columns]
        for i in range(12):
            picture(tmp_path / name / "Images" / f"{i}.jpg", i)
            middle = [f" {k}," if "number" in columns else "" for k in range(2)]
            lines.append(f"{i}.jpg,{middle[0]}A dog , number {i} , runs .")
            lines.append(f'{i}.jpg,{middle[1]}"A ""big"" dog, seen again"')
        (tmp_path / name / "captions.txt").write_text("\n".join(lines) + "\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("name", "columns"), [("flickr8k", "image,caption"), ("flickr30k", "image,comment_number,comment")]
)
def test_flickr(flickr, name, columns):
    root = flickr(columns, name)
    data = load(name, root)
    assert [len(data.splits[s]) for s in ("train", "validation", "query")] == [10, 1, 1]
    assert not data.has_classes and len(data.class_names) == 12
    for split in data.splits.values():
        for path, label, sentences in zip(split.paths, split.labels, split.all_captions, strict=True):
            assert data.class_names[label] == path
            assert sentences == [f"A dog , number {Path(path).stem} , runs .", 'A "big" dog, seen again']
    assert len(load(name, root, limit=3).train) == 3
    with pytest.raises(DataError, match=r"12 images \(published: .*24 captions"):
        load(name, root, verify=True)


def test_training_on_a_set_without_classes_is_refused_by_name(flickr, tmp_path):
    from hamlet.training import train

    with pytest.raises(DataError.__base__, match="flickr8k: every image is its own class"):
        train(None, load("flickr8k", flickr()), {}, 0, tmp_path)


def test_flickr_follows_the_published_split(flickr):
    root = flickr()
    called = ["train", "restval", "val", "test"]
    images = [{"filename": f"{i}.jpg", "split": called[i % 4]} for i in range(12)]
    table = root / "flickr8k" / "dataset_flickr8k.json"
    table.write_text(json.dumps({"images": images}))
    data = load("flickr8k", root)
    assert data.query.paths == ["11.jpg", "3.jpg", "7.jpg"] and len(data.train) == 6
    table.write_text(json.dumps({"images": [{"filename": "x.jpg", "split": "test"}]}))
    with pytest.raises(DataError, match=r"'x\.jpg' has no caption"):
        load("flickr8k", root)
    table.write_text("{")
    with pytest.raises(DataError, match=r"dataset_flickr8k\.json: not a JSON file"):
        load("flickr8k", root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["picture,words"], "line 1: expected image,caption"),
        (["image,caption", "1.jpg"], r"line 2: expected image,caption, got '1\.jpg'"),
        (["image,caption", "1.jpg, "], "line 2: expected"),
        (["image,caption", "99.jpg,x"], r"captioned image\(s\) are not below .*99\.jpg"),
    ],
)
def test_faults_in_captions_txt_name_the_line(flickr, lines, message):
    root = flickr()
    (root / "flickr8k" / "captions.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        load("flickr8k", root)


@pytest.fixture
def coco(tmp_path, picture):
    base = tmp_path / "coco_captions"
    (base / "annotations").mkdir(parents=True)
    for part, count in (("train", 10), ("val", 3)):
        images = [{"id": 100 + i, "file_name": f"{i:012d}.jpg"} for i in range(count)]
        notes = [{"image_id": 100 + i, "caption": f"{part} {i}\n", "id": i} for i in range(count)]
        notes += [{"image_id": 100, "caption": "again", "id": 99}]
        for i in range(count):
            picture(base / f"{part}2017" / f"{i:012d}.jpg", i)
        (base / "annotations" / f"captions_{part}2017.json").write_text(
            json.dumps({"images": images, "annotations": notes})
        )
    return tmp_path


def test_coco_captions(coco):
    data = load("coco_captions", coco)
    assert [len(data.splits[s]) for s in ("train", "validation", "query")] == [9, 1, 3]
    assert data.query.paths == [f"val2017/{i:012d}.jpg" for i in range(3)]
    assert data.query.all_captions == [["val 0", "again"], ["val 1"], ["val 2"]] and not data.has_classes
    with pytest.raises(DataError, match=r"10 train \(published: 118287\), 3 val \(published: 5000\)"):
        load("coco_captions", coco, verify=True)
    with pytest.raises(DataError, match="year 2015 is none of 2014, 2017"):
        load("coco_captions", coco, year=2015)


def test_coco_faults(coco):
    table = coco / "coco_captions" / "annotations" / "captions_val2017.json"
    content = json.loads(table.read_text())
    content["annotations"] = content["annotations"][:2]
    table.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no caption for val2017/000000000002\.jpg"):
        load("coco_captions", coco)
    table.write_text(json.dumps({"images": []}))
    with pytest.raises(DataError, match="expected images and annotations"):
        load("coco_captions", coco)


@pytest.mark.parametrize("name", ["cub200", "flickr8k", "flickr30k", "coco_captions"])
def test_absent_says_where_it_was_looked_for(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name}: .* not found together in .*see data/{name}/README\.md"):
        load(name, tmp_path)
