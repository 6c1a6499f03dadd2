from dataclasses import replace

import numpy as np
import pytest
import torch

from hamlet import evaluation
from hamlet.data import Protocol
from hamlet.distillation import LSA_DIM, encode_text
from hamlet.metrics import hierarchical_metrics, retrieval_metrics
from hamlet.models import create_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("gem_resnet18").eval()


def test_embedding_does_not_depend_on_batch_size_and_keeps_the_mode(model, toy_data):
    images = toy_data.query.images
    model.train()
    whole = evaluation.embed(model, images, 64)
    assert model.training
    model.eval()
    np.testing.assert_allclose(whole, evaluation.embed(model, images, 64, batch_size=3), atol=1e-5)
    assert not model.training
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)


def test_embed_refuses_what_is_not_uint8_images(model):
    with pytest.raises(ValueError, match="uint8"):
        evaluation.embed(model, np.zeros((2, 64, 64, 3), np.float32), 64)


def test_evaluation_agrees_with_a_float64_loop(model, toy_data):
    found = evaluation.evaluate(model, toy_data, 64, ("default",))
    x, labels = found.embeddings["query"].astype(np.float64), toy_data.query.labels
    scores = x @ x.T
    expected = []
    for i in range(len(x)):
        others = np.delete(np.arange(len(x)), i)
        hits = (labels[others] == labels[i])[np.argsort(-scores[i, others], kind="stable")]
        expected.append((np.cumsum(hits) / (1 + np.arange(len(hits))))[hits].mean())
    np.testing.assert_allclose(found.per_query["AP"], expected, atol=1e-9)
    assert found.metrics["default"]["mAP"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_unknown_protocol_lists_the_valid_ones(model, toy_data):
    with pytest.raises(ValueError, match="default, validation"):
        evaluation.evaluate(model, toy_data, 64, ("iconic",))


def test_neighbours_leave_the_query_out_and_come_in_order(model, toy_data):
    found = evaluation.evaluate(model, toy_data, 64, ("default",))
    rows = evaluation.example_neighbours(toy_data, found.embeddings, examples=4, neighbours=3)
    assert len(rows) == 12
    assert (rows["query_path"] != rows["path"]).all()
    assert (rows["correct"] == (rows["label"] == rows["query_label"])).all()
    assert rows.groupby("query_path")["score"].apply(lambda s: (s.diff().dropna() <= 0).all()).all()


def test_equal_bytes_keeps_the_budget_and_the_order_of_what_lies_in_few_directions():
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(4, 32)).astype(np.float32)
    train, query = (rng.normal(size=(n, 4)).astype(np.float32) @ basis for n in (50, 20))
    small = evaluation.equal_bytes({"query": query}, train, bytes_per_image=8)["query"]
    assert small.shape == (20, 4)
    centred = query - train.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(small @ small.T, centred @ centred.T, atol=5e-3)


def test_extra_metrics_hold_the_hierarchy_and_equal_bytes(model, toy_data):
    found = evaluation.evaluate(model, toy_data, 64, ("default",))
    extra = evaluation.extra_metrics(model, toy_data, found, 64)
    assert 0 < extra["hierarchical"]["HAP"] <= 1
    assert extra["equal_bytes"]["queries"] == 16
    # 31 directions hold 32 training descriptors, so nothing but rounding and the mean is lost
    assert extra["equal_bytes"]["mAP"] == pytest.approx(found.metrics["default"]["mAP"], abs=0.1)


def test_equal_bytes_is_what_sparse_stores():
    assert create_model("sparse_resnet18").descriptor_bytes == evaluation.EQUAL_BYTES
    assert create_model("sparse_mobilenetv3").descriptor_bytes == evaluation.EQUAL_BYTES


# ---- wiring: each of these was broken on purpose once and no test noticed ------------------------------------------


