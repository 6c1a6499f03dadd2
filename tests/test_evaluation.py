import numpy as np
import pytest
import torch

from hamlet import evaluation
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
