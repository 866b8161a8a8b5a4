from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from core_gates.ops.soft_threshold.op import soft_threshold

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora" / "sora.npz"
VALUES = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20)
THRESHOLDS = st.floats(0, 3, width=32)


@pytest.fixture
def kernel(kernel_device):
    from core_gates.ops.soft_threshold import kernel

    return kernel


def test_golden():
    with np.load(GOLDEN) as arrays:
        x, expected = (torch.from_numpy(arrays[name]) for name in ("prox_in", "prox_soft"))
        threshold = float(arrays["prox_lambda"])
    assert_close(soft_threshold(x, threshold), expected, rtol=0, atol=1e-15)


def test_formula(inputs):
    x, _ = inputs((3, 7), torch.float64)
    expected = x.sign() * (x.abs() - 0.7).clamp(min=0)
    assert_close(soft_threshold(x, 0.7), expected, rtol=0, atol=1e-15)
    assert 0 < (expected == 0).sum() < expected.numel()


def test_it_solves_the_l1_problem():
    """Argmin over a fine grid of (z - x)² / 2 + ξ |z|."""
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    for x in (-2.345, -0.3, 0.2, 1.7):
        best = grid[((grid - x) ** 2 / 2 + 0.5 * grid.abs()).argmin()]
        assert_close(
            soft_threshold(torch.tensor(x, dtype=torch.float64), 0.5), best, atol=6e-4, rtol=0
        )


@given(VALUES, VALUES, THRESHOLDS)
def test_non_expansive_odd_and_monotone(first, second, threshold):
    n = min(len(first), len(second))
    a, b = (torch.tensor(v[:n], dtype=torch.float64) for v in (first, second))
    pa, pb = soft_threshold(a, threshold), soft_threshold(b, threshold)
    assert (pa - pb).norm() <= (a - b).norm() * (1 + 1e-12)
    assert torch.equal(soft_threshold(-a, threshold), -pa)
    assert ((pa - pb) * (a - b) >= 0).all()


@given(VALUES, THRESHOLDS, THRESHOLDS)
def test_a_larger_threshold_keeps_no_more(values, first, second):
    x = torch.tensor(values)
    small, large = sorted((first, second))
    kept_by_large = soft_threshold(x, large) != 0
    assert (soft_threshold(x, small)[kept_by_large] != 0).all()


def test_nan_is_not_hidden(kernel, kernel_device):
    x = torch.tensor([torch.nan, 0.1, 3.0], device=kernel_device)
    for result in (soft_threshold(x, 1.0), kernel.forward(x, 1.0)):
        assert_close(result, torch.tensor([torch.nan, 0.0, 2.0]).to(x), equal_nan=True)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_thresholds_are_checked(threshold):
    with pytest.raises(ValueError, match="threshold must not be negative"):
        soft_threshold(torch.zeros(2), threshold)
