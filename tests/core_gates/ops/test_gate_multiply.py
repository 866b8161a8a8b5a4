from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.gate_multiply import reference
from core_gates.ops.gate_multiply.op import gate_multiply

SHAPES = [(0, 4), (1,), (), (3, 63), (2, 5, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transposed", "sliced", "offset", "expanded"]


@pytest.fixture(params=list(product(SHAPES, DTYPES)), ids=str)
def case(request):
    return request.param


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.gate_multiply import kernel

    return kernel


def test_formula(inputs):
    x, logits = inputs((3, 7), torch.float64)
    assert_close(gate_multiply(x, logits), x / (1 + torch.exp(-logits)), rtol=0, atol=1e-15)


def test_half_precision_rounds_once(inputs):
    x, logits = inputs((40, 25), torch.float16)
    out = gate_multiply(x, logits)
    assert_close(out, reference.forward(x.float(), logits.float()).half(), rtol=0, atol=0)


def test_dtypes_may_differ(inputs):
    x, logits = inputs((4, 5))
    out = gate_multiply(x, logits.bfloat16())
    assert out.dtype == torch.float32
    assert_close(out, gate_multiply(x, logits.bfloat16().float()))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"x \(2, 3\) and logits \(3,\) must have one shape"):
        gate_multiply(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("op", [gate_multiply, torch.ops.core_gates.gate_multiply.default])
def test_gradients(op, inputs):
    assert gradcheck(op, inputs((3, 5), torch.float64))


def test_second_derivatives_of_the_definition(inputs):
    assert gradgradcheck(gate_multiply, inputs((3, 5), torch.float64))


def test_backward_is_the_derivative_of_forward(inputs):
    grad, x, logits = inputs((6, 9), torch.float64, count=3)
    expected = torch.autograd.grad(gate_multiply(x, logits), (x, logits), grad)
    assert_close(reference.backward(grad, x, logits), expected, rtol=0, atol=1e-14)


def test_registration(case, inputs):
    opcheck(torch.ops.core_gates.gate_multiply.default, inputs(*case))


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS[:2], repeat=2)))
def test_registration_keeps_layouts(first, second, inputs, relayouts):
    x, logits = (t.detach() for t in inputs((4, 6)))
    x, logits = relayouts[first](x).requires_grad_(), relayouts[second](logits).requires_grad_()
    opcheck(torch.ops.core_gates.gate_multiply.default, (x, logits))


def test_kernel_matches_definition(case, inputs, kernel, kernel_device, poisoned_empty):
    grad, x, logits = (t.detach().to(kernel_device) for t in inputs(*case, count=3))
    before = x.clone(), logits.clone()
    assert_close(kernel.forward(x, logits), reference.forward(x, logits))
    assert_close(kernel.backward(grad, x, logits), reference.backward(grad, x, logits))
    assert_close((x, logits), before, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS, repeat=2)))
def test_kernel_takes_any_layout(
    first, second, inputs, relayouts, kernel, kernel_device, poisoned_empty
):
    tensors = [t.detach().to(kernel_device) for t in inputs((6, 7), count=3)]
    x, logits, grad = (
        relayouts[name](t) for name, t in zip((first, second, second), tensors, strict=True)
    )
    before = x.clone(), logits.clone(), grad.clone()
    out = kernel.forward(x, logits)
    assert_close(out, reference.forward(x, logits))
    gradients = kernel.backward(grad, x, logits)
    assert_close(gradients, reference.backward(grad, x, logits))
    assert out.stride() == gradients[0].stride() == torch.zeros_like(x).stride()
    assert gradients[1].stride() == torch.zeros_like(logits).stride()
    assert_close((x, logits, grad), before, rtol=0, atol=0)


@pytest.mark.gpu
def test_triton_mode_on_cuda(inputs):
    x, logits, grad = (t.detach().cuda().requires_grad_() for t in inputs((3, 63), count=3))
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            out = gate_multiply(x, logits)
        results[mode] = out, *torch.autograd.grad(out, (x, logits), grad)
    assert_close(results["triton"], results["reference"])
