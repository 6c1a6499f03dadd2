"""SpCa: the affinity, the soft assignment and the context, each against the equations in plain NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hamlet.models import create_model
from hamlet.models.spca import TokenContext, spatial_affinity


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (16, 16)], ids=str)
def test_affinity_columns_sum_to_one(grid):
    affinity = spatial_affinity(*grid)
    assert affinity.shape == (grid[0] * grid[1],) * 2
    torch.testing.assert_close(affinity.sum(dim=0), torch.ones(grid[0] * grid[1]))


def test_affinity_falls_with_distance():
    height, width = 5, 7
    affinity = spatial_affinity(height, width)
    cells = [(i, j) for i in range(height) for j in range(width)]
    for n, (y, x) in enumerate(cells):
        distance = np.array([math.hypot(y - i, x - j) for i, j in cells])
        order = np.argsort(distance, kind="stable")
        column = affinity[:, n].numpy()[order]
        steps = np.diff(distance[order])
        assert (np.diff(column)[steps > 1e-9] < 0).all() and column[0] == column.max()


def test_affinity_of_a_row_of_two_by_hand():
    near, far = 1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1))
    torch.testing.assert_close(spatial_affinity(1, 2), torch.tensor([[near, far], [far, near]]))


def test_affinity_distance_runs_over_rows_and_columns():
    affinity = spatial_affinity(2, 3)  # cells 0 1 2 / 3 4 5
    ratio = (affinity[:, 0] / affinity[0, 0]).tolist()
    expected = [math.exp(-d) for d in (0, 1, 2, 1, math.sqrt(2), math.sqrt(5))]
    assert ratio == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def layer() -> TokenContext:
    torch.manual_seed(0)
    layer = TokenContext(channels=6, tokens=4, token_dim=5, ranges=3)
    nn.init.normal_(layer.weight_logits)
    nn.init.normal_(layer.raw_variance)
    return layer


def reference_assignment(layer: TokenContext, x: np.ndarray) -> np.ndarray:
    weights = np.exp(layer.weight_logits.detach().double().numpy())
    weights /= weights.sum()
    variance = np.log1p(np.exp(layer.raw_variance.detach().double().numpy())) + 1e-4
    centres = layer.prototypes.detach().double().numpy()
    centres = (centres - centres.mean(1, keepdims=True)) / np.sqrt(centres.var(1, keepdims=True) + 1e-5)
    out = np.zeros((len(x), len(weights)))
    for n, point in enumerate(x):
        for k, centre in enumerate(centres):
            logit = math.log(weights[k] / math.sqrt(variance[k]))
            out[n, k] = math.exp(logit - ((point - centre) ** 2).sum() / (2 * variance[k]))
        out[n] /= out[n].sum()
    return out


def test_assignment_is_the_mixtures_posterior(layer):
    x = torch.randn(1, 7, 5)
    expected = reference_assignment(layer, x[0].double().numpy())
    torch.testing.assert_close(layer.assign(x)[0].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-6)


def test_context_is_the_share_of_each_token_spread_by_powers_of_the_affinity(layer):
    maps = torch.randn(1, 6, 3, 4)
    x = layer.reduce(maps).flatten(2)[0].T.detach().double().numpy()
    share = reference_assignment(layer, x)
    share = share / share.sum(axis=0)  # METHODS: normalised over positions
    affinity = spatial_affinity(3, 4).double().numpy()
    rows = [share.T @ np.linalg.matrix_power(affinity, b + 1) for b in (1, 2, 3)]
    context = np.concatenate(rows).T * 12  # LayerNorm takes the factor N out but for its epsilon
    context = (context - context.mean(1, keepdims=True)) / np.sqrt(context.var(1, keepdims=True) + 1e-5)
    torch.testing.assert_close(layer(maps)[0].double(), torch.from_numpy(context), rtol=1e-3, atol=1e-4)


def test_assignment_survives_extreme_parameters(layer):
    with torch.no_grad():
        layer.raw_variance.copy_(torch.tensor([-60.0, 60.0, 0.0, -20.0]))
        layer.weight_logits.copy_(torch.tensor([-80.0, 80.0, 0.0, 0.0]))
    assert layer(100 * torch.randn(2, 6, 2, 2)).isfinite().all()


def test_at_the_start_the_block_is_the_identity(evaluated, images):
    model = evaluated("spca_resnet18")
    with torch.no_grad():
        maps = model.backbone(images)
        plain = [model.plain_pool(maps[-1]), model.pool(model.widen(maps[-1]))]
        torch.testing.assert_close(model.embed(maps)[0], model.head(torch.cat(plain, dim=1)))


def test_the_descriptor_depends_on_where_things_are(fresh):
    """GeM alone cannot tell a shuffled grid from the original; the spatial context can."""
    model = fresh("spca_resnet18")
    torch.manual_seed(0)
    c5 = torch.rand(2, 512, 5, 5)
    shuffled = c5.flatten(2)[:, :, torch.randperm(25)].view_as(c5)
    with torch.no_grad():
        torch.testing.assert_close(model.embed([c5])[0], model.embed([shuffled])[0], atol=1e-5, rtol=1e-4)
        nn.init.normal_(model.attention.out.weight, std=0.5)
        assert (model.embed([c5])[0] - model.embed([shuffled])[0]).abs().max() > 1e-3


def test_attention_sees_normalised_positions():
    model, seen = create_model("spca", backbone="mobilenetv3_small_050", width=64, hidden=32).eval(), []
    model.widen.register_forward_hook(lambda *given: seen.append(given[2].flatten(2).transpose(1, 2)))
    model.attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(seen[1], nn.functional.layer_norm(seen[0], (64,)))
