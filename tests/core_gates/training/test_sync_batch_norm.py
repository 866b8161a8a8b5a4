"""Batch normalization on two ranks against PyTorch's on the joined batch."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.autograd import gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates.training.batch_norm import SyncBatchNorm

CASES = {
    "rows": {"shape": (3,), "sizes": [5, 2]},
    "images": {"shape": (3, 4, 2), "sizes": [1, 3]},
    "volumes": {"shape": (2, 3, 2, 2), "sizes": [2, 1], "eps": 0.1, "momentum": 0.5},
    "cumulative": {"shape": (3,), "sizes": [4, 3], "momentum": None},
    "empty rank": {"shape": (3, 2), "sizes": [0, 3]},
    "plain": {"shape": (3,), "sizes": [3, 3], "affine": False},
    "no statistics": {"shape": (3,), "sizes": [2, 4], "track_running_stats": False},
    "experts": {"shape": (4, 3, 2), "sizes": [2, 3], "num_experts": 4},
}


def norm_of(case, kind=SyncBatchNorm):
    options = {k: v for k, v in CASES[case].items() if k not in ("shape", "sizes")}
    shape, experts = CASES[case]["shape"], options.get("num_experts", 1)
    channels = shape[1] if "num_experts" in options else shape[0]
    if kind is not SyncBatchNorm:
        options.pop("num_experts", None)
        channels *= experts
    norm = kind(channels, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    return norm


def batches(case, step):
    shape, sizes = CASES[case]["shape"], CASES[case]["sizes"]
    x = torch.randn(
        sum(sizes), *shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64
    )
    return (100 + 3 * x).split(sizes)


def weights_of(case):
    return torch.cat(batches(case, 9)).split(CASES[case]["sizes"])


def train(norm, batches_of_step, weights):
    """Three batches in training, and one in evaluation."""
    results, gradients = [], []
    for x in batches_of_step[:3]:
        x = x.clone().requires_grad_()
        y = norm(x)
        (y.square() * weights).sum().backward()
        results.append(y.detach())
        gradients.append(x.grad)
    results.append(norm.eval()(batches_of_step[3]).detach())
    parameters = {name: p.grad for name, p in norm.named_parameters()}
    return {
        "results": results,
        "gradients": gradients,
        "parameters": parameters,
        "buffers": dict(norm.named_buffers()),
    }


def train_on_rank():
    rank, found = dist.get_rank(), {}
    for case in CASES:
        steps = [batches(case, step)[rank] for step in range(4)]
        found[case] = train(norm_of(case), steps, weights_of(case)[rank])
    return found


def special_on_rank():
    rank, norm = dist.get_rank(), norm_of("rows")
    x = batches("rows", 0)[rank].requires_grad_()
    checkpoint(norm, x, use_reentrant=False).sum().backward()
    tracked = {n: b.clone() for n, b in norm.named_buffers()}
    single = norm_of("rows")
    single(x[: 1 - rank])  # one value in all
    nothing = norm_of("rows")
    nothing(x[:0])
    near = SyncBatchNorm(3, affine=False)
    offset = (1e4 + batches("rows", 0)[rank] - 100).float()
    half = SyncBatchNorm(3)(batches("rows", 0)[rank].bfloat16())
    return {
        "checkpointed": tracked,
        "single": dict(single.named_buffers()),
        "nothing": dict(nothing.named_buffers()),
        "offset": near(offset),
        "half": half.detach(),
        "group": SyncBatchNorm(3, group=[dist.new_group([r]) for r in (0, 1)][rank])(
            x.float()
        ).detach(),
    }


def all_on_rank():
    return {"trained": train_on_rank(), "special": special_on_rank()}


@pytest.fixture(scope="module")
def on_ranks(ranks):
    return ranks(all_on_rank)


@pytest.fixture(scope="module")
def trained(on_ranks):
    return [found["trained"] for found in on_ranks]


@pytest.fixture(scope="module")
def special(on_ranks):
    return [found["special"] for found in on_ranks]


def joined(case):
    """PyTorch's batch normalization of the joined batches, stacked experts as more channels."""
    shape = CASES[case]["shape"]
    experts = "num_experts" in CASES[case]
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
    norm = norm_of(case, kind[len(shape) - experts])

    def flat(x):
        return x.flatten(1, 2) if experts else x

    steps = [flat(torch.cat(batches(case, step))) for step in range(4)]
    found = train(norm, steps, flat(torch.cat(weights_of(case))))
    for name in ("results", "gradients"):
        found[name] = [t.view(-1, *shape) for t in found[name]]
    return found


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(trained, case):
    first, second = (found[case] for found in trained)
    expected = joined(case)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    if case == "no statistics":  # evaluation takes those of the batch as well
        assert not expected["buffers"]
    for name in ("results", "gradients"):
        for a, b, whole in zip(first[name], second[name], expected[name], strict=True):
            assert_close(torch.cat([a, b]), whole, **tolerance)
    for found in (first, second):
        assert_close(found["buffers"], expected["buffers"], **tolerance)
    for name, gradient in expected["parameters"].items():
        assert_close(first["parameters"][name] + second["parameters"][name], gradient, **tolerance)


