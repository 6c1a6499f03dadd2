"""ACSA on tokens alone, against a per-level, per-head loop of the formula and hand-made masks."""

import math

import pytest
import torch
import torch.nn.functional as F

from hamlet.models.acsa import Block, ConvFeedForward, CrossScaleAttention, Kept, LevelLinear, TokenKeeper, compact

LEVELS, BATCH, GRID, WIDTH = 4, 2, (3, 4), 16
CELLS = GRID[0] * GRID[1]


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(LEVELS, BATCH, CELLS, WIDTH)


@pytest.fixture
def mask() -> torch.Tensor:
    """Image 0 keeps five cells, image 1 nine: a batch with padding."""
    mask = torch.zeros(BATCH, CELLS)
    mask[0, [1, 2, 5, 6, 11]] = 1
    mask[1, [0, 1, 2, 3, 4, 7, 8, 9, 10]] = 1
    return mask


def spread(out: torch.Tensor, kept: Kept) -> torch.Tensor:
    """(L, B, n, d) of kept cells -> (L, B, cells, d) with zeros elsewhere."""
    return torch.stack([kept.scatter(level).flatten(2).transpose(1, 2) for level in out])


def by_loop(layer: CrossScaleAttention, x: torch.Tensor, keep: torch.Tensor, exchange: bool, gate: bool):
    """The formula, one query level, image and head at a time, in float64."""
    x, d = x.double(), WIDTH // layer.heads
    weight = {k: v.double() for k, v in layer.state_dict().items()}
    out = torch.zeros_like(x)
    for b in range(BATCH):
        cells = keep[b].nonzero()[:, 0]
        qkv = [x[i, b] @ weight["qkv.weight"][i] + weight["qkv.bias"][i] for i in range(LEVELS)]
        for i in range(LEVELS):
            g = torch.full((LEVELS,), 1.0 / LEVELS, dtype=torch.float64)
            if gate:
                g = (x[i, b, cells].mean(0) @ weight["gate.weight"][i] + weight["gate.bias"][i]).softmax(0)
            heads = []
            for h in range(layer.heads):
                part = slice(h * d, (h + 1) * d)
                q, keys, values = qkv[i][:, :WIDTH][:, part], [], []
                for j in range(LEVELS) if exchange else [i]:
                    k, v = qkv[j][cells].split(WIDTH, 1)[1:]
                    keys.append(q @ k[:, part].T / math.sqrt(d) + g[j].log())
                    values.append(v[:, part])
                heads.append(torch.cat(keys, 1).softmax(1) @ torch.cat(values))
            out[i, b] = torch.cat(heads, 1) @ weight["out.weight"][i] + weight["out.bias"][i]
    return (out * keep[None, :, :, None]).float()


