"""Stacked experts with batch normalization against layers of PyTorch, one expert at a time."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

from core_gates import NormedExperts, kernels
from tests.core_gates.drawn import filled, randn

EXPERTS, DIM, HIDDEN = 3, 4, (6, 5)


def experts_of(**options):
    torch.manual_seed(0)
    return filled(NormedExperts(EXPERTS, DIM, HIDDEN, dtype=torch.float64, **options))


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
    return 3 + 2 * randn(*shape, seed=seed)


@pytest.mark.fault("46 C1")
@pytest.mark.parametrize("norm", ["batch", None])
def test_autocast_gives_one_dtype_with_norms_and_without(norm):
    experts, x = experts_of(norm=norm).float(), rows(7, DIM).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in experts.parameters()} == {torch.float32}


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


COUNTS, RUNS = (2, 0, 1, 3), (1, 1, 2, 1)  # the third group is applied to two inputs


def grouped(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return filled(NormedExperts(COUNTS, DIM, HIDDEN, runs=RUNS, dtype=dtype, **options))


def by_expert(experts, x):
    """Every expert by layers of PyTorch, on the rows of all inputs of its group, one below."""
    groups = [g for g, count in enumerate(COUNTS) for _ in range(count)]
    starts = [sum(RUNS[:g]) for g in range(len(RUNS))]
    found = []
    for e, g in enumerate(groups):
        y = x[:, starts[g] : starts[g] + RUNS[g]].transpose(0, 1).flatten(0, 1)
        for j, (weight, bias) in enumerate(zip(experts.weights, experts.biases, strict=True)):
            y = y @ weight[e].mT + bias[e]
            if experts.norms:
                norm = experts.norms[j]
                state = norm.running_mean[e].clone(), norm.running_var[e].clone()
                affine = norm.weight[e], norm.bias[e]
                y = nn.functional.batch_norm(y, *state, *affine, experts.training)
            y = nn.functional.silu(y)
        found += y.view(RUNS[g], len(x), -1).unbind()
    return torch.stack(found, 1)


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("training", [True, False])
def test_groups_of_several_sizes_and_inputs(training, norm):
    experts, x = grouped(norm=norm).train(training), rows(7, 5, DIM).requires_grad_()
    assert experts.expert_of_output == (0, 1, 2, 2, 3, 4, 5)
    expected, found = by_expert(experts, x), experts(x)
    assert_close(found, expected)
    weights = rows(*found.shape, seed=2)
    tensors = (x, *experts.weights)
    actual, wanted = (torch.autograd.grad((y * weights).sum(), tensors) for y in (found, expected))
    assert_close(actual, wanted)
    assert not actual[0][:, 1].any()  # the group without experts
    for parameter in experts.parameters():
        assert len(parameter) == experts.num_experts == 6


def test_running_statistics_are_those_of_all_inputs_of_an_expert():
    experts, x = grouped(), rows(7, 5, DIM)
    experts(x)
    first = x[:, 2:4].flatten(0, 1) @ experts.weights[0][2].mT + experts.biases[0][2]
    assert_close(experts.norms[0].running_mean[2], 0.1 * first.mean(0))
    assert_close(experts.norms[0].running_var[2], 0.9 + 0.1 * first.var(0))
    mean = experts.norms[0].running_mean.clone()
    experts.eval()(x)
    assert torch.equal(experts.norms[0].running_mean, mean)


@pytest.mark.parametrize("mode", ["reference", "cpp"])
@pytest.mark.parametrize("norm", ["batch", None])
def test_float32_is_computed_another_way_with_the_same_results(norm, mode, cpp):
    exact, x = grouped(norm=norm), rows(40, 5, DIM)
    mine = grouped(torch.float32, norm=norm)
    mine.load_state_dict(exact.state_dict())
    weights = rows(40, 7, HIDDEN[-1], seed=2)
    results = []
    for experts, dtype in ((exact, torch.float64), (mine, torch.float32)):
        v = x.to(dtype).requires_grad_()
        with kernels(mode):
            y = experts(v)
        tensors = (v, *experts.parameters())
        slopes = torch.autograd.grad((y * weights.to(dtype)).sum(), tensors)
        results.append([y, *slopes, *experts.buffers()])
    for one, other in zip(*results, strict=True):
        scale = max(one.abs().max().item(), 1.0)
        assert_close(other.double(), one.double(), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("shape", [(9, DIM), (9, 3, DIM)], ids=["shared", "own"])
def test_second_derivatives_of_linear_layers(shape):
    results = []
    for dtype in (torch.float64, torch.float32):
        experts = NormedExperts(3, DIM, [5], norm=None, dtype=dtype)
        for parameter in experts.parameters():
            parameter.data.copy_(rows(*parameter.shape) / 4)
        v = rows(*shape).to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(experts(v).square().sum(), v, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), (v, experts.weights[0])))
    for one, other in zip(*results, strict=True):
        assert_close(other.double(), one, rtol=1e-3, atol=1e-3)


def test_folded_experts_are_those_of_evaluation():
    experts, x = grouped(), rows(9, 5, DIM)
    for _ in range(3):
        experts(rows(9, 5, DIM, seed=4))
    folded = experts.fold()
    assert not folded.norms
    assert not folded.training
    assert_close(folded(x), experts.eval()(x))
    assert not torch.allclose(folded.weights[0], experts.weights[0])
    plain = grouped(norm=None)
    assert_close(plain.fold()(x), plain(x))


def test_faults_are_named(refuses):
    refuses(
        ValueError,
        (r"must be at least 1, got \(3, 0, 6\)", lambda: NormedExperts(3, 0, [6])),
        ("must be at least 1", lambda: NormedExperts(3, 4, [])),
        (r"must be \(N, 4\) or \(N, 3, 4\)", lambda: experts_of()(rows(7, 2, DIM))),
        (
            "runs must be one number for each of 2 groups",
            lambda: NormedExperts([1, 2], DIM, [3], runs=[1]),
        ),
        (
            "norm is 'layer'; choose one of batch, none",
            lambda: NormedExperts(2, DIM, [3], norm="layer"),
        ),
        (r"x \(7, 4\) must be \(N, 5, 4\)", lambda: grouped()(rows(7, DIM))),
        ("more than 1 row in training, got a batch of 1", lambda: experts_of()(rows(1, DIM))),
    )


def test_without_momentum_statistics_are_averages_of_all_batches():
    experts = grouped(momentum=None)
    batches = [rows(7, 5, DIM, seed=s) for s in range(3)]
    for x in batches:
        experts(x)
    first = [x[:, 0] @ experts.weights[0][1].mT + experts.biases[0][1] for x in batches]
    expected = torch.stack([y.mean(0) for y in first]).mean(0)
    assert_close(experts.norms[0].running_mean[1], expected)
    assert experts.norms[0].num_batches_tracked == 3
