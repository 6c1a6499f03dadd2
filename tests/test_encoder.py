"""hamlet.load and encode: any picture, any model, the file's own size and normalisation."""

import numpy as np
import pytest
import torch
from PIL import Image

import hamlet
from hamlet.data import load_dataset
from hamlet.errors import HamletError
from hamlet.paths import data_roots

MEAN = (0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def default():
    return hamlet.load("default")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model file: GeM on ResNet18 with a text tower, 96 px, a normalisation of its own."""
    path = tmp_path_factory.mktemp("models") / "fruit.safetensors"
    torch.manual_seed(0)
    model = hamlet.create_model("gem", text="proxies", embedding_dim=16)
    model.mean = MEAN
    hamlet.save_model(model, path, card={"image_size": 96})
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_the_default_needs_no_download_and_says_that_it_is_untrained(default, photos):
    rows = default.encode(photos, progress=False)
    assert rows.shape == (3, 1280) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    assert "not trained for retrieval" in default.card["limits"]


def test_paths_pictures_arrays_and_bytes_are_one_and_the_same(default, photos):
    opened = [Image.open(p) for p in photos]
    expected = default.encode(photos, progress=False)
    forms = ([str(p) for p in photos], opened, [np.asarray(i) for i in opened], [p.read_bytes() for p in photos])
    for form in forms:
        np.testing.assert_array_equal(default.encode(form, progress=False), expected)
    for one in (photos[1], str(photos[1]), opened[1], np.asarray(opened[1])):
        np.testing.assert_allclose(default.encode(one, progress=False), expected[1:2], atol=1e-5)
    stacked = np.stack([np.asarray(i.resize((50, 50))) for i in opened])
    assert default.encode(stacked, progress=False).shape == (3, 1280)
    assert default.encode([], progress=False).shape == (0, 1280)


def test_batches_change_nothing(default, photos):
    by_one = default.encode(photos, batch_size=1, progress=False)
    np.testing.assert_allclose(by_one, default.encode(photos, batch_size=3, progress=False), atol=1e-5)


def test_a_file_brings_its_size_and_normalisation(trained, photos):
    encoder = hamlet.load(trained)
    assert encoder.image_size == 96 and encoder.dim == 16
    from hamlet.data.decode import decode

    pixels = torch.tensor(np.stack([decode(p, 96) for p in photos])).permute(0, 3, 1, 2) / 255
    std = torch.tensor(encoder.model.std).view(3, 1, 1)
    with torch.no_grad():
        expected = encoder.model((pixels - torch.tensor(MEAN).view(3, 1, 1)) / std)
    np.testing.assert_allclose(encoder.encode(photos, progress=False), expected.numpy(), atol=1e-5)


def test_names_files_and_folders_are_found(trained, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HAMLET_MODELS", str(trained.parent))
    expected = hamlet.load(trained).encode(photos, progress=False)
    hamlet.load(trained).model.save_pretrained(tmp_path / "hub")
    for name in ("fruit", str(trained), tmp_path / "hub"):
        np.testing.assert_array_equal(hamlet.load(name).encode(photos, progress=False), expected)
    with pytest.raises(HamletError, match=r"no model 'vegetables'; expected default, fruit, a .safetensors"):
        hamlet.load("vegetables")


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_sizes_of_batches_are_checked(default, photos, size):
    with pytest.raises(HamletError, match="batch_size: expected a whole number"):
        default.encode(photos, batch_size=size)


def test_what_is_no_picture_is_named(default, photos, tmp_path):
    (tmp_path / "notes.jpg").write_text("not a photo")
    with pytest.raises(HamletError, match=r"notes.jpg: not an image"):
        default.encode([photos[0], tmp_path / "notes.jpg"], progress=False)
    with pytest.raises(HamletError, match="cannot encode a int"):
        default.encode(3)


def test_pictures_and_sentences_go_together(default, trained, photos):
    encoder, words = hamlet.load(trained), ["a red apple", "no file."]
    rows = encoder.encode([words[0], photos[0], words[1], str(photos[1])], progress=False)
    np.testing.assert_allclose(rows[[0, 2]], encoder.encode_text(words), atol=1e-6)
    np.testing.assert_allclose(rows[[1, 3]], encoder.encode(photos[:2], progress=False), atol=1e-5)
    np.testing.assert_allclose(encoder.encode("a red apple"), rows[:1], atol=1e-6)
    rows = default.encode(["a banana", photos[0]], progress=False)
    np.testing.assert_allclose(rows[:1], default.encode_text("a banana"), atol=1e-6)
    with pytest.raises(HamletError, match=r"gone\.jpg: No such file"):
        encoder.encode("gone.jpg")


def test_sentences_where_the_model_knows_words(default, trained):
    words = hamlet.load(trained).encode_text(["a red apple", "a pear"])
    assert words.shape == (2, 16) and words.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, rtol=1e-5)
    assert hamlet.load(trained).reading("a pear") == "" and hamlet.load(trained).knows_words


def test_a_model_without_text_says_that_it_knows_no_words(tmp_path):
    hamlet.save_model(hamlet.create_model("gem_resnet18"), tmp_path / "plain.safetensors")
    plain = hamlet.load(tmp_path / "plain.safetensors")
    assert not plain.knows_words
    with pytest.raises(HamletError, match="trained without text"):
        plain.encode_text("a red apple")


def test_a_model_of_the_teacher_lsa_says_that_it_knows_no_words(tmp_path):
    model = hamlet.create_model("gem_resnet18", text="proxies", text_dim=64)
    hamlet.save_model(model, tmp_path / "m.safetensors", {"image_size": 64, "teacher": "lsa"})
    fitted = hamlet.load(tmp_path / "m.safetensors")
    assert not fitted.knows_words
    with pytest.raises(HamletError, match="the teacher lsa knows no sentence but its own; train with 'sentence'"):
        fitted.encode("a red apple")


def test_the_default_model_finds_what_imagenet_knows_by_words(default):
    """A word leads to the classifier's own direction: pictures that it takes for a banana come nearest to "banana"."""
    assert default.knows_words and default.reading("a yellow banana").startswith("banana")
    rows = default.encode_text(["banana", "a golden retriever, a dog", "church"])
    assert rows.shape == (3, 1280) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    weight = default.model.body.classifier.weight.detach().numpy()
    weight = weight - weight.mean(0)
    nearest = np.argmax(rows @ (weight / np.linalg.norm(weight, axis=1, keepdims=True)).T, axis=1)
    assert nearest.tolist() == [954, 207, 497]  # ImageNet's numbers of banana, golden retriever, church


HERE = any((root / "GroceryStoreDataset" / "dataset" / "val").is_dir() for root in data_roots())


@pytest.mark.skipif(not HERE, reason="needs the Grocery Store Dataset beside the project or in HAMLET_DATA")
def test_words_find_photos_without_any_training(default):
    """The figures that docs/photos.md gives over all kinds; and of the eleven groceries that ImageNet has a class of,
    all but one or two (the lemon) have a right photo among the first ten; a random order has one for every sixth."""
    data = load_dataset("grocery", size=default.image_size)
    rows = default.encode([np.asarray(image) for image in data.validation.images], progress=False)
    words = default.encode_text([f"a {name.lower().replace('-', ' ')}" for name in data.coarse_names])
    first = np.argsort(-words @ rows.T, axis=1)[:, :10]
    right = data.validation.coarse_labels[first] == np.arange(len(words))[:, None]
    assert len(words) == 43 and abs(right[:, 0].sum() - 8) <= 1 and abs(right.any(1).sum() - 18) <= 1
    known = ["Apple", "Banana", "Lemon", "Orange", "Pineapple", "Pomegranate"]
    known += ["Cabbage", "Cucumber", "Mushroom", "Pepper", "Zucchini"]
    found = {name: right[data.coarse_names.index(name)].any() for name in known}
    assert sum(found.values()) >= 9, found
