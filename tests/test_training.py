"""The training loop: same bits for the same seed, resumable, and every setting reaches what it is meant to change."""

import json

import numpy as np
import pytest
import torch

from hamlet import evaluation, training
from hamlet.models import create_model


def build(name="gem", seed=0, **options):
    """A method on timm's tiny residual network: the road of any other, in a sixth of the time."""
    training.seed_everything(seed)
    return create_model(name, backbone="test_resnet", **options)


def fit(toy_data, settings, folder, seed=0, name="gem", **options):
    model = build(name, seed, **options)
    return model, training.train(model, toy_data, settings, seed, folder)


def same_weights(a, b) -> bool:
    b = b.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items())


def one_step(toy_data, settings, folder, monkeypatch, **model_options):
    """The trainer after its first epoch, and what the objective was given and gave at each step."""
    trainer = training.Trainer(build(**model_options), toy_data, settings, 0, folder)
    seen = []
    forward = training.Objective.forward

    def watched(self, model, raw, batch):
        terms = forward(self, model, raw, batch)
        seen.append((batch, {k: v.item() for k, v in terms.items()}))
        return terms

    monkeypatch.setattr(training.Objective, "forward", watched)
    trainer.fit()
    return trainer, seen


def test_same_run_twice_is_bit_identical_and_another_seed_is_not(toy_data, settings, tmp_path):
    first, trained = fit(toy_data, settings, tmp_path / "a")
    second, again = fit(toy_data, settings, tmp_path / "b")
    assert same_weights(first, second)
    columns = [c for c in trained.curves if c != "seconds"]
    assert trained.curves[columns].equals(again.curves[columns])
    other, _ = fit(toy_data, settings, tmp_path / "c", seed=1)
    assert not same_weights(first, other)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(
    toy_data, settings, tmp_path, monkeypatch, channels_last
):
    """Strides of weights and of the optimiser's moments survive the checkpoint: the fused step reads both in order."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    settings = settings | {"epochs": 3}
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def go(folder):
        model = build().to(memory_format=layout)
        return model, training.train(model, toy_data, settings, 0, tmp_path / folder)

    whole, _ = go("whole")
    epoch = training.Trainer._epoch

    def interrupted(self, number, bar):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    monkeypatch.setattr(training.Trainer, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("killed")
    numbers = []
    monkeypatch.setattr(
        training.Trainer,
        "_epoch",
        lambda self, number, bar: numbers.append(number) or epoch(self, number, bar),
    )
    resumed, trained = go("killed")
    assert numbers == [2]  # only what was missing
    assert same_weights(whole, resumed)
    assert trained.curves["epoch"].tolist() == [1, 2, 3]


def test_a_checkpoint_of_other_settings_is_not_taken(toy_data, settings, tmp_path, capsys):
    fit(toy_data, settings, tmp_path)
    fit(toy_data, settings | {"weight_decay": 0.5}, tmp_path)
    assert "other settings" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_set_aside_and_training_begins_anew(
    toy_data, settings, tmp_path, capsys, content
):
    fit(toy_data, settings, tmp_path / "a")
    path = tmp_path / "a" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-5000] if content is None else content)
    again, _ = fit(toy_data, settings, tmp_path / "a")
    assert "set aside as" in capsys.readouterr().out
    assert len(list((tmp_path / "a").glob("*.damaged-*"))) == 1
    fresh, _ = fit(toy_data, settings, tmp_path / "b")
    assert same_weights(again, fresh)


def test_training_lowers_the_loss_and_finds_the_colours(toy_data, settings, tmp_path):
    _, trained = fit(toy_data, settings | {"epochs": 6}, tmp_path)
    assert trained.curves["metric_loss"].iloc[-1] < 0.8 * trained.curves["metric_loss"].iloc[0]
    assert trained.images == 6 * 32


def test_a_loss_that_is_not_finite_stops_with_step_and_inputs(toy_data, settings, tmp_path, monkeypatch):
    class Broken(torch.nn.Module):
        calls = 0

        def forward(self, embedding, labels):
            Broken.calls += 1
            return embedding.sum() * (float("nan") if Broken.calls == 3 else 1.0)

    monkeypatch.setattr(training, "build_loss", lambda *a, **k: Broken())
    with pytest.raises(FloatingPointError, match="step 2"):
        fit(toy_data, settings, tmp_path)
    report = json.loads((tmp_path / "not_finite.json").read_text())
    assert report["step"] == 2
    assert len(report["inputs"]) == 8
    assert set(report["inputs"]) <= set(toy_data.train.paths)


@pytest.mark.parametrize("name", ["cosface", "proxy_anchor", "multi_similarity"])
def test_every_loss_prefers_embeddings_at_their_class(name):
    torch.manual_seed(0)
    loss = training.build_loss(name, 3, 8, 0.1, 16.0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    anchors = torch.eye(8)[:3]
    if proxies := list(loss.parameters()):
        proxies[0].data = anchors.T.clone() if proxies[0].shape == (8, 3) else anchors.clone()
    good = loss(anchors[labels], labels)
    bad = loss(anchors[(labels + torch.tensor([0, 1, 0, 1, 0, 1])) % 3], labels)
    assert good < bad


def test_margin_and_scale_reach_the_loss():
    labels, rows = torch.arange(3), torch.eye(8)[:3]
    values = {}
    for margin, scale in ((0.0, 16.0), (0.3, 16.0), (0.0, 4.0)):
        loss = training.build_loss("cosface", 3, 8, margin, scale)
        next(loss.parameters()).data = rows.T.clone()
        values[margin, scale] = loss(rows, labels).item()
    expected = {key: np.log1p(2 * np.exp(-key[1] * (1 - key[0]))) for key in values}
    assert values == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_unknown_loss_and_absent_device_are_named():
    with pytest.raises(ValueError, match="cosface"):
        training.build_loss("triplet", 3, 8, 0.1, 16.0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            training.choose_device("cuda")


# ---- wiring: each of these was broken on purpose once and no test noticed ------------------------------------------


def test_the_models_own_losses_are_part_of_what_is_minimised(toy_data, settings, tmp_path, monkeypatch):
    _, seen = one_step(toy_data, settings, tmp_path, monkeypatch, name="sparse")
    for _, terms in seen:
        assert {"reconstruction", "flops"} <= set(terms)
        assert terms["loss"] == pytest.approx(sum(v for k, v in terms.items() if k != "loss"), rel=1e-5)


def test_the_curve_is_of_the_validation_protocol(toy_data, settings, tmp_path):
    model, trained = fit(toy_data, settings, tmp_path)
    found = evaluation.evaluate(model, toy_data, settings["image_size"], ("validation",)).metrics
    for metric in ("mAP", "P@1"):
        assert trained.curves[f"validation_{metric}"].iloc[-1] == found["validation"][metric]


def test_training_sees_images_normalised_as_the_model_asks(toy_data, settings, tmp_path, monkeypatch):
    model = build()
    model.mean, model.std = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, images, **k: seen.append(images) or forward(self, images, **k)
    )
    objective = training.Objective(model, 4, settings, None)
    images = torch.full((4, 3, 64, 64), 153, dtype=torch.uint8)  # 0.6
    objective(model, model, (images, torch.arange(4), torch.arange(4)))
    for channel, value in enumerate(((0.6 - 0.2) / 0.5, (0.6 - 0.4) / 0.25, 0.0)):
        assert seen[0][:, channel].mean().item() == pytest.approx(value, abs=1e-5)


def test_each_part_learns_at_its_own_rate(toy_data, settings, tmp_path):
    rates = {"learning_rate": 1e-3, "backbone_learning_rate": 1e-4, "proxy_learning_rate": 1e-2}
    model = build()
    trainer = training.Trainer(model, toy_data, settings | rates, 0, tmp_path)
    given = {id(p): g["max_lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {given[id(p)] for p in model.backbone.parameters()} == {1e-4}
    assert {given[id(p)] for p in model.head.parameters()} == {1e-3}
    assert {given[id(p)] for p in trainer.objective.parameters()} == {1e-2}
    still = training.Trainer(build(), toy_data, settings | {"backbone_learning_rate": 0.0}, 0, tmp_path / "b")
    before = {k: v.clone() for k, v in still.raw.state_dict().items()}
    still.fit()
    after = dict(still.raw.named_parameters())
    assert all(torch.equal(before[k], v) for k, v in after.items() if k.startswith("backbone"))
    assert not torch.equal(before["head.0.weight"], after["head.0.weight"])


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing(toy_data, settings, tmp_path, monkeypatch):
    settings = settings | {"epochs": 5, "warmup": 0.4, "learning_rate": 1e-2}
    trainer = training.Trainer(build(), toy_data, settings, 0, tmp_path)
    rates, step = [], trainer.optimizer.step
    head = next(g for g in trainer.optimizer.param_groups if g["max_lr"] == 1e-2)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: rates.append(head["lr"]) or step())
    trainer.fit()
    assert len(rates) == 20
    assert rates.index(max(rates)) in (7, 8)  # 40% of the steps
    assert max(rates) == pytest.approx(1e-2, rel=0.05)
    assert rates[0] < 0.1 * max(rates)
    assert rates[-1] < 0.05 * max(rates)


def test_every_epoch_draws_another_augmentation(toy_data, settings, tmp_path, monkeypatch):
    _, seen = one_step(toy_data, settings, tmp_path, monkeypatch)
    half = len(seen) // 2
    images = {}
    for epoch, steps in enumerate((seen[:half], seen[half:])):
        for (pixels, _, index), _ in steps:
            images[epoch] = images.get(epoch, {}) | dict(zip(index.tolist(), pixels, strict=True))
    shared = set(images[0]) & set(images[1])
    assert shared
    assert not any(torch.equal(images[0][i], images[1][i]) for i in shared)


def test_labels_belong_to_their_images(toy_data, settings, tmp_path, monkeypatch):
    _, seen = one_step(toy_data, settings, tmp_path, monkeypatch)
    for (pixels, labels, index), _ in seen:
        assert labels.tolist() == (toy_data.train.labels[index.numpy()]).tolist()
        red, green = pixels[labels == 0].float().mean((0, 2, 3)), pixels[labels == 1].float().mean((0, 2, 3))
        assert red[0] > red[1] and green[1] > green[0]


def test_weight_vectors_are_not_decayed(toy_data, settings, tmp_path):
    trainer = training.Trainer(build(), toy_data, settings, 0, tmp_path)
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] in (0.0, settings["weight_decay"])
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


@pytest.mark.parametrize(("levels", "still", "moving"), [(1, "layer1", "layer2"), (2, "layer2", "layer3")])
def test_frozen_levels_keep_weights_and_the_backbone_its_statistics(
    toy_data, settings, tmp_path, levels, still, moving
):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training.train(model, toy_data, settings | {"frozen_levels": levels}, 0, tmp_path)
    after = model.state_dict()
    kept = [k for k in before if k.startswith(("backbone.body.conv1", f"backbone.body.{still}"))]
    kept += [k for k in before if k.startswith("backbone") and k.endswith(("running_mean", "running_var"))]
    assert len(kept) > 30
    assert all(torch.equal(before[k], after[k]) for k in kept)
    late = [k for k in before if k.startswith(f"backbone.body.{moving}") and k.endswith("weight")]
    assert late and not any(torch.equal(before[k], after[k]) for k in late)


def test_the_backbone_ends_between_its_initial_and_its_trained_weights(toy_data, settings, tmp_path):
    initial = build().backbone.state_dict()
    whole, _ = fit(toy_data, settings, tmp_path / "a")
    mixed, trained = fit(toy_data, settings | {"backbone_share": 0.75}, tmp_path / "b")
    found, ends = mixed.backbone.state_dict(), whole.backbone.state_dict()
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.25 * initial[name] + 0.75 * ends[name])
    assert torch.equal(mixed.head[0].weight, whole.head[0].weight)
    last = evaluation.evaluate(mixed, toy_data, settings["image_size"], ("validation",)).metrics["validation"]
    assert trained.curves["validation_mAP"].iloc[-1] == last["mAP"]


@pytest.mark.parametrize(
    ("batch", "least", "classes", "expected"),
    [(32, 1, 60, 1), (32, 4, 60, 4), (32, 1, 5, 8), (32, 3, 60, 4), (8, 2, 4, 2), (30, 1, 2, 15)],
)
def test_a_batch_is_filled_whatever_the_number_of_classes(batch, least, classes, expected):
    assert training.fill_batch(batch, least, classes) == expected


def test_few_classes_fill_the_batch_and_the_record_says_so(toy_data, settings, tmp_path, monkeypatch):
    settings = settings | {"batch_size": 16, "images_per_class": 1, "epochs": 1}
    _, seen = one_step(toy_data, settings, tmp_path, monkeypatch)
    assert {len(labels) for (_, labels, _), _ in seen} == {16}
    _, trained = fit(toy_data, settings, tmp_path / "b")
    assert (trained.batch_size, trained.images_per_class) == (16, 4)
    with pytest.raises(ValueError, match="at least two"):
        training.fill_batch(32, 1, 1)


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("term", "layer"), [("alignment", "text_projection"), ("proxies", "text_tower")])
def test_a_text_term_needs_its_layer_enters_the_curve_and_moves_it(toy_data, settings, tmp_path, term, layer):
    settings = settings | {f"text_{term}": 1.0, "epochs": 1}
    with pytest.raises(ValueError, match=layer):
        training.Objective(build(), 3, settings, None)
    before = getattr(build(text=term), layer).weight.detach().clone()
    model, trained = fit(toy_data, settings, tmp_path, text=term)
    assert f"text_{term}" in trained.curves
    assert not torch.equal(before, getattr(model, layer).weight)


def test_the_weight_of_a_text_term_scales_it(toy_data, settings, tmp_path, monkeypatch):
    settings = settings | {"epochs": 1, "text_alignment": 1.0, "text_guidance": 1.0}
    _, once = one_step(toy_data, settings, tmp_path / "a", monkeypatch, text="alignment")
    monkeypatch.undo()
    twice = settings | {"text_alignment": 2.0, "text_guidance": 3.0}
    _, more = one_step(toy_data, twice, tmp_path / "b", monkeypatch, text="alignment")
    first, second = once[0][1], more[0][1]
    assert second["text_alignment"] == pytest.approx(2 * first["text_alignment"], rel=1e-5)
    assert second["text_guidance"] == pytest.approx(3 * first["text_guidance"], rel=1e-5)
