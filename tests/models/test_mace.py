"""MACE: an attention per scale that reacts to the input, and the whole of one scale in a plain loop."""

import numpy as np
import pytest
import torch

from hamlet.models.layers import Convolution
from hamlet.models.mace import AdaptiveContext


@pytest.fixture(params=[1, 2, 3, 6])
def context(request) -> AdaptiveContext:
    torch.manual_seed(request.param)
    layer = AdaptiveContext(channels=6, width=4, scale=request.param).eval()
    for block in (layer.rho, layer.fuse):  # statistics other than 0 and 1, so that a missing norm shows
        block[1].running_mean.uniform_(-0.5, 0.5)
        block[1].running_var.uniform_(0.5, 2.0)
    return layer


def regions(x: np.ndarray, scale: int) -> np.ndarray:
    """Averages of the s x s overlapping regions, floor to ceiling, row-major: (C, H, W) -> (C, s^2)."""
    _, height, width = x.shape
    out = []
    for i in range(scale):
        for j in range(scale):
            rows = slice(i * height // scale, -(-(i + 1) * height // scale))
            columns = slice(j * width // scale, -(-(j + 1) * width // scale))
            out.append(x[:, rows, columns].mean(axis=(1, 2)))
    return np.stack(out, axis=1)


def affine(block: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """A 1x1 convolution, and its batch normalisation where it has one, on columns (C, N)."""
    conv = block if isinstance(block, torch.nn.Conv2d) else block[0]
    y = conv.weight.detach().double().numpy()[:, :, 0, 0] @ x
    if conv.bias is not None:
        y = y + conv.bias.detach().double().numpy()[:, None]
    if block is not conv and isinstance(block[1], torch.nn.BatchNorm2d):
        mean, var = block[1].running_mean.double().numpy(), block[1].running_var.double().numpy()
        y = (y - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    return y


@pytest.mark.parametrize("grid", [(2, 2), (5, 7)], ids=str)
def test_one_scale_follows_the_equations(context, grid):
    x, psi = torch.randn(1, 6, *grid), torch.rand(1, 4, *grid)
    flat = psi[0].double().numpy().reshape(4, -1)
    y = np.maximum(affine(context.phi, regions(x[0].double().numpy(), context.scale)), 0)
    steered = flat + affine(context.summary, flat.mean(axis=1, keepdims=True))
    alpha = 1 / (1 + np.exp(-affine(context.affinity, steered)))
    gathered = np.zeros_like(flat)
    for n in range(flat.shape[1]):
        for r in range(context.scale**2):
            gathered[:, n] += alpha[r, n] * y[:, r]
    z = np.maximum(affine(context.fuse, np.maximum(affine(context.rho, gathered) + flat, 0)), 0)
    out = context(x, psi)[0].detach().double().numpy().reshape(4, -1)
    np.testing.assert_allclose(out, z, rtol=1e-4, atol=1e-5)


def test_attention_has_one_map_per_region_and_reacts_to_the_input(context):
    first, second = torch.rand(2, 1, 4, 3, 5)
    alpha = context.attention(first)
    assert alpha.shape == (1, context.scale**2, 3, 5)
    assert ((alpha > 0) & (alpha < 1)).all()
    assert (alpha - context.attention(second)).abs().max() > 1e-3


def test_attention_at_a_position_is_steered_by_the_whole_image(context):
    psi = torch.rand(1, 4, 3, 5)
    changed = psi.clone()
    changed[..., 2, 4] += 5
    assert (context.attention(psi) - context.attention(changed))[..., 0, 0].abs().max() > 1e-4


def test_every_scale_reaches_the_descriptor(fresh, images):
    model = fresh("mace_resnet18")
    assert [c.scale for c in model.contexts] == [1, 2, 3, 6]
    with torch.no_grad():
        whole = model(images)
        for context in model.contexts:
            kept = context.fuse[1].weight.clone()
            context.fuse[1].weight.zero_()
            assert (model(images) - whole).abs().max() > 1e-4
            context.fuse[1].weight.copy_(kept)
        assert torch.equal(model(images), whole)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3), (4, 5)])
def test_the_product_on_tiny_maps_is_the_convolution(kernel, size):
    torch.manual_seed(0)
    layer = Convolution(5, 4, kernel).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 5, *size, dtype=torch.double, requires_grad=True)
    gradients = []
    for training in (True, False):  # evaluation always takes the convolution
        y = layer.train(training)(x)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, layer.weight, padding=kernel // 2))
        gradients.append(torch.autograd.grad(y.square().sum(), (x, layer.weight)))
    torch.testing.assert_close(*gradients)
