"""Low-rank feature gates over several inputs, in every way that they are computed."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates import kernels
from core_gates.ops import feature_gate
from core_gates.ops.feature_gate import blocks, reference
from core_gates.ops.feature_gate import blocks as steps

SIZES = [(1, 4, 1, 1, 1, 1), (1, 5, 7, 3, 2, 4), (2, 37, 20, 3, 3, 5)]  # I N D G L r
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.core_gates.feature_gate.default


def runs_of(sizes):
    """Inputs and gates of the runs: the last gate reads every input, the others one each."""
    num_inputs, gates = sizes[0], sizes[3]
    pairs = [(g % num_inputs, g) for g in range(gates - 1)]
    pairs += [(i, gates - 1) for i in range(num_inputs)]
    return [i for i, _ in pairs], [g for _, g in pairs]


def arguments(sizes, dtype=torch.float32):
    """v, mixer, mixer_bias, down, up, then inputs and gates of the runs."""
    num_inputs, rows, dim, gates, maps, rank = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def normal(*shape, scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    tensors = (
        normal(num_inputs, rows, dim),
        normal(gates, maps, dim, scale=dim**-0.5),
        normal(gates, maps),
        normal(gates, maps, rank, dim, scale=dim**-0.5),
        normal(gates, maps, rank, dim),
    )
    return *tensors, *runs_of(sizes)


def gradient(mine):
    generator = torch.Generator().manual_seed(1)
    shape = len(mine[5]), *mine[0].shape[1:]
    return torch.randn(shape, generator=generator).to(mine[0].dtype)


CASES = [  # all sizes in float32, one in half precision; the rest once a day
    pytest.param(
        (sizes, dtype), marks=[pytest.mark.slow] * (dtype != torch.float32 and sizes != SIZES[1])
    )
    for sizes, dtype in product(SIZES, DTYPES)
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return arguments(*request.param)


@pytest.fixture
def kernel(kernel_device, monkeypatch):
    """The kernels, with tiles so small that a test has several."""
    from core_gates.ops.feature_gate import kernel

    if kernel_device == "cpu":
        monkeypatch.setattr(kernel, "ROWS", 16)
        monkeypatch.setattr(kernel, "COLUMNS", 16)
        monkeypatch.setattr(kernel, "NUM_PROGRAMS", 2)
    return kernel


@pytest.fixture
def small_blocks(monkeypatch):
    """Let several blocks of rows, and several of runs, be in a small call."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2**9)


def test_formula():
    v, mixer, bias, down, up, inputs, gates = arguments(SIZES[2], torch.float64)
    out = feature_gate(v, mixer, bias, down, up, inputs, gates)
    for run, (i, g) in enumerate(zip(inputs, gates, strict=True)):
        weights = (v[i] @ mixer[g].mT + bias[g]).softmax(-1)
        opened = [(v[i] @ down[g, m].mT @ up[g, m]).sigmoid() for m in range(3)]
        factor = sum(2 * weights[:, m : m + 1] * opened[m] for m in range(3))
        assert_close(out[run], v[i] * factor, rtol=0, atol=1e-12)


def test_half_precision_rounds_matmuls_and_the_result_alone():
    mine = arguments((2, 40, 60, 3, 2, 4), torch.bfloat16)
    out = feature_gate(*mine)
    exact = feature_gate(*(t.detach().float() for t in mine[:5]), *mine[5:])
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = feature_gate(*(t.detach().float() for t in mine[:5]), *mine[5:])
    assert cast.dtype == torch.bfloat16
    assert_close(cast.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(5, 6)}, r"v \(5, 6\) must be \(inputs, rows, features\)"),
        ({"down": torch.zeros(2, 3, 5, 6)}, r"down \(2, 3, 5, 6\) and up \(2, 3, 4, 6\)"),
        ({"mixer": torch.zeros(2, 4, 6)}, r"must begin with the \(2, 3\) gates and maps"),
        ({"inputs": [0, 1]}, "inputs .0, 1. must name one of 1 for each run"),
        ({"gates": [0]}, "inputs .0, 0. must name one of 1 for each run"),
        ({"inputs": [], "gates": []}, "must name one of 1 for each run"),
    ],
)
def test_arguments_are_checked(refuses, change, message):
    named = {
        "v": torch.zeros(1, 5, 6),
        "mixer": torch.zeros(2, 3, 6),
        "mixer_bias": torch.zeros(2, 3),
        "down": torch.zeros(2, 3, 4, 6),
        "up": torch.zeros(2, 3, 4, 6),
        "inputs": [0, 0],
        "gates": [0, 1],
    }
    refuses(ValueError, (message, lambda: feature_gate(**named | change)))


