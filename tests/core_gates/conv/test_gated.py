import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.attention.window import DropPath
from core_gates.conv import GatedConv, PartialConv, SameConv, same_conv
from tests.core_gates.drawn import randn


def plain_conv(x, weight, bias, circular):
    *outer, width = (extent // 2 for extent in weight.shape[2:])
    if circular:
        x, width = torch.cat((x[..., x.shape[-1] - width :], x, x[..., :width]), -1), 0
    conv = F.conv3d if x.ndim == 5 else F.conv2d
    return conv(x.contiguous(), weight, bias, padding=(*outer, width))


@settings(max_examples=40)
@given(
    depth=st.integers(1, 6),
    kernel=st.tuples(*[st.sampled_from((1, 3, 5))] * 3),
    circular=st.booleans(),
    channels_last=st.booleans(),
)
def test_every_route_is_the_definition_with_its_gradients(depth, kernel, circular, channels_last):
    x, weight, bias = randn(2, 3, depth, 4, 6), randn(5, 3, *kernel, seed=1), randn(5, seed=2)
    cotangent = randn(2, 5, depth, 4, 6, seed=3)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    results = []
    for function in (plain_conv, lambda *inputs: same_conv(*inputs[:3], circular=inputs[3])):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves, circular)
        y.backward(cotangent)
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_two_dimensional_volume_is_a_volume_of_one_level():
    x, weight = randn(2, 3, 4, 6), randn(5, 3, 3, 5, seed=1)
    flat = same_conv(x, weight, circular=True)
    assert_close(flat, same_conv(x[:, :, None], weight[:, :, None], circular=True)[:, :, 0])


def test_same_conv_starts_like_pytorch():
    ours = torch.cat([SameConv(8, 16, 3).weight.detach().flatten() for _ in range(4)])
    theirs = torch.nn.Conv3d(8, 16, 3).weight.detach()
    assert ours.abs().max() <= theirs.abs().max() * 1.01
    assert abs(ours.std() / theirs.std() - 1) < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2}, "odd extents"),
        ({"kernel_size": (3, 3)}, "needs 3 odd extents"),
        ({"kernel_size": 3, "ndim": 4}, "ndim must be 2 or 3"),
    ],
)
def test_impossible_kernels_are_refused(refuses, arguments, message):
    refuses(ValueError, (message, lambda: SameConv(2, 2, **arguments)))


def test_misfits_are_refused(refuses):
    refuses(
        ValueError,
        (
            "reaches around a circle of 2 columns",
            lambda: SameConv(1, 1, (1, 1, 7), circular=True)(torch.zeros(1, 1, 1, 4, 2)),
        ),
        (r"expected \(B, 2\)", lambda: SameConv(2, 2, 3)(torch.zeros(1, 3, 2, 4, 4))),
        (
            "must have one shape",
            lambda: GatedConv(2, 2, 3)(
                *[torch.zeros(1, 2, 2, 4, 4)] * 2, torch.zeros(1, 2, 2, 4, 5)
            ),
        ),
    )


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_conv_is_its_formula(ndim, gated):
    module = GatedConv(2, 3, 3, ndim=ndim, gated=gated, circular=True).double()
    x, o, g = (randn(2, 2, *(3, 4, 6)[3 - ndim :], seed=seed) for seed in range(3))
    kx, ko, kg = module.conv_x(x), module.conv_o(o), module.conv_g(g)
    observed = F.silu(ko) * kg.sigmoid() if gated else F.silu(ko + kg)
    assert_close(module(x, o, g), (F.silu(kx), observed, kg.sigmoid()))
    assert_close(module.gate_values(x, o, g), kg.sigmoid())


def test_an_open_gate_passes_the_observations_and_does_not_read_its_stream():
    x, o, g = (randn(1, 2, 3, 4, 6, seed=seed) for seed in range(3))
    module = GatedConv(2, 3, 3, open_gate=True).double()
    expected = (
        F.silu(module.conv_x(x)),
        F.silu(module.conv_o(o)),
        torch.ones(1, 3, 3, 4, 6).double(),
    )
    assert_close((module(x, o, g), module(x, o, -g)), (expected, expected))
    assert torch.equal(module.gate_values(x, o, g), expected[2])


def test_gated_conv_runs_in_bfloat16_and_traces_whole():
    module = GatedConv(2, 3, (3, 3, 5), circular=True)
    streams = [randn(1, 2, 4, 4, 6, seed=seed).float() for seed in range(3)]
    expected = module(*streams)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(*streams)
    assert_close([y.float() for y in rough], list(expected), rtol=0.05, atol=0.05)
    traced = torch.compile(module, backend="eager", fullgraph=True)
    assert_close(traced(*streams), expected)


@pytest.mark.fault("46 C1")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (6, 4, 6)], ids=["plane", "folded", "levels"])
def test_autocast_gives_one_dtype_in_every_form(shape, bias):
    x, weight = randn(2, 3, *shape).float(), randn(4, 3, *[3] * len(shape)).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = same_conv(x, weight, torch.ones(4) if bias else None)
    assert found.dtype == torch.bfloat16
    exact = same_conv(x, weight, torch.ones(4) if bias else None)
    assert_close(found.float(), exact, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("mask_channels", [1, 2])
def test_partial_conv_of_complete_data_is_a_convolution_inside(mask_channels):
    module, o = PartialConv(2, 3, 3, ndim=2).double(), randn(1, 2, 6, 7)
    result, seen = module(o, torch.ones(1, mask_channels, 6, 7))
    assert_close(result[..., 1:-1, 1:-1], module.conv(o)[..., 1:-1, 1:-1])
    assert torch.equal(seen, torch.ones(1, 1, 6, 7).double())


def test_partial_conv_of_constants_does_not_feel_holes():
    module = PartialConv(1, 1, 3, ndim=2).double()
    with torch.no_grad():
        module.conv.weight.fill_(1 / 9)
        module.conv.bias.fill_(0.25)
    mask = (randn(1, 1, 8, 8) > 0.8).double()
    result, seen = module(torch.full((1, 1, 8, 8), 3.0).double(), mask)
    expected_seen = F.max_pool2d(mask, 3, stride=1, padding=1)
    assert 0 < expected_seen.mean() < 1
    assert torch.equal(seen, expected_seen)
    assert_close(result, 3.25 * expected_seen)


@pytest.mark.fault("core A17")
@pytest.mark.parametrize("mask_channels", [1, 2])
@pytest.mark.parametrize("hidden", [float("nan"), float("inf")])
def test_partial_conv_ignores_whatever_lies_under_its_mask(hidden, mask_channels):
    module, o = PartialConv(2, 3, 3, ndim=2).double(), randn(1, 2, 5, 5)
    mask = torch.ones(1, mask_channels, 5, 5)
    mask[:, :, 2, 2] = 0
    results = []
    for value in (0.0, hidden):
        given = o.clone()
        given[:, :, 2, 2] = value
        given.requires_grad_()
        module.zero_grad()
        result, seen = module(given, mask)
        result.square().sum().backward()
        results.append([result, seen, given.grad, *(p.grad.clone() for p in module.parameters())])
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[0][2].any()


def test_drop_path_drops_whole_samples_and_keeps_the_mean(refuses):
    torch.manual_seed(0)
    drop = DropPath(0.25)
    y = drop(torch.ones(4000, 2, 3))
    per_sample = y.flatten(1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert_close(per_sample.unique(), torch.tensor([0, 4 / 3]))
    assert abs(y.mean() - 1) < 0.03
    assert torch.equal(drop.eval()(y), y)
    refuses(ValueError, (r"\[0, 1\)", lambda: DropPath(1.0)))
