"""The training loop: same bits for the same seed, resumable, and every setting reaches what it is meant to change."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hamlet import distillation, evaluation, training
from hamlet.errors import HamletError
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
        training.Trainer, "_epoch", lambda self, number, bar: numbers.append(number) or epoch(self, number, bar)
    )
    resumed, trained = go("killed")
    assert numbers == [2]  # only what was missing
    assert same_weights(whole, resumed)
    assert trained.curves["epoch"].tolist() == [1, 2, 3]
    assert trained.curves["seconds"].is_monotonic_increasing  # the time before the kill counts


def test_a_checkpoint_of_other_settings_is_not_taken(toy_data, settings, tmp_path, capsys):
    fit(toy_data, settings, tmp_path)
    fit(toy_data, settings | {"weight_decay": 0.5}, tmp_path)
    assert "other settings" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_set_aside_and_training_begins_anew(toy_data, settings, tmp_path, capsys, content):
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
            return embedding.sum() * (float("nan") if Broken.calls == 7 else 1.0)

    monkeypatch.setattr(training, "build_loss", lambda *a, **k: Broken())
    with pytest.raises(FloatingPointError, match="step 6"):  # of all epochs; each has four
        fit(toy_data, settings, tmp_path)
    report = json.loads((tmp_path / "not_finite.json").read_text())
    assert report["step"] == 6
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
    anchors = training.build_loss("proxy_anchor", 3, 8, 0.3, 7.0)
    assert (anchors.margin, anchors.alpha) == (0.3, 7.0)


def test_proxies_start_short_so_that_they_turn_quickly():
    torch.manual_seed(0)
    assert training.build_loss("cosface", 60, 64, 0.0, 16.0).W.std().item() == pytest.approx(0.02, rel=0.1)


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


def test_the_curve_is_of_the_validation_protocol(toy_data, settings, tmp_path, monkeypatch):
    split = toy_data.validation  # labels that no network can find, so that the other protocols' values are others
    mixed = replace(split, labels=np.random.default_rng(0).permutation(split.labels))
    data = replace(toy_data, splits=toy_data.splits | {"validation": mixed})
    settings, sizes = settings | {"image_size": 96, "epochs": 1}, []
    embed = evaluation.embed
    monkeypatch.setattr(
        evaluation, "embed", lambda model, images, size, **k: sizes.append(size) or embed(model, images, size, **k)
    )
    model, trained = fit(data, settings, tmp_path)
    found = evaluation.evaluate(model, data, 96).metrics
    row = trained.curves.iloc[-1]
    assert row["validation_mAP"] == found["validation"]["mAP"] != found["default"]["mAP"]
    assert row["validation_P@1"] == found["validation"]["P@1"] != found["validation"]["mAP"]
    assert sizes[0] == 96


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
    mixed_labels = np.random.default_rng(0).permutation(toy_data.validation.labels)
    hard = replace(toy_data.validation, labels=mixed_labels)  # so that a mAP tells two models apart
    toy_data = replace(toy_data, splits=toy_data.splits | {"validation": hard})
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
    assert (trained.images, trained.images_per_class) == (32, 4)
    _, trained = fit(toy_data, settings | {"images_per_class": 8}, tmp_path / "c")
    assert trained.images_per_class == 8
    with pytest.raises(ValueError, match="at least two"):
        training.fill_batch(32, 1, 1)


def test_every_term_is_its_formula_of_the_batch_its_settings_and_its_texts(settings):
    settings = settings | {"margin": 0.3, "scale": 7.0, "text_alignment": 0.5, "text_proxies": 2.0}
    settings, rng = settings | {"text_guidance": 3.0}, np.random.default_rng(0)
    images, classes = (rng.standard_normal((n, 384)).astype(np.float32) for n in (6, 4))
    images, classes = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, classes))
    text = distillation.TextTargets(images, classes, np.zeros(384, np.float32))
    model = build(text="both")
    objective = training.Objective(model, 4, settings, text)
    pixels = torch.from_numpy(rng.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))
    labels, index = torch.tensor([0, 0, 1, 3]), torch.tensor([5, 2, 0, 1])
    found = objective(model, model, (pixels, labels, index))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.mean, model.std))
    rows, own = model((pixels / 255 - mean) / std, auxiliary=True)
    of_images = torch.from_numpy(images)[index]
    proxies = torch.nn.functional.normalize(objective.metric_loss.W, dim=0)
    logits = 7.0 * (rows @ proxies - 0.3 * torch.eye(4)[labels])
    expected = {
        "metric_loss": torch.nn.functional.cross_entropy(logits, labels),
        "text_alignment": 0.5 * distillation.alignment(model.text_projection(rows), of_images),
        "text_proxies": 2 * distillation.text_proxies(rows, model.text_tower(torch.from_numpy(classes)), labels, 7.0),
        "text_guidance": 3 * distillation.language_guidance(rows, of_images, labels),
        **own,
    }
    assert found.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-3), name
    assert found["loss"].item() == pytest.approx(sum(v.item() for v in expected.values()), rel=1e-3)


def test_texts_come_from_the_captions_source_teacher_and_seed_asked_for(toy_data, settings, tmp_path, monkeypatch):
    asked, targets = [], training.text_targets
    monkeypatch.setattr(training, "text_targets", lambda *a, **k: asked.append((a, k)) or targets(*a, **k))
    settings = settings | {"text_proxies": 1.0, "text_source": "shuffled", "text_teacher": "lsa"}
    model = build(text="proxies", text_dim=distillation.LSA_DIM)
    trainer = training.Trainer(model, toy_data, settings, 5, tmp_path)
    (captions, labels, names), how = asked[0]
    assert (captions, names) == (toy_data.train.captions, toy_data.class_names)
    assert labels.tolist() == toy_data.train.labels.tolist()
    assert how == {"source": "shuffled", "teacher": "lsa", "seed": 5}
    assert model.text_mean.abs().max() > 0 and trainer.objective.text_classes.shape[0] == 4


def test_classes_of_training_are_numbered_anew_and_keep_their_names_and_texts(
    toy_data, settings, tmp_path, monkeypatch
):
    """As where the classes of training are some of many: here green and yellow, the labels 1 and 3."""
    part = [i for i, label in enumerate(toy_data.train.labels) if label % 2]
    rows = {name: [getattr(toy_data.train, name)[i] for i in part] for name in ("captions", "paths", "all_captions")}
    arrays = {name: getattr(toy_data.train, name)[part] for name in ("images", "labels", "coarse_labels")}
    train = replace(toy_data.train, **rows, **arrays)
    data = replace(toy_data, splits=toy_data.splits | {"train": train})
    asked, targets = [], training.text_targets
    monkeypatch.setattr(training, "text_targets", lambda *a, **k: asked.append(a) or targets(*a, **k))
    settings = settings | {"text_proxies": 1.0, "epochs": 1}
    _, seen = one_step(data, settings, tmp_path, monkeypatch, text="proxies")
    captions, labels, names = asked[0]
    assert captions == train.captions and names == ["green", "yellow"]
    assert labels.tolist() == [0 if "green" in caption else 1 for caption in captions]
    for (_, given, index), _ in seen:
        assert given.tolist() == labels[index.numpy()].tolist()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_and_validation_compute_in_the_precision_asked_for(
    toy_data, settings, tmp_path, monkeypatch, precision
):
    model, seen = build(), {True: set(), False: set()}
    forward = type(model).forward

    def watched(self, images, **options):
        seen[self.training].add(torch.is_autocast_enabled("cpu"))
        return forward(self, images, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    trained = training.train(model, toy_data, settings | {"precision": precision, "epochs": 1}, 0, tmp_path)
    wanted = precision == "bfloat16"
    assert seen == {True: {wanted}, False: {wanted}} and trained.bf16 == wanted


def test_augmentation_crops_mirrors_and_recolours(settings, toy_data):
    torch.manual_seed(0)
    edge = torch.full((3, 64, 64), 60, dtype=torch.uint8)
    edge[:, :, 32:] = 200
    whole = training.training_transform(32, 1.0)
    seen = torch.stack([whole(edge) for _ in range(40)]).float()
    assert seen.shape == (40, 3, 32, 32)
    right = (seen[..., 20:].mean((1, 2, 3)) > seen[..., :12].mean((1, 2, 3))).float().mean().item()
    assert 0.2 < right < 0.8  # mirrored half of the times
    flat = torch.stack([whole(torch.full((3, 64, 64), 100, dtype=torch.uint8)) for _ in range(20)]).float()
    assert flat.mean((1, 2, 3)).std() > 3
    tones = torch.stack([whole(edge) for _ in range(20)]).float().flatten(1)
    contrast = (tones.amax(1) - tones.amin(1)) / (tones.amax(1) + tones.amin(1))  # brightness leaves it alone
    orange = torch.tensor([200, 120, 60], dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
    colours = torch.stack([whole(orange) for _ in range(20)]).float().mean((2, 3))
    assert contrast.std() > 0.02 and (colours[:, 2] / colours[:, 0]).std() > 0.02
    ramp = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1) * 4

    def spread(least: float) -> float:  # of what a crop shows of a ramp from 0 to 252
        crops = [training.training_transform(32, least).transforms[0](ramp).float() for _ in range(40)]
        return min((crop.max() - crop.min()).item() for crop in crops)

    assert spread(0.1) < 130 < spread(0.9)
    small = training.TrainingImages(toy_data.train, settings | {"train_size": 48, "crop_scale": 0.9})
    assert small[0][0].shape == (3, 48, 48) and small.transform.transforms[0].scale == (0.9, 1.0)


def test_a_step_follows_the_gradient_of_its_own_batch_cut_at_one_norm(toy_data, settings, tmp_path, monkeypatch):
    for scale, low, high in ((16.0, 0.1, training.CLIP_NORM), (3000.0, 4.9, training.CLIP_NORM)):
        trainer = training.Trainer(build(), toy_data, settings | {"scale": scale}, 0, tmp_path / f"{scale}")
        norms, step = [], trainer.optimizer.step
        every = [*trainer.model.parameters(), *trainer.objective.parameters()]

        def watched(norms=norms, every=every, step=step):
            norms.append(torch.cat([p.grad.flatten() for p in every if p.grad is not None]).norm().item())
            step()

        monkeypatch.setattr(trainer.optimizer, "step", watched)
        trainer.fit()
        assert low < max(norms) <= high * 1.001
        assert all(p.grad is None or not p.grad.any() for p in every)  # nothing is carried into the next step


def test_the_curve_holds_means_over_steps_and_what_was_done(toy_data, settings, tmp_path, monkeypatch):
    trainer, seen = one_step(toy_data, settings, tmp_path, monkeypatch)
    for epoch, row in enumerate(trainer.rows):
        losses = [terms["metric_loss"] for _, terms in seen[4 * epoch : 4 * epoch + 4]]
        assert row["metric_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert (row["epoch"], row["step"]) == (epoch + 1, 4 * (epoch + 1))
    assert trainer.rows[0]["learning_rate"] > trainer.rows[1]["learning_rate"] > 0


def test_a_model_handed_over_in_evaluation_mode_trains_all_the_same(toy_data, settings, tmp_path):
    first, second = build(), build().eval()
    training.train(first, toy_data, settings, 0, tmp_path / "a")
    training.train(second, toy_data, settings, 0, tmp_path / "b")
    assert same_weights(first, second)


def test_the_seed_reaches_order_and_augmentation_of_the_same_first_weights(toy_data, settings, tmp_path, monkeypatch):
    batches = []
    for seed in (0, 1):
        trainer = training.Trainer(build(), toy_data, settings, seed, tmp_path / str(seed))
        forward, seen = trainer.objective.forward, []
        monkeypatch.setattr(
            trainer.objective, "forward", lambda m, r, b, f=forward, s=seen: s.append(b[2].tolist()) or f(m, r, b)
        )
        trainer.fit()
        batches.append(seen)
    assert batches[0] != batches[1]


@pytest.mark.parametrize("change", ["seed", "data", "settings"])
def test_a_checkpoint_knows_seed_data_and_settings(toy_data, settings, tmp_path, change):
    data = replace(toy_data, content_hash="1" * 64) if change == "data" else toy_data
    other = settings | ({"margin": 0.5} if change == "settings" else {})
    one = training.Trainer(build(), toy_data, settings, 0, tmp_path)
    two = training.Trainer(build(), data, other, int(change == "seed"), tmp_path)
    assert one.identity != two.identity


def test_a_data_set_without_classes_is_refused(toy_data, settings, tmp_path):
    alone = replace(toy_data.train, labels=np.arange(len(toy_data.train)))
    data = replace(toy_data, splits=toy_data.splits | {"train": alone})
    with pytest.raises(HamletError, match="its own class"):
        training.train(build(), data, settings, 0, tmp_path)


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
