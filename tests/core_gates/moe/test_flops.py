import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import core_gates.ops.flops  # noqa: F401
from core_gates import MoELayer, StackedExperts, TopKGate

DIM, HIDDEN, EXPERTS, TOKENS, K = 16, 24, 4, 64, 2


def counted(how, device="cpu", *, frozen=False, backward=True, gated=True, dtype=torch.float32):
    """FLOPs of a layer by the dispatch ``how``, its backward pass included."""
    experts = StackedExperts(EXPERTS, DIM, HIDDEN, gated=gated, bias=True)
    layer = MoELayer(TopKGate(DIM, EXPERTS, k=K), experts, dispatch=how).to(device, dtype)
    layer.experts.requires_grad_(not frozen)
    x = torch.randn(TOKENS, DIM, device=device, dtype=dtype, requires_grad=backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y, _ = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_sorted_rows_count_what_a_loop_does(gated, frozen):
    expected = counted("loop", gated=gated, frozen=frozen)
    matmuls = 2 * TOKENS * K * DIM * HIDDEN * (3 if gated else 2)
    assert expected > (2 if frozen else 3) * matmuls
    for device in ("cpu", "meta"):
        found = counted("sorted", device, gated=gated, frozen=frozen)
        assert found == pytest.approx(expected, rel=1e-3), device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pass_without_gradients_is_counted_too(dtype):
    expected = counted("loop", backward=False, dtype=dtype)
    assert expected > 2 * TOKENS * K * DIM * HIDDEN * 3
    for device in ("cpu", "meta"):
        found = counted("sorted", device, backward=False, dtype=dtype)
        assert found == pytest.approx(expected, rel=1e-3), device