@pytest.mark.parametrize("exchange,gate", [(True, True), (True, False), (False, False)])
def test_attention_is_the_formula(tokens, mask, exchange, gate):
    layer = CrossScaleAttention(LEVELS, WIDTH, 4, exchange, gate).eval()
    expected = by_loop(layer, tokens, mask, exchange, gate)
    with torch.no_grad():
        masked, g = layer(tokens, Kept(GRID, mask))
        short, kept = compact(tokens, GRID, mask)
        gathered, _ = layer(short, kept)
    assert (g is None) == (not gate)
    torch.testing.assert_close(masked * mask[None, :, :, None], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(spread(gathered, kept), expected, atol=1e-5, rtol=0)


def test_training_and_evaluation_masks_give_the_same_attention(tokens, mask):
    layer = CrossScaleAttention(LEVELS, WIDTH, 4)
    soft = mask.clone().requires_grad_()
    trained, _ = layer(tokens, Kept(GRID, soft))
    evaluated, _ = layer(tokens, Kept(GRID, mask))
    torch.testing.assert_close(trained, evaluated, atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(trained.square().sum(), soft)
    assert (gradient[mask == 0] != 0).all(), "a dropped cell must learn whether it was missed"


def test_gate_rows_sum_to_one_and_follow_the_input(tokens):
    layer = CrossScaleAttention(LEVELS, WIDTH, 4)
    with torch.no_grad():
        _, first = layer(tokens, Kept(GRID))
        _, second = layer(tokens + torch.randn(LEVELS, 1, 1, WIDTH), Kept(GRID))
    torch.testing.assert_close(first.sum(-1), torch.ones(BATCH, LEVELS))
    assert first.shape == (BATCH, LEVELS, LEVELS) and (first - second).abs().max() > 0.02


def test_each_half_of_a_block_has_its_own_scale(tokens):
    block = Block(LEVELS, WIDTH, 4, 32, scale=0.1).eval()
    assert block.scale.shape == (2, LEVELS, WIDTH) and (block.scale == 0.1).all()
    with torch.no_grad():
        block.scale.copy_(torch.rand_like(block.scale))
        first, second = block.scale[:, :, None, None]
        x = tokens + first * block.attention(F.layer_norm(tokens, (WIDTH,)), Kept(GRID))[0]
        expected = x + second * block.feed_forward(F.layer_norm(x, (WIDTH,)), Kept(GRID))
        torch.testing.assert_close(block(tokens, Kept(GRID))[0], expected)


@pytest.mark.parametrize("exchange", [True, False])
def test_levels_hear_of_each_other_only_with_exchange(tokens, exchange):
    block = Block(LEVELS, WIDTH, 4, 32, scale=1.0, exchange=exchange)
    changed = tokens.clone()
    changed[0] += 1.0 * torch.randn(BATCH, CELLS, WIDTH)
    with torch.no_grad():
        before, after = (block(x, Kept(GRID))[0][1:] for x in (tokens, changed))
    assert torch.equal(before, after) != exchange


def test_level_linear_is_one_linear_layer_per_level(tokens):
    layer = LevelLinear(LEVELS, WIDTH, 5)
    layer.bias.data.normal_()
    expected = [F.linear(x, w.T, b) for x, w, b in zip(tokens, layer.weight, layer.bias, strict=True)]
    torch.testing.assert_close(layer(tokens), torch.stack(expected))


def test_the_feed_forward_starts_without_blurring_the_tokens():
    kernels = ConvFeedForward(LEVELS, WIDTH, 8).mix.weight.detach().flatten(1)
    identity = torch.eye(9)[4].expand_as(kernels)
    torch.testing.assert_close(kernels, identity, atol=0.05, rtol=0)


def test_feed_forward_sees_zeros_where_cells_were_dropped(tokens, mask):
    layer = ConvFeedForward(LEVELS, WIDTH, 8).eval()
    layer.mix.weight.data.normal_()
    short, kept = compact(tokens, GRID, mask)
    with torch.no_grad():
        got = spread(layer(short, kept), kept)
        for i in range(LEVELS):
            h = (tokens[i] @ layer.expand.weight[i] + layer.expand.bias[i]) * mask[..., None]
            h = h.transpose(1, 2).unflatten(2, GRID)
            h = F.conv2d(h, layer.mix.weight[8 * i : 8 * i + 8], layer.mix.bias[8 * i : 8 * i + 8], padding=1, groups=8)
            h = F.gelu(h.flatten(2).transpose(1, 2)) @ layer.contract.weight[i] + layer.contract.bias[i]
            torch.testing.assert_close(got[i], h * mask[..., None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("static", [True, False])
def test_content_of_dropped_cells_has_no_influence(tokens, mask, static):
    block = Block(LEVELS, WIDTH, 4, 32, scale=1.0)
    changed = torch.where(mask[None, :, :, None] == 0, 100 * torch.randn_like(tokens), tokens)

    def run(x: torch.Tensor) -> torch.Tensor:
        x, kept = (x, Kept(GRID, mask)) if static else compact(x, GRID, mask)
        return spread(block(block(x, kept)[0], kept)[0], kept)

    with torch.no_grad():
        assert torch.equal(run(tokens), run(changed))
        changed = tokens.clone()
        changed[2, 0, 1] += 1.0  # a kept one has
        assert not torch.equal(run(tokens), run(changed))


def test_compact_keeps_the_order_and_pads_the_shorter_image(tokens, mask):
    short, kept = compact(tokens, GRID, mask)
    assert short.shape == (LEVELS, BATCH, 9, WIDTH)
    assert kept.index.tolist()[0] == [1, 2, 5, 6, 11] + [CELLS] * 4
    assert kept.mask.sum(1).tolist() == [5, 9]
    torch.testing.assert_close(spread(short, kept), tokens * mask[None, :, :, None])
    torch.testing.assert_close(kept.mean(short)[:, 0], tokens[:, 0, mask[0] == 1].mean(1))
    assert compact(tokens[:, :1], GRID, mask[:1])[1].mask is None  # one image: no padding, nothing to mask


@pytest.mark.parametrize("training", [True, False])
def test_one_cell_survives_however_low_all_score(tokens, training):
    keeper = TokenKeeper(LEVELS, WIDTH).train(training)
    keeper.evidence.bias.data.fill_(-1e4)
    mask = keeper(tokens)
    assert mask.sum(1).tolist() == [1, 1]
    assert mask.argmax(1).tolist() == keeper.logits(tokens).argmax(1).tolist()


def test_keeper_scores_by_departure_and_content_and_sends_nothing_back(tokens):
    keeper, x = TokenKeeper(LEVELS, WIDTH), tokens.clone().requires_grad_()
    weight = {k: v.double() for k, v in keeper.state_dict().items()}
    expected = torch.full((BATCH, CELLS), weight["evidence.bias"].item(), dtype=torch.float64)
    for i, level in enumerate(tokens.double()):
        departure = (level - level.mean(1, keepdim=True)).square().mean(-1)
        typical = departure.mean(1, keepdim=True) + 1e-3
        for j, value in ((i, (departure + 1e-6) / typical), (LEVELS + i, typical)):
            expected += weight["evidence.weight"][0, j] * value.log()
        hidden = F.gelu(level @ weight["hidden.weight"][i] + weight["hidden.bias"][i])
        expected += (hidden @ weight["score.weight"][i] + weight["score.bias"][i])[..., 0]
    torch.testing.assert_close(keeper.logits(x), (8 * expected).float(), atol=1e-4, rtol=1e-4)
    keeper(x).sum().backward()
    assert x.grad is None and keeper.evidence.weight.grad.any()


def test_keeper_prefers_what_departs_and_draws_from_the_global_generator(tokens):
    keeper = TokenKeeper(LEVELS, WIDTH).eval()
    flat = tokens[:, :, :1].expand(-1, -1, CELLS, -1).clone()
    assert keeper(flat).sum().item() == BATCH  # nothing departs from the mean: one cell each
    flat[:, :, 7] = -flat[:, :, 7]
    assert keeper(flat).nonzero()[:, 1].tolist() == [7, 7]
    keeper.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(torch.cat([keeper(tokens) for _ in range(8)]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_ratio_loss_alone_steers_the_share_of_kept_cells(tokens):
    keeper = TokenKeeper(LEVELS, WIDTH)
    optimizer = torch.optim.Adam(keeper.parameters(), lr=0.05)
    torch.manual_seed(3)
    images = F.layer_norm(torch.randn(LEVELS, 64, CELLS, WIDTH), (WIDTH,))
    for _ in range(60):
        optimizer.zero_grad()
        (keeper(images).mean() - 0.5).square().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.stack([keeper(images).mean() for _ in range(4)]).mean().item() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (4, 4)])
def test_the_feed_forward_by_products_is_the_one_by_convolution(grid):
    """Training on a CPU takes another road through the same layer: same values, same gradients."""
    torch.manual_seed(0)
    layer, cells = ConvFeedForward(4, 8, 12), grid[0] * grid[1]
    with torch.no_grad():
        layer.mix.weight.normal_()
        layer.mix.bias.normal_()
    x = torch.randn(4, 3, cells, 8, requires_grad=True)
    for kept in (Kept(grid), Kept(grid, (torch.rand(3, cells) > 0.4).float())):
        found = []
        for mode in (True, False):
            y = layer.train(mode)(x, kept)
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