@pytest.fixture(scope="module")
def across(toy_data):
    """Queries against another split, its classes counted otherwise, so that no side stands in for the other."""
    labels = np.random.default_rng(0).permutation(toy_data.query.labels)
    query = replace(toy_data.query, labels=labels, coarse_labels=labels // 2)
    protocols = {"default": Protocol("query", "train", "gallery"), **{"validation": toy_data.protocols["validation"]}}
    protocols["alone"] = Protocol("query", None, "leave-one-out")
    return replace(toy_data, splits=toy_data.splits | {"query": query}, protocols=protocols)


def test_a_gallery_is_ranked_and_every_query_keeps_its_protocol_and_label(model, across):
    found = evaluation.evaluate(model, across, 64)
    q, g = found.embeddings["query"], found.embeddings["train"]
    expected = retrieval_metrics(q, across.query.labels, g, across.train.labels, ks=(1, 5, 10))
    assert found.metrics["default"]["mAP"] == expected.mean["mAP"] != found.metrics["alone"]["mAP"]
    rows = found.per_query.groupby("protocol", sort=False)
    assert list(rows.groups) == ["default", "validation", "alone"]
    first = rows.get_group("default")
    assert first["label"].tolist() == across.query.labels.tolist() and first["path"].tolist() == across.query.paths
    assert first["query"].tolist() == list(range(16))


def test_example_neighbours_are_the_best_of_the_gallery_by_name(model, across):
    found = evaluation.evaluate(model, across, 64, ("default",))
    rows = evaluation.example_neighbours(across, found.embeddings, examples=4, neighbours=3)
    for path, part in rows.groupby("query_path"):
        row = across.query.paths.index(path)
        scores = found.embeddings["train"] @ found.embeddings["query"][row]
        best = np.argsort(-scores, kind="stable")[:3]
        assert part["path"].tolist() == [across.train.paths[i] for i in best]
        assert part["class"].tolist() == [across.class_names[across.train.labels[i]] for i in best]
        assert set(part["query_class"]) == {across.class_names[across.query.labels[row]]}
        np.testing.assert_allclose(part["score"], scores[best], atol=1e-6)


def test_extra_metrics_are_of_fine_and_coarse_labels_and_of_cut_descriptors(model, across, monkeypatch):
    monkeypatch.setattr(evaluation, "EQUAL_BYTES", 8)  # four dimensions, so that something is lost
    found = evaluation.evaluate(model, across, 64)
    extra = evaluation.extra_metrics(model, across, found, 64)
    q, g, query, train = found.embeddings["query"], found.embeddings["train"], across.query, across.train
    graded = hierarchical_metrics(
        q, query.labels, query.coarse_labels, gallery=g, gallery_fine=train.labels, gallery_coarse=train.coarse_labels
    )
    assert extra["hierarchical"]["HAP"] == pytest.approx(graded.mean["HAP"])
    first = found.per_query["protocol"] == "default"
    assert found.per_query.loc[first, "HAP"].tolist() == pytest.approx(graded.per_query["HAP"].tolist())
    assert found.per_query.loc[~first, "HAP"].isna().all()
    small = evaluation.equal_bytes({"q": q, "g": g}, g, 8)
    cut = retrieval_metrics(small["q"], query.labels, small["g"], train.labels)
    assert extra["equal_bytes"]["mAP"] == pytest.approx(cut.mean["mAP"], abs=1e-6)
    assert extra["equal_bytes"]["mAP"] != found.metrics["default"]["mAP"]


def test_equal_bytes_is_centred_on_the_training_mean_and_rounded_through_half_precision():
    rng = np.random.default_rng(0)
    train = rng.normal(3, 1, (40, 6)).astype(np.float32)
    query = rng.normal(3, 1, (9, 6)).astype(np.float32)
    z = (query - train.mean(0)) @ np.linalg.svd(train - train.mean(0), full_matrices=False)[2].T
    z = z.astype(np.float16).astype(np.float32)
    expected = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_array_equal(evaluation.equal_bytes({"q": query}, train, 12)["q"], expected)


def test_images_are_scaled_and_normalised_as_the_model_asks():
    transform = evaluation.evaluation_transform(8, (0.2, 0.4, 0.6), (0.5, 0.25, 0.125))
    out = transform(torch.full((1, 3, 16, 16), 153, dtype=torch.uint8))
    assert out.shape == (1, 3, 8, 8)
    assert out[0, :, 0, 0].tolist() == pytest.approx([0.8, 0.8, 0.0], abs=1e-6)


def test_bfloat16_is_used_where_asked(model, toy_data):
    whole, half = (evaluation.embed(model, toy_data.query.images[:4], 64, bf16=b) for b in (False, True))
    assert half.dtype == np.float32 and 0 < np.abs(whole - half).max() < 0.1


def test_retrieval_between_images_and_sentences_by_hand():
    images = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]  # two images of class 0, one each of 1 and 2
    texts = np.array([[0.9, 0.4, 0.1, 0], [0.8, 0.1, 0.5, 0]], np.float32)  # of the classes 0 and 1
    found = evaluation.cross_modal_metrics(images, np.array([0, 0, 1, 2]), texts, np.array([0, 1]))
    words, pictures = found["text_to_image"], found["image_to_text"]
    assert (words["queries"], pictures["queries"]) == (2, 3)  # no sentence is of class 2
    assert (words["R@1"], words["R@5"], words["median_rank"]) == (0.5, 1.0, 2.5)  # ranks 1 and 4
    assert words["mAP"] == pytest.approx((1 + 1 / 4) / 2)
    assert words["chance_R@1"] == pytest.approx((2 / 4 + 1 / 4) / 2) == words["chance_mAP"]
    assert words["chance_R@5"] == 1.0
    assert pictures["median_rank"] == 1.0  # of 1, 1 and 2
    assert pictures["R@1"] == pytest.approx(2 / 3) and pictures["chance_R@1"] == pytest.approx(0.5)


