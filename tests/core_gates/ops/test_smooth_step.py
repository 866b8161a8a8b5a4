from itertools import product
from math import isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.testing import assert_close

from core_gates.ops import kernels
from core_gates.ops.smooth_step import reference
from core_gates.ops.smooth_step.op import smooth_step

SHAPES = [(0, 4), (1,), (), (3, 63), (2, 5, 1000)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transposed", "sliced", "offset", "expanded"]
GAMMA = 3.0


@pytest.fixture(params=list(product(SHAPES, DTYPES)), ids=str)
def case(request):
    return request.param


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.smooth_step import kernel

    return kernel


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_formula(gamma):
    z = torch.linspace(-gamma, gamma, 101, dtype=torch.float64)
    cubic = -2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5
    expected = torch.where(z <= -gamma / 2, 0, torch.where(z >= gamma / 2, 1, cubic))
    assert_close(smooth_step(z, gamma), expected, rtol=0, atol=1e-15)


@given(st.floats(2**-10, 2**10, width=32), st.floats(-2, 2, width=32))
def test_exact_outside_the_band_and_symmetric_inside(gamma, place):
    z = torch.tensor([gamma / 2, gamma, 1e30, gamma * place], requires_grad=True)
    up, down = smooth_step(z, gamma), smooth_step(-z, gamma)
    assert up[:3].tolist() == [1, 1, 1]
    assert down[:3].tolist() == [0, 0, 0]
    assert 0 <= up[3] <= 1
    assert_close(up + down, torch.ones(4))
    (slope,) = torch.autograd.grad(up.sum(), z)
    assert slope[:3].tolist() == [0, 0, 0]
    assert 0 <= slope[3] <= 1.5 / gamma * (1 + 1e-6)
    assert slope[3] > 0 or abs(place) > 0.499


def test_steepest_in_the_middle():
    z = torch.zeros((), requires_grad=True)
    smooth_step(z, 0.25).backward()
    assert z.grad == 1.5 / 0.25


def test_nan_is_not_hidden(kernel, kernel_device):
    z = torch.tensor([torch.nan, 0.0, torch.inf, -torch.inf], device=kernel_device)
    for forward in (smooth_step, kernel.forward):
        nan, *steps = forward(z, 1.0).tolist()
        assert isnan(nan)
        assert steps == [0.5, 1, 0]


def test_half_precision_rounds_once(inputs):
    (z,) = inputs((40, 25), torch.float16, count=1)
    out = smooth_step(z, GAMMA)
    assert_close(out, reference.forward(z.float(), GAMMA).half(), rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gamma_is_checked(gamma):
    with pytest.raises(ValueError, match=f"gamma must be positive and finite, got {gamma}"):
        smooth_step(torch.zeros(2), gamma)


@pytest.mark.parametrize("op", [smooth_step, torch.ops.core_gates.smooth_step.default])
def test_gradients(op, inputs):
    assert gradcheck(lambda z: op(z, GAMMA), inputs((3, 5), torch.float64, count=1))


def test_second_derivatives_of_the_definition(inputs):
    assert gradgradcheck(lambda z: smooth_step(z, GAMMA), inputs((3, 5), torch.float64, count=1))


def test_backward_is_the_derivative_of_forward(inputs):
    grad, z = inputs((6, 9), torch.float64)
    (expected,) = torch.autograd.grad(smooth_step(z, GAMMA), z, grad)
    assert_close(reference.backward(grad, z, GAMMA), expected, rtol=0, atol=1e-14)


def test_registration(case, inputs):
    opcheck(torch.ops.core_gates.smooth_step.default, (*inputs(*case, count=1), GAMMA))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_registration_keeps_layouts(layout, inputs, relayouts):
    (z,) = (t.detach() for t in inputs((4, 6), count=1))
    opcheck(
        torch.ops.core_gates.smooth_step.default, (relayouts[layout](z).requires_grad_(), GAMMA)
    )


def test_kernel_matches_definition(case, inputs, kernel, kernel_device, poisoned_empty):
    grad, z = (t.detach().to(kernel_device) for t in inputs(*case))
    before = z.clone()
    assert_close(kernel.forward(z, GAMMA), reference.forward(z, GAMMA))
    assert_close(kernel.backward(grad, z, GAMMA), reference.backward(grad, z, GAMMA))
    assert_close(z, before, rtol=0, atol=0)


@pytest.mark.parametrize(("first", "second"), list(product(LAYOUTS, repeat=2)))
def test_kernel_takes_any_layout(
    first, second, inputs, relayouts, kernel, kernel_device, poisoned_empty
):
    tensors = [t.detach().to(kernel_device) for t in inputs((6, 7))]
    z, grad = (relayouts[name](t) for name, t in zip((first, second), tensors, strict=True))
    before = z.clone(), grad.clone()
    out, grad_z = kernel.forward(z, GAMMA), kernel.backward(grad, z, GAMMA)
    assert_close(out, reference.forward(z, GAMMA))
    assert_close(grad_z, reference.backward(grad, z, GAMMA))
    assert out.stride() == grad_z.stride() == torch.zeros_like(z).stride()
    assert_close((z, grad), before, rtol=0, atol=0)


@pytest.mark.gpu
def test_triton_mode_on_cuda(inputs):
    z, grad = (t.detach().cuda().requires_grad_() for t in inputs((3, 63)))
    results = {}
    for mode in ("reference", "triton"):
        with kernels(mode):
            out = smooth_step(z, GAMMA)
        results[mode] = out, *torch.autograd.grad(out, z, grad)
    assert_close(results["triton"], results["reference"])