@pytest.mark.parametrize("function", [feature_gate, OP], ids=["function", "operator"])
def test_gradients(function):
    *tensors, inputs, gates = arguments((2, 3, 4, 2, 2, 2), torch.float64)
    assert gradcheck(lambda *t: function(*t, inputs, gates), tensors)


def test_second_derivatives_of_the_definition():
    *tensors, inputs, gates = arguments((1, 2, 3, 2, 2, 1), torch.float64)
    assert gradgradcheck(lambda *t: feature_gate(*t, inputs, gates), tensors)


def test_second_derivatives_in_float32_are_those_of_the_definition():
    mine = arguments((2, 4, 5, 2, 2, 3))
    exact = [t.detach().double().requires_grad_() for t in mine[:5]]
    results = []
    for tensors in (mine[:5], exact):
        out = feature_gate(*tensors, *mine[5:])
        (slope,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), tensors))
    for one, other in zip(*results, strict=True):
        assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


@pytest.mark.ends("shapes are registered alike")
def test_registration(case):
    opcheck(OP, case)


def test_kernel_matches_the_definition(case, kernel, kernel_device, poisoned_empty):
    tensors = [t.detach().to(kernel_device) for t in case[:5]]
    before = [t.clone() for t in tensors]
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[case[0].dtype]
    exact = [t.double() for t in tensors]
    found, expected = kernel.forward(*tensors, *case[5:]), reference.forward(*exact, *case[5:])
    grad = gradient(case).to(kernel_device)
    slopes = kernel.backward(grad, *tensors, *case[5:])
    wanted = reference.backward(grad.double(), *exact, *case[5:])
    for one, other in zip((found, *slopes), (expected, *wanted), strict=True):
        assert one.dtype == case[0].dtype
        scale = max(other.abs().max().item(), 1.0)
        assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
    assert_close(tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["reference", "cpp"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 3, 1, 1, 1), (1, 37, 16, 3, 2, 4), (2, 90, 33, 5, 3, 2), (2, 3, 5, 4, 2, 2)],
    ids=str,
)
def test_float32_on_the_cpu_matches_the_definition(sizes, mode, cpp, small_blocks):
    mine = arguments(sizes)
    exact = [t.detach().double().requires_grad_() for t in mine[:5]]
    with kernels(mode):
        found = feature_gate(*mine)
    expected, grad = feature_gate(*exact, *mine[5:]), gradient(mine)
    actual = torch.autograd.grad(found, mine[:5], grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for one, other in zip((found, *actual), (expected, *wanted), strict=True):
        scale = max(other.abs().max().item(), 1.0)
        assert_close(one.double(), other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("mode", ["reference", "cpp"])
def test_no_rows(mode, cpp):
    mine = arguments((2, 0, 5, 3, 2, 2))
    with kernels(mode):
        out = feature_gate(*mine)
    assert out.shape == (4, 0, 5)
    assert not any(t.any() for t in torch.autograd.grad(out.sum(), mine[:5]))


def test_cpp_gives_the_same_bits_on_any_number_of_threads(cpp, monkeypatch):
    mine = arguments((2, 300, 33, 3, 2, 4))
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found = feature_gate(*mine)
        results.append([found, *torch.autograd.grad(found, mine[:5], gradient(mine))])
    assert all(map(torch.equal, *results))


def test_cpp_leaves_what_it_does_not_know_to_others(cpp, monkeypatch):
    monkeypatch.setattr(steps, "library", lambda _: pytest.fail("was called"))
    mine = arguments(SIZES[1], torch.float64)
    assert_close(feature_gate(*mine), reference.forward(*mine))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_any_layout(layout, relayouts, kernel, kernel_device, cpp):
    v, *others = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(SIZES[2]))
    moved = relayouts[layout](v)
    expected = feature_gate(moved.contiguous(), *others)
    assert_close(feature_gate(moved, *others), expected, rtol=0, atol=0)
    on_device = [t.to(kernel_device) for t in (moved, *others[:4])]
    assert_close(kernel.forward(*on_device, *others[4:]).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_triton_mode_on_cuda():
    *tensors, inputs, gates = arguments((2, 577, 192, 5, 2, 32))
    tensors = [t.detach().cuda().requires_grad_() for t in tensors]
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            out = feature_gate(*tensors, inputs, gates)
        results[mode] = out, *torch.autograd.grad(out, tensors, torch.ones_like(out))
    for one, other in zip(*results.values(), strict=True):
        assert_close(one, other, rtol=0, atol=1e-4 * max(other.abs().max().item(), 1.0))
