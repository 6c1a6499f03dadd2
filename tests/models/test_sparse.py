"""SPARSE: the codes, what is stored of them, their auxiliary losses and the bookkeeping of dead codes."""

import pytest
import torch

from hamlet.models import create_model
from hamlet.models.sparse import SparseAutoencoder

CONFIGURATIONS = ["sparse_resnet18", "sparse_mobilenetv3"]


def autoencoder(**options) -> SparseAutoencoder:
    torch.manual_seed(0)
    return SparseAutoencoder(**{"width": 8, "codes": 40, "k": 4, "dead_after": 10, **options})


def test_top_keeps_the_k_largest_where_positive():
    u = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-4.0, -1.0, 1.0, -2.0], [-1.0, -2.0, -3.0, -4.0]])
    expected = torch.tensor([[3.0, 0.0, 0.0, 5.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(SparseAutoencoder.top(u, 2), expected)
    assert torch.equal(SparseAutoencoder.top(u, 99), u.relu())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_at_most_k_codes_are_not_zero_and_none_is_negative(name, fresh, images):
    model = fresh(name)
    for mode in (True, False):
        with torch.no_grad():
            out = model.train(mode)(images)
        assert out.shape == (3, 8192)
        limit = model.options["start_k"] if mode else model.k  # training starts with more
        assert (out >= 0).all() and ((out > 0).sum(dim=1) <= limit).all() and (out > 0).any(dim=1).all()
        torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_training_comes_down_from_start_k_to_k_geometrically_and_stays_there():
    layer = autoencoder(k=4, start_k=32, anneal_images=90)
    kept = []
    for _ in range(4):
        kept.append(layer.training_k)
        layer.record(torch.rand(30, 40))
    assert kept == [32, 16, 8, 4] and layer.training_k == 4
    assert autoencoder(k=4, start_k=99).training_k == 4, "without annealing k holds from the first step"
    assert autoencoder(k=4, start_k=99, anneal_images=9).training_k == 40, "never more than there are codes"


def test_the_wider_sum_is_scaled_so_that_annealing_starts_near_the_target():
    torch.manual_seed(0)
    layer = SparseAutoencoder(width=64, codes=512, k=16, dead_after=10, start_k=256, anneal_images=100)
    e = torch.randn(32, 64)
    u = layer.preactivation(e)
    loss = layer.losses(e, u, layer.top(u, layer.training_k))["reconstruction"]
    assert loss < 1.2, "a decoder that started unscaled would be off by many times the variance"


def test_k_sets_the_number_of_codes_and_the_bytes_stored(images):
    model = create_model("sparse", backbone="mobilenetv3_small_050", width=64, codes=1024, k=256).eval()
    with torch.no_grad():
        assert ((model(images) > 0).sum(dim=1) == 256).all()
    assert model.descriptor_bytes == 512 * 4, "k = 256 costs what a dense 512-d float32 descriptor costs"


def test_training_keeps_as_many_codes_as_the_images_seen_call_for_and_evaluation_k(images):
    options = {"width": 64, "codes": 512, "k": 8, "start_k": 128, "anneal_images": 6}
    model = create_model("sparse", backbone="mobilenetv3_small_050", **options)
    centred = []
    model.autoencoder.encoder.register_forward_pre_hook(lambda _, given: centred.append(given[0].detach()))
    counts = []
    for mode in (True, True, True, False):
        with torch.no_grad():
            counts.append(int((model.train(mode)(images) > 0).sum(dim=1).max()))
    assert counts == [128, 32, 8, 8]  # after none, three and six of six images
    assert model.autoencoder.seen == 9 and set(model.autoencoder.silent.tolist()) <= {0, 3, 6, 9}
    e = centred[0] + model.autoencoder.shift
    torch.testing.assert_close(e.mean(dim=0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(e.square().mean(), torch.tensor(1.0), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_sparse_codes_hold_the_whole_descriptor(name, evaluated, images):
    model = evaluated(name)
    indices, values = model.sparse_codes(images)
    assert indices.shape == values.shape == (3, model.k) and indices.dtype == torch.int64
    assert (values[:, :-1] >= values[:, 1:]).all()
    with torch.no_grad():
        assert torch.equal(torch.zeros(3, 8192).scatter(1, indices, values), model(images))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_code_without_any_positive_value_gives_no_nan(mode, images):
    model = create_model("sparse", backbone="mobilenetv3_small_050", width=64, codes=256, k=8).train(mode)
    with torch.no_grad():
        model.autoencoder.encoder.bias.fill_(-1e4)
    out, losses = model(images, auxiliary=True)
    assert not out.any()
    (out.sum() + sum(losses.values())).backward() if mode else out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_start_is_tied_with_unit_directions():
    layer = autoencoder()
    torch.testing.assert_close(layer.encoder.weight.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(layer.decoder.weight, layer.encoder.weight.T)
    assert layer.decoder.weight.data_ptr() != layer.encoder.weight.data_ptr()


def test_encoding_and_decoding_follow_the_equations():
    layer = autoencoder()
    with torch.no_grad():
        layer.shift.normal_()
        layer.encoder.bias.normal_()
    e = torch.randn(5, 8)
    u = (layer.encoder.weight @ (e - layer.shift).T).T + layer.encoder.bias
    torch.testing.assert_close(layer.preactivation(e), u)
    z = layer.top(u, 4)
    torch.testing.assert_close(layer.decode(z), (layer.decoder.weight @ z.T).T + layer.shift)


def test_reconstruction_is_the_error_at_k_and_an_eighth_at_4k_over_the_variance():
    layer = autoencoder()
    e = torch.randn(6, 8)
    u = layer.preactivation(e)
    z = layer.top(u, 4)
    sixteen = torch.where(u >= u.sort(dim=1, descending=True).values[:, 15:16], u, 0).relu()
    variance = ((e - e.mean(dim=0)) ** 2).mean()
    expected = ((e - layer.decode(z)) ** 2).mean() + ((e - layer.decode(sixteen)) ** 2).mean() / 8
    torch.testing.assert_close(layer.losses(e, u, z)["reconstruction"], expected / variance)
    scaled = layer.losses(e, u, z)["reconstruction"]
    layer.shift.data *= 10
    doubled = layer.losses(10 * e, 10 * u, 10 * z)["reconstruction"]
    torch.testing.assert_close(scaled, doubled, msg="the loss must not depend on the scale of e")


def test_what_is_to_be_reconstructed_is_not_moved_towards_its_reconstruction():
    layer, e = autoencoder(), torch.randn(6, 8, requires_grad=True)
    u = layer.preactivation(e.detach())
    layer.losses(e, u, layer.top(u, 4))["reconstruction"].backward()
    assert e.grad is None and layer.decoder.weight.grad.any()


def test_the_flops_term_is_least_when_all_codes_are_used_alike():
    layer = autoencoder(codes=4, k=1)
    e = torch.randn(4, 8)
    flops = [layer.losses(e, e @ layer.encoder.weight.T, z)["flops"] for z in (torch.eye(4), 3 * torch.eye(4))]
    # unit codes, each used by one image of four: 4 codes times (1/4)^2, at any scale of z
    torch.testing.assert_close(torch.stack(flops), torch.full((2,), 0.25))
    collapsed = torch.eye(4)[[0, 0, 0, 0]]
    torch.testing.assert_close(layer.losses(e, e @ layer.encoder.weight.T, collapsed)["flops"], torch.tensor(1.0))


def test_silence_is_counted_in_images_and_ends_when_a_code_fires():
    layer = autoencoder(codes=3)
    layer.record(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert layer.silent.tolist() == [0, 2, 2]
    layer.record(torch.tensor([[0.0, 2.0, 0.0]] * 5))
    assert layer.silent.tolist() == [5, 0, 7]
    assert "silent" in layer.state_dict()


def test_silence_is_counted_over_all_processes(monkeypatch):
    def other_process_fired_code_2(fired: torch.Tensor, operation) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        fired[2] = 1

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", other_process_fired_code_2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    layer = autoencoder(codes=3)
    layer.record(torch.tensor([[1.0, 0.0, 0.0]] * 4))
    assert layer.silent.tolist() == [0, 8, 0]


def test_without_dead_codes_the_dead_term_is_zero_and_passes_no_gradient():
    layer = autoencoder()
    e = torch.randn(6, 8, requires_grad=True)
    u = layer.preactivation(e)
    loss = layer.losses(e, u, layer.top(u, 4))["dead_codes"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters()) and not e.grad.any()


def test_the_dead_term_moves_dead_codes_alone():
    layer = autoencoder()
    layer.silent[[3, 17]] = 11  # dead_after is 10
    layer.silent[5] = 10
    e = torch.randn(64, 8)
    u = layer.preactivation(e)
    layer.losses(e, u, layer.top(u, 4))["dead_codes"].backward()
    assert layer.encoder.weight.grad.any(dim=1).nonzero().flatten().tolist() == [3, 17]
    assert layer.decoder.weight.grad.any(dim=0).nonzero().flatten().tolist() == [3, 17]


def test_training_the_auxiliary_losses_lowers_the_reconstruction_error_and_revives_dead_codes():
    layer = autoencoder(codes=64, k=4, dead_after=200)
    with torch.no_grad():
        layer.encoder.bias[:16] = -2.0  # these lose against the others at first
    torch.manual_seed(1)
    basis = torch.randn(12, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    errors, dead = [], []
    for _ in range(300):
        e = torch.rand(32, 12).pow(4) @ basis
        u = layer.preactivation(e)
        z = layer.top(u, 4)
        losses = layer.losses(e, u, z)
        layer.record(z)
        optimizer.zero_grad()
        (losses["reconstruction"] + losses["dead_codes"]).backward()
        optimizer.step()
        errors.append(losses["reconstruction"].item())
        dead.append(int((layer.silent > layer.dead_after).sum()))
    assert sum(errors[-20:]) < 0.4 * sum(errors[:20])
    assert max(dead) > 0 and dead[-1] < max(dead)


def test_losses_are_weighted_and_given_in_training_alone(fresh, images):
    model = fresh("sparse_mobilenetv3").train()
    torch.manual_seed(0)
    _, losses = model(images, auxiliary=True)
    assert list(losses) == ["reconstruction", "dead_codes", "flops"]
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    model.weights = {name: 2 * weight for name, weight in model.weights.items()}
    model.autoencoder.seen.zero_()  # the number of codes that are kept follows the images seen
    _, doubled = model(images, auxiliary=True)
    for name, loss in losses.items():
        torch.testing.assert_close(doubled[name], 2 * loss)
    assert model.eval()(images, auxiliary=True)[1] == {}
