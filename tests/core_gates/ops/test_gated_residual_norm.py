from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.gated_residual_norm import op, reference
from core_gates.ops.gated_residual_norm.op import gated_residual_norm

SHAPES = [(0, 4), (1, 1), (3, 63), (5, 130)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OP = torch.ops.core_gates.gated_residual_norm.default
EPS = 1e-5


def arguments(shape, dtype=torch.float32):
    """Stream, branch, scores, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    rows = shape, shape, shape[-1:], shape[-1:], shape[-1:]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in rows]
    tensors[2] = tensors[2].sigmoid()
    return tuple(t.to(dtype).requires_grad_() for t in tensors)


def gradients(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


@pytest.fixture(params=list(product(SHAPES, DTYPES)), ids=str)
def case(request):
    return request.param


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.gated_residual_norm import kernel

    return kernel


def test_formula():
    x, branch, scores, weight, bias = arguments((2, 3, 7), torch.float64)
    total, normalized = gated_residual_norm(x, branch, scores, weight, bias, EPS)
    assert_close(total, x + scores * branch, rtol=0, atol=1e-14)
    mean, variance = total.mean(-1, keepdim=True), total.var(-1, correction=0, keepdim=True)
    expected = (total - mean) / (variance + EPS).sqrt() * weight + bias
    assert_close(normalized, expected, rtol=0, atol=1e-13)


def test_half_precision_rounds_once_and_normalizes_the_exact_sum():
    half = arguments((40, 25), torch.bfloat16)
    exact = reference.forward(*(t.float() for t in half), EPS)
    for actual, full in zip(gated_residual_norm(*half, EPS), exact, strict=True):
        assert_close(actual, full.bfloat16(), rtol=0, atol=0)


def test_parameters_may_stay_in_float32():
    x, branch, *vectors = arguments((4, 6))
    total, normalized = gated_residual_norm(x.bfloat16(), branch.bfloat16(), *vectors, EPS)
    assert total.dtype == normalized.dtype == torch.bfloat16
    assert_close(total.float(), x + vectors[0] * branch, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 4), 3, 3, 3), r"x \(2, 3\) and branch \(2, 4\) must have one shape"),
        (((2, 3), (2, 3), 2, 3, 3), r"scores \(2,\) must have the shape \(3,\)"),
        (((2, 3), (2, 3), 3, 3, 1), r"bias \(1,\) must have the shape \(3,\)"),
    ],
)
def test_shapes_are_checked(shapes, message):
    with pytest.raises(ValueError, match=message):
        gated_residual_norm(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("function", [gated_residual_norm, OP])
def test_gradients(function):
    tensors = arguments((3, 5), torch.float64)
    assert gradcheck(lambda *t: function(*t, EPS), tensors)
    assert gradcheck(lambda *t: function(*t, EPS)[1], tensors)
    assert gradcheck(
        lambda *t: function(*t, EPS)[0], tensors[:3] + tuple(t.detach() for t in tensors[3:])
    )


def test_second_derivatives_of_the_definition():
    assert gradgradcheck(lambda *t: gated_residual_norm(*t, EPS), arguments((2, 4), torch.float64))


@pytest.mark.ends("shapes are registered alike")
def test_registration(case):
    opcheck(OP, (*arguments(*case), EPS))


def test_kernel_matches_definition(case, kernel, kernel_device, poisoned_empty):
    tensors = [t.detach().to(kernel_device) for t in arguments(*case)]
    before = [t.clone() for t in tensors]
    assert_close(kernel.forward(*tensors, EPS), reference.forward(*tensors, EPS))
    grads = [g.to(kernel_device) for g in gradients(*case)]
    actual = kernel.backward(*grads, *tensors[:4], EPS)
    assert_close(actual, reference.backward(*grads, *tensors[:4], EPS))
    assert_close(tensors, before, rtol=0, atol=0)


def test_a_program_of_the_kernel_sums_several_rows(kernel, kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "NUM_PROGRAMS", 3)
    tensors = [t.detach().to(kernel_device) for t in arguments((11, 20))]
    grads = [g.to(kernel_device) for g in gradients((11, 20), torch.float32)]
    actual = kernel.backward(*grads, *tensors[:4], EPS)
    assert_close(actual, reference.backward(*grads, *tensors[:4], EPS))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_kernel_takes_any_layout(layout, relayouts, kernel, kernel_device, poisoned_empty):
    x, branch, *vectors = (t.detach().to(kernel_device) for t in arguments((6, 7)))
    x, branch = relayouts[layout](x), relayouts[layout](branch)
    grads = [relayouts[layout](g.to(kernel_device)) for g in gradients((6, 7), torch.float32)]
    assert_close(
        kernel.forward(x, branch, *vectors, EPS), reference.forward(x, branch, *vectors, EPS)
    )
    actual = kernel.backward(*grads, x, branch, *vectors[:2], EPS)
    assert_close(actual, reference.backward(*grads, x, branch, *vectors[:2], EPS))


@pytest.mark.gpu
def test_triton_mode_on_cuda():
    tensors = [t.detach().cuda().requires_grad_() for t in arguments((577, 192))]
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            outputs = gated_residual_norm(*tensors, EPS)
        grads = [torch.ones_like(o) for o in outputs]
        results[mode] = *outputs, *torch.autograd.grad(outputs, tensors, grads)
    assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 63), (300, 130), (2, 5, 48)], ids=str)
def test_cpp_matches_the_definition(shape, cpp, poisoned_empty):
    tensors, grads = arguments(shape), gradients(shape, torch.float32)
    found = gated_residual_norm(*tensors, EPS)
    precise = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference.forward(*precise, EPS)
    assert_close([f.double() for f in found], list(expected), rtol=1e-5, atol=1e-5)
    result = torch.autograd.grad(found, tensors, grads)
    exact = torch.autograd.grad(expected, precise, [g.double() for g in grads])
    for actual, wanted in zip(result, exact, strict=True):
        scale = wanted.abs().max().item() if wanted.numel() else 1.0
        assert_close(actual.double(), wanted, rtol=0, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded"])
def test_cpp_takes_any_layout(layout, relayouts, cpp):
    x, branch, *vectors = (t.detach() for t in arguments((6, 7)))
    found = gated_residual_norm(relayouts[layout](x), relayouts[layout](branch), *vectors, EPS)
    plain = relayouts[layout](x).contiguous(), relayouts[layout](branch).contiguous()
    assert_close(found, gated_residual_norm(*plain, *vectors, EPS), rtol=0, atol=0)


def test_cpp_gives_the_same_bits_on_any_number_of_threads(cpp, monkeypatch):
    tensors, grads = arguments((500, 33)), gradients((500, 33), torch.float32)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found = gated_residual_norm(*tensors, EPS)
        results.append([*found, *torch.autograd.grad(found, tensors, grads)])
    assert all(map(torch.equal, *results))


def test_cpp_is_one_node_of_a_compiled_region(cpp):
    tensors, grads = arguments((5, 12)), gradients((5, 12), torch.float32)
    compiled = torch.compile(gated_residual_norm, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(*tensors, EPS), tensors, grads) for f in (compiled, OP)]
    assert_close(*results)
    opcheck(torch.ops.core_gates.gated_residual_norm_cpp.default, (*tensors, EPS))


def test_what_cpp_does_not_compute_is_left_to_the_definition(cpp, monkeypatch):
    monkeypatch.setattr(op, "library", lambda _: pytest.fail("was called"))
    for dtype in (torch.float64, torch.bfloat16):
        tensors = arguments((3, 8), dtype)
        expected = reference.forward(*tensors, EPS)
        assert_close(gated_residual_norm(*tensors, EPS), expected, rtol=0, atol=0)
