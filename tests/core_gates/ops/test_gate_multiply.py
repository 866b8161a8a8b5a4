import pytest
import torch
from torch.testing import assert_close

from core_gates.ops.gate_multiply.op import gate_multiply


def test_formula(inputs):
    x, logits = inputs((3, 7), torch.float64)
    assert_close(gate_multiply(x, logits), x / (1 + torch.exp(-logits)), rtol=0, atol=1e-15)


def test_dtypes_may_differ(inputs):
    x, logits = inputs((4, 5))
    out = gate_multiply(x, logits.bfloat16())
    assert out.dtype == torch.float32
    assert_close(out, gate_multiply(x, logits.bfloat16().float()))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"x \(2, 3\) and logits \(3,\) must have one shape"):
        gate_multiply(torch.zeros(2, 3), torch.zeros(3))
