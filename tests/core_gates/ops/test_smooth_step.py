from math import isnan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.ops.smooth_step.op import smooth_step


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


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gamma_is_checked(gamma):
    with pytest.raises(ValueError, match=f"gamma must be positive and finite, got {gamma}"):
        smooth_step(torch.zeros(2), gamma)
