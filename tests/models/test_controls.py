"""GeM pooling and the two controls."""

import itertools

import numpy as np
import pytest
import torch

from hamlet.models import GeM, count_parameters, create_model


@pytest.mark.parametrize("p", [1.0, 3.0, 6.5])
def test_gem_is_the_generalised_mean(p):
    x = np.random.default_rng(0).uniform(0.1, 2.0, (2, 5, 3, 4)).astype(np.float32)
    expected = (x.astype(np.float64) ** p).mean(axis=(2, 3)) ** (1 / p)
    torch.testing.assert_close(GeM(p)(torch.from_numpy(x)), torch.from_numpy(expected).float())


def test_gem_lies_between_mean_and_maximum_and_nears_the_maximum():
    x = torch.rand(2, 3, 4, 4) + 0.1
    pooled = [GeM(p)(x) for p in (1.0, 3.0, 60.0)]
    torch.testing.assert_close(pooled[0], x.mean(dim=(2, 3)))
    assert (pooled[0] < pooled[1]).all() and (pooled[1] < pooled[2]).all()
    torch.testing.assert_close(pooled[2], x.amax(dim=(2, 3)), rtol=0.06, atol=0)


def test_gem_clamps_what_is_not_positive():
    x = torch.tensor([-1.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    out = GeM()(x)
    torch.testing.assert_close(out, torch.full((1, 2), 1e-6))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_gems_gradients_match_finite_differences_and_autocast_leaves_it_alone():
    pool = GeM(2.5)
    x = (torch.rand(1, 2, 3, 3) + 0.5).requires_grad_()
    grad_x, grad_p = torch.autograd.grad(pool(x).sum(), [x, pool.p])
    step, reference = 1e-5, x.detach().double()

    def value(x: torch.Tensor, p: float) -> torch.Tensor:
        return ((x**p).mean(dim=(2, 3)) ** (1 / p)).sum()

    by_p = (value(reference, 2.5 + step) - value(reference, 2.5 - step)) / (2 * step)
    torch.testing.assert_close(grad_p.double(), by_p, rtol=1e-4, atol=1e-5)
    moved = reference.clone()
    moved[0, 0, 0, 0] += step
    by_x = (value(moved, 2.5) - value(reference, 2.5)) / step
    torch.testing.assert_close(grad_x[0, 0, 0, 0].double(), by_x, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(x), pool(x.float())) and pool(x).dtype == torch.float32


def test_gem_baseline_is_backbone_gem_and_one_linear_layer(evaluated, images):
    model = evaluated("gem_resnet18")
    assert count_parameters(model) == 11_176_512 + 512 * 512 + 1
    with torch.no_grad():
        c5 = model.backbone(images)[-1].double().clamp(min=1e-6)
        pooled = (c5**3).mean(dim=(2, 3)) ** (1 / 3)
        out = pooled @ model.head[0].weight.double().T  # untrained: the normalisation is still the identity
        torch.testing.assert_close(model(images), (out / out.norm(dim=1, keepdim=True)).float())


@pytest.mark.parametrize(("name", "reported"), [("mlp_resnet18", 25_800_000), ("mlp_mobilenetv3", 11_610_000)])
def test_the_mlp_is_matched_to_hamlets_reported_size(name, reported, evaluated):
    assert count_parameters(evaluated(name)) == pytest.approx(reported, rel=1e-3)


@pytest.mark.parametrize("budget", [1_000_000, 5_000_000])
def test_the_mlps_head_has_the_size_that_was_asked_for(budget):
    model = create_model("mlp", head_parameters=budget)
    assert sum(p.numel() for p in model.head.parameters()) == pytest.approx(budget, rel=2e-3)


def test_the_mlp_bends_between_its_three_layers(images):
    model, seen = create_model("mlp", head_parameters=1_000_000).eval(), []
    layers = [module for module in model.head.modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        model(images)
    assert len(seen) == 3
    for (_, before), (after, _) in itertools.pairwise(seen):
        torch.testing.assert_close(after, torch.nn.functional.gelu(before))
