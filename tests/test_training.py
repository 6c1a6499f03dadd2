import json

import pytest
import torch

from hamlet import training
from hamlet.artifact.profiles import Run
from hamlet.models import create_model

RUN = Run("smoke", "scenes", "gem_resnet18", "default", 0)


def fit(toy_data, settings, folder, run=RUN):
    model = training.build_model(run, settings)
    return model, training.train(model, toy_data, settings, run.seed, folder)


def same_weights(a, b) -> bool:
    b = b.state_dict()
    return all(torch.equal(value, b[name]) for name, value in a.state_dict().items())


def test_same_run_twice_is_bit_identical_and_another_seed_is_not(toy_data, settings, tmp_path):
    first, trained = fit(toy_data, settings, tmp_path / "a")
    second, again = fit(toy_data, settings, tmp_path / "b")
    assert same_weights(first, second)
    columns = [c for c in trained.curves if c != "seconds"]
    assert trained.curves[columns].equals(again.curves[columns])
    other, _ = fit(toy_data, settings, tmp_path / "c", Run(*list(vars(RUN).values())[:4], 1))
    assert not same_weights(first, other)


def test_a_killed_training_goes_on_and_ends_with_the_same_bits(toy_data, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    settings = settings | {"epochs": 3}
    whole, _ = fit(toy_data, settings, tmp_path / "whole")
    epoch = training.Trainer._epoch

    def interrupted(self, number, bar):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    monkeypatch.setattr(training.Trainer, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(toy_data, settings, tmp_path / "killed")
    numbers = []
    monkeypatch.setattr(
        training.Trainer,
        "_epoch",
        lambda self, number, bar: numbers.append(number) or epoch(self, number, bar),
    )
    resumed, trained = fit(toy_data, settings, tmp_path / "killed")
    assert numbers == [2]  # only what was missing
    assert same_weights(whole, resumed)
    assert trained.curves["epoch"].tolist() == [1, 2, 3]


def test_a_checkpoint_of_other_settings_is_not_taken(toy_data, settings, tmp_path, capsys):
    fit(toy_data, settings, tmp_path)
    fit(toy_data, settings | {"weight_decay": 0.5}, tmp_path)
    assert "other settings" in capsys.readouterr().out


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


def test_unknown_loss_and_absent_device_are_named():
    with pytest.raises(ValueError, match="cosface"):
        training.build_loss("triplet", 3, 8, 0.1, 16.0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            training.choose_device("cuda")


def test_alignment_needs_a_text_projection(settings):
    with pytest.raises(ValueError, match="text projection"):
        training.Objective(create_model("gem_resnet18"), 3, settings | {"text_alignment": 1.0})


def test_text_losses_enter_the_curve_and_move_the_projection(toy_data, settings, tmp_path):
    run = Run("smoke", "scenes", "gem_resnet18", "text", 0)
    settings = settings | {"text_guidance": 1.0, "text_alignment": 1.0, "epochs": 1}
    before = training.build_model(run, settings).text_projection.weight.detach().clone()
    model, trained = fit(toy_data, settings, tmp_path, run)
    assert {"guidance", "alignment"} <= set(trained.curves)
    assert not torch.equal(before, model.text_projection.weight)


def test_weight_vectors_are_not_decayed(toy_data, settings, tmp_path):
    model = training.build_model(RUN, settings)
    trainer = training.Trainer(model, toy_data, settings, 0, tmp_path)
    for group in trainer.optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_a_variant_changes_the_model_as_its_name_says(settings):
    cut = training.build_model(Run("smoke", "scenes", "hamlet_resnet18", "no_exchange", 0), settings)
    whole = training.build_model(Run("smoke", "scenes", "hamlet_resnet18", "no_text", 0), settings)
    assert not any(block.attention.exchange for block in cut.blocks)
    assert all(block.attention.exchange for block in whole.blocks)
