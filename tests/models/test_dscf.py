"""DSCF: kernels made from the image, filtering by them, and the per-pixel fusion."""

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d

from hamlet.models.dscf import DynamicFilter, PixelFusion, depthwise


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("grid", [(2, 2), (4, 7)], ids=str)
def test_every_image_is_filtered_by_its_own_kernels(size, grid):
    x, kernels = torch.randn(2, 3, *grid), torch.randn(2, 3, size, size)
    expected = np.empty(x.shape)
    for b in range(2):
        for c in range(3):
            padded = np.pad(x[b, c].double().numpy(), size // 2)
            expected[b, c] = correlate2d(padded, kernels[b, c].double().numpy(), mode="valid")
    np.testing.assert_allclose(depthwise(x, kernels), expected, rtol=1e-4, atol=1e-5)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(depthwise(last, kernels), depthwise(x, kernels))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_kernels_differ_between_images_and_only_between_images(size, evaluated, images):
    model = evaluated("dscf_resnet18")
    layer = model.filters[[1, 3, 5, 7].index(size)]
    with torch.no_grad():
        kernels = layer.kernels(model.backbone(images[[0, 1, 0]])[-1])
    assert kernels.shape == (3, 474, size, size)
    torch.testing.assert_close(kernels[0], kernels[2])
    assert ((kernels[0] - kernels[1]).abs() > 1e-4).float().mean() > 0.5


def test_the_smallest_kernel_comes_from_the_images_mean():
    layer = DynamicFilter(channels=4, width=3, size=1)
    x = torch.randn(2, 4, 3, 5)
    weight, bias = layer.generate.weight[:, :, 0, 0], layer.generate.bias
    expected = x.mean(dim=(2, 3)) @ weight.T + bias
    torch.testing.assert_close(layer.kernels(x)[:, :, 0, 0], expected)


def test_fusion_is_a_softmax_over_levels_at_every_pixel():
    torch.manual_seed(0)
    fusion = PixelFusion(levels=3, channels=5, compressed=2)
    maps = list(torch.randn(3, 2, 5, 4, 6))
    weights = fusion.weights(maps)
    assert weights.shape == (2, 3, 4, 6) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 4, 6))
    assert (weights[:, :, 0, 0] - weights[:, :, 1, 1]).abs().max() > 1e-3
    pixel = sum(weights[1, level, 2, 3] * maps[level][1, :, 2, 3] for level in range(3))
    torch.testing.assert_close(fusion(maps)[1, :, 2, 3], pixel)


def test_equal_levels_fuse_to_themselves():
    x = torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(PixelFusion(levels=3, channels=5)([x, x, x]), x)


@pytest.mark.parametrize("size", [64, 97])
def test_levels_lie_on_the_grid_of_c4(size, evaluated):
    model = evaluated("dscf_resnet18")
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, size, size))
        grids = {tuple(level.shape) for level in model.levels(maps)}
    assert grids == {(1, 512, *maps[2].shape[2:])}


def test_every_level_reaches_the_descriptor(evaluated, images):
    model = evaluated("dscf_resnet18")
    with torch.no_grad():
        maps = model.backbone(images)
        whole = model.embed(maps)[0]
        for level in (1, 2, 3):
            cut = [m * (i != level) for i, m in enumerate(maps)]
            assert (model.embed(cut)[0] - whole).abs().max() > 1e-4
