import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from core_gates.ops.silu_gate import reference
from core_gates.ops.silu_gate.op import silu_gate


def test_formula(inputs):
    a, g = inputs((3, 7), torch.float64)
    product_, gate = silu_gate(a, g)
    assert_close(product_, F.silu(a) * torch.sigmoid(g), rtol=0, atol=1e-15)
    assert_close(gate, torch.sigmoid(g), rtol=0, atol=0)


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


def test_saturated_gates_have_finite_gradients():
    a = torch.tensor([-200.0, 200.0, 0.0, 0.0])
    g = torch.tensor([0.0, 0.0, -200.0, 200.0])
    one = torch.ones(4)
    grad_a, grad_g = reference.backward(one, one, a, g)
    assert_close(grad_a, torch.tensor([0.0, 0.5, 0.0, 0.5]))
    assert_close(grad_g, torch.tensor([0.25, 50.25, 0.0, 0.0]))
