"""Normalization and activation of stacked experts, in every way that it is computed."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.norm_act import native, reference, slices
from core_gates.ops.norm_act.op import norm_act

SIZES = [(1, 2, 1), (3, 5, 17), (4, 37, 20)]  # outputs, rows, channels
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["silu", "relu", "gelu", "gelu_tanh", "identity"]
OP = torch.ops.core_gates.norm_act.default
EPS = 1e-5


def experts_of(outputs):
    """Two outputs of the last expert, if there are so many."""
    return [*range(outputs - 1), outputs - 2] if outputs > 1 else [0]


def arguments(sizes, dtype=torch.float32, by_batch=True, activation="silu"):
    """x, offset, weight, bias, mean, variance, then the options."""
    outputs, _, channels = sizes
    experts = experts_of(outputs)
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    vectors = [normal(max(experts) + 1, channels) for _ in range(4)]
    tensors = [3 * normal(*sizes) + 5, *vectors, vectors[0].square() + 0.5]
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    return *tensors, experts, activation, EPS, by_batch


def gradient(sizes, dtype=torch.float32):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(dtype)


def call(x, offset, weight, bias, mean, variance, experts, activation, eps, by_batch):
    statistics = None if by_batch else (mean, variance)
    options = {"experts": experts, "activation": activation, "eps": eps}
    return norm_act(x, offset, weight, bias, statistics, **options)


CASES = [  # all sizes in float32, one in half precision; the rest once a day
    pytest.param(
        (sizes, dtype, by_batch),
        marks=[pytest.mark.slow] * (dtype != torch.float32 and sizes != SIZES[1]),
    )
    for sizes, dtype, by_batch in product(SIZES, DTYPES, [True, False])
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture
def kernel(kernel_device, monkeypatch):
    """The kernels, with tiles so small that a test has several."""
    from core_gates.ops.norm_act import kernel

    if kernel_device == "cpu":
        monkeypatch.setattr(kernel, "ROWS", 16)
        monkeypatch.setattr(kernel, "CHANNELS", 16)
        monkeypatch.setattr(kernel, "NUM_PROGRAMS", 2)
    return kernel


@pytest.mark.parametrize("training", [True, False])
def test_it_is_batch_normalization_and_swish_of_every_expert(training):
    x, offset, weight, bias, mean, variance, experts, *_ = arguments((4, 9, 5), torch.float64)
    statistics = None if training else (mean, variance)
    y, used_mean, used_variance = norm_act(x, offset, weight, bias, statistics, experts=experts)
    for e in range(3):
        norm = nn.BatchNorm1d(5, momentum=1.0, dtype=torch.float64).train(training)
        state = {"weight": weight[e], "bias": bias[e]}
        state |= {"running_mean": mean[e], "running_var": variance[e]}
        norm.load_state_dict(state, strict=False)
        rows = (x + offset[experts].unsqueeze(1))[[o for o, i in enumerate(experts) if i == e]]
        expected = F.silu(norm(rows.flatten(0, 1))).view(rows.shape)
        assert_close(y[[o for o, i in enumerate(experts) if i == e]], expected)
        if training:
            number = rows.shape[0] * rows.shape[1]
            assert_close(used_mean[e], norm.running_mean)
            assert_close(used_variance[e] * number / (number - 1), norm.running_var)
        else:
            assert_close((used_mean[e], used_variance[e]), (mean[e].detach(), variance[e].detach()))


def test_an_offset_moves_the_mean_of_a_batch_and_nothing_else():
    x, offset, weight, bias, *_ = arguments((3, 8, 5), torch.float64)
    experts = [0, 1, 1]
    y, mean, variance = norm_act(x, offset, weight, bias, experts=experts)
    plain, level, spread = norm_act(x, offset * 0, weight, bias, experts=experts)
    assert_close((y, mean, variance), (plain, level + offset.detach(), spread))
    (slope,) = torch.autograd.grad(y.square().sum(), offset)
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, r"x \(3, 4\) must be \(outputs, rows, channels\)"),
        ({"offset": torch.zeros(3, 4)}, r"offset \(3, 4\) must have the shape \(3, 5\)"),
        ({"experts": [0, 1]}, "must name one of 3, each at least once, for each of 3 outputs"),
        ({"experts": [0, 2, 1]}, "must ascend"),
        ({"x": torch.zeros(3, 0, 5)}, "no row whose mean"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_arguments_are_checked(refuses, change, message):
    table = torch.ones(3, 5)
    named = {"x": torch.ones(3, 4, 5), "offset": table, "weight": table, "bias": table} | change
    refuses(ValueError, (message, lambda: norm_act(**named)))


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "identity"])
@pytest.mark.parametrize("function", [call, OP], ids=["function", "operator"])
def test_gradients(function, activation, by_batch):
    *tensors, experts, _, eps, _ = arguments((3, 4, 2), torch.float64)
    options = experts, activation, eps, by_batch
    tensors = tensors[:4] if by_batch else tensors
    others = [] if by_batch else tensors[4:]
    fixed = [torch.ones(2, 2, dtype=torch.float64)] * 2 if by_batch else []
    assert gradcheck(
        lambda *t: function(*t, *fixed, *options)[0], (*tensors[:4], *others), atol=1e-6
    )


@pytest.mark.parametrize("by_batch", [True, False])
def test_second_derivatives(by_batch):
    x, *tensors, experts, activation, eps, _ = arguments((3, 4, 2), torch.float64)
    assert gradgradcheck(
        lambda *t: call(*t, *tensors[3:], experts, activation, eps, by_batch)[0],
        (x, *tensors[:3]),
        atol=1e-4,
    )


@pytest.mark.parametrize("mode", ["reference", "cpp"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("sizes", [(1, 2, 1), (4, 300, 70), (3, 0, 5)], ids=str)
def test_float32_on_the_cpu_matches_the_definition(sizes, by_batch, activation, mode, cpp):
    if by_batch and sizes[1] == 0:
        pytest.skip("there is no batch")
    mine = arguments(sizes, by_batch=by_batch, activation=activation)
    exact = [t.detach().double().requires_grad_() for t in mine[:6]]
    with kernels(mode):
        found = call(*mine)
    expected = call(*exact, *mine[6:])
    grad, inputs = gradient(sizes), 4 if by_batch else 6
    actual = torch.autograd.grad(found[0], mine[:inputs], grad)
    wanted = torch.autograd.grad(expected[0], exact[:inputs], grad.double())
    for one, other in zip((*found, *actual), (*expected, *wanted), strict=True):
        scale = max(other.abs().max().item(), 1.0) if other.numel() else 1.0
        assert_close(one.double(), other, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("by_batch", [True, False])
def test_second_derivatives_in_float32_are_those_of_the_definition(by_batch):
    mine = arguments((3, 6, 4), by_batch=by_batch)
    exact = [t.detach().double().requires_grad_() for t in mine[:6]]
    results = []
    for tensors in (mine[:6], exact):
        y = call(*tensors, *mine[6:])[0]
        (slope,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), (tensors[0], tensors[2])))
    for one, other in zip(*results, strict=True):
        assert other.abs().max() > 0.1
        assert_close(one.double(), other, rtol=2e-3, atol=2e-3)


@pytest.mark.ends("shapes are registered alike")
def test_registration(case):
    sizes, dtype, by_batch = case
    opcheck(OP, arguments(sizes, dtype, by_batch))


def test_kernel_matches_the_definition(case, kernel, kernel_device, poisoned_empty):
    sizes, dtype, by_batch = case
    *tensors, experts, activation, eps, _ = arguments(sizes, dtype, by_batch)
    tensors = [t.detach().to(kernel_device) for t in tensors]
    before = [t.clone() for t in tensors]
    options = experts, activation, eps, by_batch
    found, expected = (f.forward(*tensors, *options) for f in (kernel, reference))
    assert_close(found[0], expected[0])
    assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-5)
    grad = gradient(sizes, dtype).to(kernel_device)
    results = [f.backward(grad, *tensors[:4], *found[1:], *options) for f in (kernel, reference)]
    for one, other in zip(*results, strict=True):
        scale = max(other.float().abs().max().item(), 1.0)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert_close(one, other, rtol=0, atol=tolerance * scale)
    assert_close(tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_has_every_activation(activation, kernel, kernel_device):
    *tensors, experts, _, eps, by_batch = arguments((3, 40, 20))
    tensors = [t.detach().to(kernel_device) for t in tensors]
    tensors[2] = tensors[2] * 0.3  # no warning of an overflow in the interpreter
    options = activation, eps, by_batch
    found, expected = (f.forward(*tensors, experts, *options) for f in (kernel, reference))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grad = gradient((3, 40, 20)).to(kernel_device)
    results = [
        f.backward(grad, *tensors[:4], *found[1:], experts, *options) for f in (kernel, reference)
    ]
    assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [slices, native], ids=["slices", "C++"])
def test_what_is_known_to_lose_digits_is_taken_about_the_mean(module, cpp):
    x = 1e3 + arguments((2, 400, 3))[0].detach()
    tables = torch.ones(2, 3), torch.zeros(2, 3)
    found = module.forward(x, tables[1], *tables, *tables, [0, 1], "identity", EPS, True)
    exact = x.double()
    expected = (exact - exact.mean(1, keepdim=True)) / exact.std(1, correction=0, keepdim=True)
    assert_close(found[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_cpp_gives_the_same_bits_on_any_number_of_threads(cpp, monkeypatch):
    mine, grad = arguments((4, 900, 70)), gradient((4, 900, 70))
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found = call(*mine)
        results.append([*found, *torch.autograd.grad(found[0], mine[:4], grad)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_any_layout(layout, relayouts, kernel, kernel_device, cpp):
    *tensors, experts, activation, eps, by_batch = arguments((3, 6, 7))
    options = experts, activation, eps, by_batch
    x, *rest = (t.detach() for t in tensors)
    moved = relayouts[layout](x)
    plain = call(moved.contiguous(), *rest, *options)
    assert_close(call(moved, *rest, *options), plain, rtol=0, atol=0)
    with kernels("reference"):
        assert_close(call(moved, *rest, *options), plain)
    on_device = [t.to(kernel_device) for t in (moved, *rest)]
    assert_close([t.cpu() for t in kernel.forward(*on_device, *options)], list(plain))


def test_cpp_leaves_what_it_does_not_know_to_others(cpp, monkeypatch):
    monkeypatch.setattr(native, "library", lambda _: pytest.fail("was called"))
    for dtype, activation in ((torch.float64, "silu"), (torch.float32, "gelu")):
        mine = arguments((3, 5, 4), dtype, activation=activation)
        assert_close(call(*mine), reference.forward(*mine))


@pytest.mark.gpu
@pytest.mark.parametrize("by_batch", [True, False])
def test_triton_mode_on_cuda(by_batch):
    *tensors, experts, activation, eps, _ = arguments((4, 577, 192))
    tensors = [t.detach().cuda().requires_grad_() for t in tensors]
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            y, *used = call(*tensors, experts, activation, eps, by_batch)
        inputs = tensors[: 4 if by_batch else 6]
        results[mode] = y, *used, *torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert_close(results["triton"], results["reference"], rtol=1e-3, atol=1e-3)
