"""What holds on a graphics card; one test imagines the card, so that a tensor left behind is noticed on any machine."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2

from hamlet import evaluation, training
from hamlet.distillation import TextTargets
from hamlet.encoder import load
from hamlet.errors import HamletError
from hamlet.models import create_model, list_methods, save_model

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
TEXT = {"text_alignment": 1.0, "text_proxies": 0.5, "text_guidance": 0.5}


def imagine_on_card(module: torch.nn.Module, card: FakeTensorMode) -> None:
    """Parameters and buffers move to an imagined card: shapes and devices are followed, nothing is computed."""

    def moved(tensor):
        imagined = card.from_tensor(tensor.detach())
        with card:
            return imagined.to("cuda")

    for part in module.modules():
        for name, tensor in list(part._parameters.items()):
            if tensor is not None:
                part._parameters[name] = torch.nn.Parameter(moved(tensor), tensor.requires_grad)
        for name, tensor in list(part._buffers.items()):
            if tensor is not None:
                part._buffers[name] = moved(tensor)


@pytest.fixture
def new_process():
    """accelerate keeps the device that a process trained on first; what it keeps is forgotten, as in a new one."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


def test_a_process_that_trained_elsewhere_says_so(toy_data, settings, tmp_path, monkeypatch, new_process):
    """Before, a run that asked for a card trained on the processor without a word."""
    model = create_model("gem", backbone="test_resnet")
    training.train(model, toy_data, settings | {"epochs": 1}, 0, tmp_path / "first")
    monkeypatch.setattr(training, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(training, "uses_bf16", lambda *_: False)
    with pytest.raises(HamletError, match=r"has trained on 'cpu' before.*start a new process"):
        training.train(model, toy_data, settings | {"device": "cuda"}, 0, tmp_path / "second")


@pytest.mark.parametrize("method", list_methods())
def test_no_tensor_of_a_training_step_stays_behind(method, settings, monkeypatch):
    """The forward pass of all losses but the library's own, and the search for frozen levels."""
    rng, options = np.random.default_rng(0), {"keep_ratio": 1.0} if method == "hamlet" else {}
    model = create_model(method, backbone="test_resnet", text="both", **options)
    rows = [rng.standard_normal((n, 384)).astype(np.float32) for n in (8, 3)]
    objective = training.Objective(model, 3, settings | TEXT, TextTargets(*rows, np.zeros(384, np.float32)))
    objective.metric_loss = torch.nn.PairwiseDistance()  # the library's asks for values, which nobody computes here
    objective.metric_loss.forward = lambda embedding, labels: embedding.sum() + labels.sum()
    if method == "sparse":
        model.autoencoder.anneal_images = 0  # asks for a value too
    monkeypatch.setattr(torch.autograd, "grad", lambda last, weights, **_: [None] * len(weights))
    card = FakeTensorMode()
    imagine_on_card(model, card)
    imagine_on_card(objective, card)
    with card:
        batch = torch.zeros(8, 3, 64, 64, dtype=torch.uint8, device="cuda"), *torch.zeros(2, 8, device="cuda").long()
        terms = objective(model, model, batch)
        training.freeze_levels(model.backbone, 2)
    assert set(TEXT) < set(terms)
    assert {term.device.type for term in terms.values()} == {"cuda"}


@pytest.mark.cuda
@on_card
@pytest.mark.parametrize("method", list_methods())
def test_training_on_a_card_ends_near_the_cpu(method, toy_data, settings, tmp_path, monkeypatch, new_process):
    """One epoch with every text term and held-back levels; and descriptors of the same weights on both.

    Without what is drawn at random elsewhere on a card (crops by the loader's workers, HAMLET's mask by the card): it
    alone moves the loss of so few images by up to 15%.
    """
    monkeypatch.setattr(training, "training_transform", lambda size, scale: v2.Resize(size))
    settings = settings | TEXT | {"text_teacher": "lsa", "epochs": 1, "frozen_levels": 2, "backbone_share": 0.85}
    losses, models = {}, {}
    for device in ("cpu", "cuda"):
        new_process()
        training.seed_everything(0)
        options = {"keep_ratio": 1.0} if method == "hamlet" else {}
        models[device] = create_model(method, backbone="test_resnet", text="both", text_dim=64, **options)
        trained = training.train(models[device], toy_data, settings | {"device": device}, 0, tmp_path / device)
        losses[device] = trained.curves["loss"].iloc[-1]
        assert trained.device.type == device
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
    images = toy_data.query.images
    found = {
        device: evaluation.embed(models["cuda"].to(device), images, 64, device=device) for device in ("cuda", "cpu")
    }
    rows = [x.toarray() if hasattr(x, "toarray") else x for x in found.values()]
    assert (rows[0] * rows[1]).sum(1).min() > 0.99


@pytest.mark.cuda
@on_card
def test_a_killed_training_goes_on_on_a_card(toy_data, settings, tmp_path, monkeypatch, new_process):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    settings, epoch = settings | {"epochs": 3, "device": "cuda"}, training.Trainer._epoch

    def interrupted(self, number, bar):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    def go(folder):
        training.seed_everything(0)
        return training.train(create_model("gem", backbone="test_resnet"), toy_data, settings, 0, tmp_path / folder)

    whole = go("whole").curves
    monkeypatch.setattr(training.Trainer, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("killed")
    monkeypatch.setattr(training.Trainer, "_epoch", epoch)
    again = go("killed").curves
    assert list(again["epoch"]) == [1, 2, 3]
    assert again["loss"].to_numpy() == pytest.approx(whole["loss"].to_numpy(), rel=0.01)


@pytest.mark.cuda
@on_card
def test_an_encoder_takes_the_card_and_gives_the_cpu_s_descriptors(tmp_path):
    save_model(create_model("gem", backbone="test_resnet"), tmp_path / "m.safetensors", {"image_size": 64})
    images = list(np.random.default_rng(0).integers(0, 256, (5, 80, 70, 3), dtype=np.uint8))
    card, cpu = (load(tmp_path / "m.safetensors", device) for device in (None, "cpu"))
    assert next(card.model.parameters()).is_cuda
    np.testing.assert_allclose(card.encode(images), cpu.encode(images), atol=2e-3)
