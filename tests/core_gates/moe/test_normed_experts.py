"""Stacked experts with batch normalization against layers of PyTorch, one expert at a time."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

from core_gates.moe.normed_experts import NormedExperts

EXPERTS, DIM, HIDDEN = 3, 4, (6, 5)


def experts_of(**options):
    torch.manual_seed(0)
    experts = NormedExperts(EXPERTS, DIM, HIDDEN, dtype=torch.float64, **options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def one_by_one(experts):
    """The same experts as modules of PyTorch."""
    networks = []
    for e in range(EXPERTS):
        layers, dim = [], DIM
        for weight, bias, norm in zip(experts.weights, experts.biases, experts.norms, strict=True):
            linear = nn.Linear(dim, weight.shape[1], dtype=torch.float64)
            linear.load_state_dict({"weight": weight[e], "bias": bias[e]})
            dim = weight.shape[1]
            batch_norm = nn.BatchNorm1d(dim, dtype=torch.float64)
            for name in ("weight", "bias"):
                part = getattr(norm, name)[e]
                getattr(batch_norm, name).data.copy_(part)
            layers += [linear, batch_norm, nn.SiLU()]
        networks.append(nn.Sequential(*layers))
    return networks


def rows(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, DIM), (7, EXPERTS, DIM)], ids=["shared", "own"])
def test_layers_of_pytorch_agree_in_training_and_after(shape):
    experts = experts_of()
    networks = one_by_one(experts)
    x = rows(*shape).requires_grad_()
    weights = rows(7, EXPERTS, HIDDEN[-1], seed=2)

    def by_hand(x):
        parts = x.unbind(1) if x.ndim == 3 else [x] * EXPERTS
        return torch.stack([net(part) for net, part in zip(networks, parts, strict=True)], 1)

    for _ in range(2):
        assert_close(experts(x), by_hand(x))
    found = torch.autograd.grad((experts(x) * weights).sum(), (x, *experts.weights))
    expected = torch.autograd.grad(
        (by_hand(x) * weights).sum(), (x, *(net[3 * j].weight for j in (0, 1) for net in networks))
    )
    assert_close(found[0], expected[0])
    for j in (0, 1):
        assert_close(found[1 + j], torch.stack(expected[1 + 3 * j : 4 + 3 * j]))
    experts.eval()
    for network in networks:
        network.eval()
    assert_close(experts(x), by_hand(x))


def on_rank():
    rank, experts = dist.get_rank(), experts_of()
    x = rows(6, DIM).split([4, 2])[rank].requires_grad_()
    y = experts(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad, dict(experts.named_buffers())


def test_two_ranks_equal_one_process(ranks):
    experts, x = experts_of(), rows(6, DIM).requires_grad_()
    y = experts(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    found = ranks(on_rank)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    assert_close(torch.cat([y for y, _, _ in found]), y.detach(), **tolerance)
    assert_close(torch.cat([grad for _, grad, _ in found]), grad, **tolerance)
    for _, _, buffers in found:
        assert_close(buffers, dict(experts.named_buffers()), **tolerance)


def test_no_unit_is_silent_and_experts_have_one_scale():
    """What the normalization is for: the same networks without it fail both."""
    experts = experts_of()
    with torch.no_grad():
        for e in range(EXPERTS):
            experts.weights[0][e] *= 100**e
        y = experts(rows(500, DIM))
        plain = torch.stack(
            [nn.Sequential(net[0], net[2], net[3])(rows(500, DIM)) for net in one_by_one(experts)]
        )
    spread = y.std((0, 2))
    assert spread.max() < 5 * spread.min()
    assert (y == 0).double().mean() == 0
    assert plain.std((1, 2)).max() > 100 * plain.std((1, 2)).min()


def test_faults_are_named():
    with pytest.raises(ValueError, match=r"must be at least 1, got \(3, 0, 6\)"):
        NormedExperts(3, 0, [6])
    with pytest.raises(ValueError, match="must be at least 1"):
        NormedExperts(3, 4, [])
    with pytest.raises(ValueError, match=r"must be \(N, 4\) or \(N, 3, 4\)"):
        experts_of()(rows(7, 2, DIM))
    with pytest.raises(ValueError, match="more than 1 row in training, got a batch of 1"):
        experts_of()(rows(1, DIM))


def test_meta_and_copies():
    meta = NormedExperts(2, 3, [4], device="meta")
    twin = meta.to_empty(device="cpu")
    twin.reset_parameters()
    for module in (twin, copy.deepcopy(twin)):
        assert module(torch.randn(5, 3)).shape == (5, 2, 4)
