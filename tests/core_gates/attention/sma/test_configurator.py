import math

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.sma.layer import SparseModularActivation


def build(**options):
    torch.manual_seed(0)
    configurator = SparseModularActivation(4, **options).double()
    torch.nn.init.normal_(configurator.weight)
    torch.nn.init.normal_(configurator.bias)
    return configurator


def test_formula():
    configurator = build(tau_scale=0.3)
    assert configurator.log_tau.exp().item() == pytest.approx(0.3 * math.sqrt(4))
    x = torch.randn(2, 50, 4, dtype=torch.float64)
    probs = ((x @ configurator.weight.T + configurator.bias) / 0.6).softmax(-1)
    mask, confidence = configurator(x)
    assert torch.equal(mask, probs.argmax(-1) == 1)
    assert 0 < mask.sum() < mask.numel()
    assert_close(confidence, probs.max(-1).values * mask)
    assert (confidence[mask] > 0.5).all()


def test_the_gradient_flows_through_the_confidence_of_active_tokens():
    configurator = build()
    x = torch.randn(1, 12, 4, dtype=torch.float64, requires_grad=True)
    mask, confidence = configurator(x)
    confidence.sum().backward()
    assert torch.equal(x.grad.abs().sum(-1) > 0, mask)
    assert configurator.log_tau.grad.abs() > 0


def test_a_tie_is_off():
    configurator = build()
    torch.nn.init.zeros_(configurator.weight)
    torch.nn.init.zeros_(configurator.bias)
    mask, confidence = configurator(torch.randn(2, 3, 4).double())
    assert not mask.any()
    assert not confidence.any()


def test_it_decides_in_float32_under_autocast():
    configurator = build().float()
    x = torch.randn(2, 30, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = configurator(x.bfloat16())
    expected = configurator(x.bfloat16().float())
    assert found.confidence.dtype == torch.float32
    assert torch.equal(found.mask, expected.mask)
    assert_close(found.confidence, expected.confidence)


@pytest.mark.parametrize("arguments", [(0, 1.0), (3, 0.0), (3, math.nan)])
def test_errors(arguments):
    with pytest.raises(ValueError, match=r"(dim must be at least 1|tau_scale must be positive)"):
        SparseModularActivation(arguments[0], tau_scale=arguments[1])
