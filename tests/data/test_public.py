"""The published formats of CIFAR-10, Flowers-102 and Oxford-IIIT Pet, in miniature, read through torchvision."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat
from torchvision import datasets

from hamlet.data import DataError, load_dataset, public
from hamlet.data.decode import decode


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Five batches of 20 and a test batch of 10 images; written as published, since that format is a pickle."""
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng, written = np.random.default_rng(0), {}
    for name, count in [*((f"data_batch_{i}", 20) for i in range(1, 6)), ("test_batch", 10)]:
        labels = [i % 10 for i in range(count)]
        written[name] = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": written[name], "labels": labels}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    batches = [[f"data_batch_{i}", md5(base / f"data_batch_{i}")] for i in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(base / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(base / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path, written


def test_cifar10(cifar):
    root, written = cifar
    data = load_dataset("cifar10", root=root, size=32, download=False)
    assert [len(data.splits[s]) for s in ("train", "validation", "query")] == [80, 20, 10]
    assert data.gallery is None and data.query.labels.tolist() == list(range(10))
    assert data.query.captions[6] == "a photo of a frog" and data.class_names[9] == "truck"
    expected = written["test_batch"].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(data.query.images, expected)  # 32 px at 32 px: the published pixels
    every = np.concatenate([written[f"data_batch_{i}"] for i in range(1, 6)]).reshape(100, 3, 32, 32)
    for split in (data.train, data.validation):
        for image, path, label in zip(split.images, split.paths, split.labels, strict=True):
            index = int(path.removeprefix("train/"))
            assert np.array_equal(image, every[index].transpose(1, 2, 0)) and label == index % 10
    assert set(data.validation.paths) == {f"train/{i:05d}" for i in range(80, 100)}
    small = load_dataset("cifar10", root=root, size=48, limit=1, download=False)
    assert [len(s) for s in small.splits.values()] == [10, 10, 10] and small.query.images.shape[1] == 48


def test_cifar10_with_a_changed_batch_is_refused_before_it_is_unpickled(cifar):
    root, _ = cifar
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match=r"cifar10: .*corrupted.*To place it by hand"):
        load_dataset("cifar10", root=root, size=32, download=False)


@pytest.fixture
def flowers(tmp_path, monkeypatch, picture):
    base = tmp_path / "downloads" / "flowers-102"
    labels = np.array([[1, 2, 102, 1, 2, 102, 1, 2, 102, 102]])
    for i in range(1, 11):
        picture(base / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {"trnid": [[1, 2, 3]], "valid": [[6, 5, 4]], "tstid": [[7, 8, 9, 10]]})
    table = dict(datasets.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        table[key] = (name, md5(base / name))
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", table)
    return tmp_path


def test_flowers102_with_the_sentences_of_reed_et_al(flowers):
    labels = [1, 2, 102, 1, 2, 102, 1, 2, 102, 102]
    for i, label in enumerate(labels, start=1):
        text = flowers / f"downloads/cvpr2016_flowers/text_c10/class_{label:05d}/image_{i:05d}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"flower {i}\nits petals\n")
    data = load_dataset("flowers102", root=flowers, size=8, download=False)
    assert data.validation.all_captions == [[f"flower {i}", "its petals"] for i in (6, 5, 4)]
    text.unlink()
    with pytest.raises(DataError, match=r"captions of .*image_00010\.jpg cannot be read"):
        load_dataset("flowers102", root=flowers, size=8, download=False)


@pytest.mark.filterwarnings("ignore:flowers102. 1 left out .1 x captions not found")
def test_flowers102(flowers):
    data = load_dataset("flowers102", root=flowers, size=8, download=False)
    assert data.validation.paths == [f"flowers-102/jpg/image_{i:05d}.jpg" for i in (6, 5, 4)]
    assert data.validation.labels.tolist() == [101, 1, 0] and data.query.labels.tolist() == [0, 1, 101, 101]
    assert data.train.captions[2] == "a photo of a blackberry lily" and len(data.class_names) == 102
    expected = [decode(flowers / "downloads" / path, 8) for path in data.query.paths]
    assert np.array_equal(data.query.images, np.stack(expected))


def test_flowers102_with_a_missing_image_names_it(flowers):
    (flowers / "downloads/flowers-102/jpg/image_00009.jpg").unlink()
    with pytest.raises(DataError, match=r"image_00009\.jpg"):
        load_dataset("flowers102", root=flowers, size=8, download=False)


@pytest.fixture
def pet_folder(tmp_path, picture):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 5), ("test", 2)):
        lines = []
        for label, (breed, species) in enumerate([("Abyssinian", 1), ("american_bulldog", 2), ("Bengal", 1)], 1):
            for i in range(count):
                name = f"{breed}_{i + (100 if split == 'test' else 1)}"
                picture(base / "images" / f"{name}.jpg", 10 * label + i)
                lines.append(f"{name} {label} {species} 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_pets(pet_folder):
    data = load_dataset("pets", root=pet_folder, size=8, download=False)
    assert data.class_names == ["Abyssinian", "American Bulldog", "Bengal"] and data.coarse_names == ["Cat", "Dog"]
    assert [len(data.splits[s]) for s in ("train", "validation", "query")] == [9, 6, 6]
    assert data.query.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.query.coarse_labels.tolist() == [0, 0, 1, 1, 0, 0]
    assert data.query.captions[2] == "a photo of a American Bulldog"
    assert data.validation.paths[:2] == [f"oxford-iiit-pet/images/Abyssinian_{i}.jpg" for i in (4, 5)]


def test_held_out_takes_the_last_tenth_of_each_class():
    labels = pd.Series([0] * 30 + [1] * 3 + [2] * 5)
    assert np.flatnonzero(public.held_out(labels)).tolist() == [27, 28, 29, 36, 37]


@pytest.mark.parametrize("name", ["cifar10", "flowers102", "pets"])
def test_absent_says_where_it_was_looked_for(name, tmp_path):
    with pytest.raises(DataError, match=rf"{name}: not found.*{public.FOLDERS[name]}/ in .*by hand"):
        load_dataset(name, root=tmp_path, download=False)


@pytest.mark.parametrize("name", ["cifar10", "flowers102", "pets"])
def test_a_failing_download_is_a_clear_error(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    for module in (datasets.cifar, datasets.flowers102, datasets.oxford_iiit_pet):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(DataError, match=rf"{name}: no route to host.*by hand"):
        load_dataset(name, root=tmp_path)
