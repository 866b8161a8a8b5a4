from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.silu_gate import reference
from core_gates.ops.silu_gate.op import silu_gate

SHAPES = [(0, 4), (1,), (), (3, 63), (2, 5, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transposed", "sliced", "offset", "expanded"]


@pytest.fixture(params=list(product(SHAPES, DTYPES)), ids=str)
def case(request):
    return request.param


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.silu_gate import kernel

    return kernel


def test_formula(inputs):
    a, g = inputs((3, 7), torch.float64)
    product_, gate = silu_gate(a, g)
    assert_close(product_, F.silu(a) * torch.sigmoid(g), rtol=0, atol=1e-15)
    assert_close(gate, torch.sigmoid(g), rtol=0, atol=0)


def test_half_precision_rounds_once(inputs):
    a, g = inputs((40, 25), torch.bfloat16)
    exact = reference.forward(a.float(), g.float())
    for half, full in zip(silu_gate(a, g), exact, strict=True):
        assert_close(half, full.bfloat16(), rtol=0, atol=0)


def test_dtypes_may_differ(inputs):
    a, g = inputs((4, 5))
    product_, gate = silu_gate(a, g.half())
    assert (product_.dtype, gate.dtype) == (torch.float32, torch.float16)
    assert_close(product_, silu_gate(a, g.half().float())[0])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"a \(2, 3\) and g \(3,\) must have one shape"):
        silu_gate(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("op", [silu_gate, torch.ops.core_gates.silu_gate.default])
def test_gradients_of_both_outputs(op, inputs):
    a, g = inputs((3, 5), torch.float64)
    assert gradcheck(op, (a, g))
    assert gradcheck(lambda a, g: op(a, g)[0], (a, g))
    assert gradcheck(lambda g: op(a.detach(), g)[1], (g,))


def test_second_derivatives_of_the_definition(inputs):
    assert gradgradcheck(silu_gate, inputs((3, 5), torch.float64))


def test_backward_is_the_derivative_of_forward(inputs):
    a, g, grad_product, grad_gate = inputs((6, 9), torch.float64, count=4)
    expected = torch.autograd.grad(silu_gate(a, g), (a, g), (grad_product, grad_gate))
    assert_close(reference.backward(grad_product, grad_gate, a, g), expected, rtol=0, atol=1e-14)


def test_saturated_gates_have_finite_gradients():
    a = torch.tensor([-200.0, 200.0, 0.0, 0.0])
    g = torch.tensor([0.0, 0.0, -200.0, 200.0])
    one = torch.ones(4)
    grad_a, grad_g = reference.backward(one, one, a, g)
    assert_close(grad_a, torch.tensor([0.0, 0.5, 0.0, 0.5]))
    assert_close(grad_g, torch.tensor([0.25, 50.25, 0.0, 0.0]))


def test_registration(case, inputs):
    opcheck(torch.ops.core_gates.silu_gate.default, inputs(*case))


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS[:2], repeat=2)))
def test_registration_keeps_layouts(first, second, inputs, relayouts):
    a, g = (t.detach() for t in inputs((4, 6)))
    a, g = relayouts[first](a).requires_grad_(), relayouts[second](g).requires_grad_()
    opcheck(torch.ops.core_gates.silu_gate.default, (a, g))


def test_kernel_matches_definition(case, inputs, kernel, kernel_device, poisoned_empty):
    grad_product, grad_gate, a, g = (t.detach().to(kernel_device) for t in inputs(*case, count=4))
    before = a.clone(), g.clone()
    assert_close(kernel.forward(a, g), reference.forward(a, g))
    gradients = kernel.backward(grad_product, grad_gate, a, g)
    assert_close(gradients, reference.backward(grad_product, grad_gate, a, g))
    assert_close((a, g), before, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS, repeat=2)))
def test_kernel_takes_any_layout(
    first, second, inputs, relayouts, kernel, kernel_device, poisoned_empty
):
    tensors = [t.detach().to(kernel_device) for t in inputs((6, 7), count=4)]
    a, g = relayouts[first](tensors[0]), relayouts[second](tensors[1])
    grad_product, grad_gate = relayouts[second](tensors[2]), relayouts[first](tensors[3])
    before = a.clone(), g.clone(), grad_product.clone(), grad_gate.clone()
    outputs = kernel.forward(a, g)
    assert_close(outputs, reference.forward(a, g))
    gradients = kernel.backward(grad_product, grad_gate, a, g)
    assert_close(gradients, reference.backward(grad_product, grad_gate, a, g))
    for like, *results in zip((a, g), outputs, gradients, strict=True):
        assert {t.stride() for t in results} == {torch.zeros_like(like).stride()}
    assert_close((a, g, grad_product, grad_gate), before, rtol=0, atol=0)


@pytest.mark.gpu
def test_triton_mode_on_cuda(inputs):
    a, g, grad_product, grad_gate = (
        t.detach().cuda().requires_grad_() for t in inputs((3, 63), count=4)
    )
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            outputs = silu_gate(a, g)
        results[mode] = *outputs, *torch.autograd.grad(outputs, (a, g), (grad_product, grad_gate))
    assert_close(results["triton"], results["reference"])