def test_checkpointing_counts_a_batch_once(special):
    norm = norm_of("rows", nn.BatchNorm1d)
    norm(torch.cat(batches("rows", 0)))
    for found in special:
        assert_close(found["checkpointed"], dict(norm.named_buffers()))


def test_one_value_in_all_stays_finite_and_nothing_changes_nothing(special):
    for found in special:
        assert found["single"]["num_batches_tracked"] == 1
        assert_close(found["single"]["running_mean"], 0.1 * batches("rows", 0)[0][0])
        assert_close(found["single"]["running_var"], torch.full((3,), 0.9).double())
        assert_close(found["nothing"], dict(norm_of("rows").named_buffers()), rtol=0, atol=0)


def test_a_large_mean_costs_few_digits(special):
    exact = torch.cat([(1e4 + x - 100).float() for x in batches("rows", 0)]).double()
    expected = nn.BatchNorm1d(3, affine=False, dtype=torch.float64)(exact).float()
    assert_close(torch.cat([s["offset"] for s in special]), expected, rtol=0, atol=1e-3)


def test_half_precision_is_normalized_in_float32(special):
    exact = torch.cat(batches("rows", 0)).bfloat16().float()
    assert_close(torch.cat([s["half"] for s in special]), nn.BatchNorm1d(3)(exact).bfloat16())


def test_a_group_of_one_is_ordinary(special):
    for found, x in zip(special, batches("rows", 0), strict=True):
        assert_close(found["group"], nn.BatchNorm1d(3)(x.float()).detach())


def test_convert_takes_parameters_and_buffers_over():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3, momentum=None)))
    model[1].eval()
    twin, x = copy.deepcopy(model), torch.randn(4, 2, 3, 3)
    parameters = dict(model.named_parameters())
    assert SyncBatchNorm.convert(model) is model
    norm = model[1][0]
    assert isinstance(norm, SyncBatchNorm)
    assert (norm.momentum, norm.training) == (None, False)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(twin.state_dict())
    for m in (model, twin):
        m.train()(x)
    assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    assert_close(model.eval()(x), twin.eval()(x))
    assert isinstance(SyncBatchNorm.convert(nn.BatchNorm1d(3)), SyncBatchNorm)
    assert SyncBatchNorm.convert(model)[1][0] is norm


def test_second_derivatives():
    norm = norm_of("images")
    x = torch.cat(batches("images", 0))[:2, :, :2].clone().requires_grad_()
    assert gradgradcheck(lambda x: norm._together(x, False), x)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (3,), r"x \(3,\) must be \(N, C, ...\) with 3 channels"),
        ({}, (2, 4), r"x \(2, 4\) must be \(N, C, ...\) with 3 channels"),
        ({"num_experts": 2}, (2, 3), r"must be \(N, E, C, ...\) with 2 experts"),
        ({"num_experts": 2}, (2, 2, 4), "with 6 channels"),
        ({}, (1, 3), "more than 1 value per channel"),
    ],
)
def test_shapes_are_checked(refuses, options, shape, message):
    refuses(ValueError, (message, lambda: SyncBatchNorm(3, **options)(torch.zeros(shape))))