def test_words_are_the_captions_of_the_queries_in_the_models_space(across):
    torch.manual_seed(0)
    model = create_model("gem", backbone="test_resnet", text="proxies").eval()
    model.text_mean.copy_(torch.from_numpy(encode_text(across.train.captions).mean(0)))
    found = evaluation.words(model, across, evaluated := evaluation.evaluate(model, across, 64))
    assert set(found) == {"default", "alone"}
    vectors = torch.from_numpy(encode_text(across.query.captions)) - model.text_mean
    with torch.inference_mode():
        rows = model.text_tower(torch.nn.functional.normalize(vectors, dim=1)).numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(evaluation.describe_texts(model, across.query.captions), rows, atol=1e-5)
    expected = evaluation.cross_modal_metrics(
        evaluated.embeddings["train"], across.train.labels, rows, across.query.labels
    )
    assert found["default"]["text_to_image"] == pytest.approx(expected["text_to_image"], abs=1e-6)
    captions = encode_text(across.train.captions), across.train.labels
    asked = encode_text(across.query.captions), across.query.labels
    ceiling = evaluation.cross_modal_metrics(*captions, *asked)
    assert found["default"]["ceiling"] == pytest.approx(ceiling["text_to_image"], abs=1e-6)


def test_words_are_asked_through_the_teacher_that_the_model_was_trained_with(toy_data):
    model = create_model("gem", backbone="test_resnet", text="proxies", text_dim=LSA_DIM).eval()
    found = evaluation.words(model, toy_data, evaluation.evaluate(model, toy_data, 64), "lsa")["default"]
    asked = encode_text(toy_data.query.captions, "lsa"), toy_data.query.labels
    ceiling = evaluation.cross_modal_metrics(*asked, *asked)
    assert found["ceiling"] == pytest.approx(ceiling["text_to_image"], abs=1e-6)
    assert found["text_to_image"]["queries"] == 16
