import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.features.prior import PriorGate


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def test_formula():
    gate = PriorGate(5, 3, 7)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    x, prior = drawn(4, 2, 5), drawn(4, 2, 3)
    hidden = (torch.cat([prior, x], -1) @ gate.hidden_weight.mT + gate.hidden_bias).relu()
    factor = 2 / (1 + (-(hidden @ gate.weight.mT + gate.bias)).exp())
    assert_close((gate(x, prior), gate.gate_values(x, prior)), (x * factor, factor / 2))


def test_it_starts_as_the_identity_exactly():
    x = 10 * drawn(6, 5)
    assert torch.equal(PriorGate(5, 3)(x, drawn(6, 3)), x)


def test_the_gate_is_no_path_of_gradients_to_what_it_reads():
    gate = PriorGate(5, 3)
    nn.init.normal_(gate.weight)
    x, prior = drawn(6, 5).requires_grad_(), drawn(6, 3).requires_grad_()
    factor = gate.factors(x, prior)
    of_x, of_prior = torch.autograd.grad(gate(x, prior).sum(), (x, prior))
    assert_close(of_x, factor)  # that of the product alone
    assert of_prior.abs().max() > 1e-3


def test_it_may_read_something_else():
    gate = PriorGate(5, 3, input_dim=4)
    nn.init.normal_(gate.weight)
    x, prior, seen = drawn(6, 5), drawn(6, 3), drawn(6, 4)
    y = gate(x, prior, seen=seen)
    assert_close(gate(2 * x, prior, seen=seen), 2 * y)  # x is not read
    assert not torch.allclose(gate(x, prior, seen=-seen), y)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((6, 4), (6, 3)), r"x \(6, 4\) must be \(6, 5\)"),
        (((6, 5), (6, 2)), r"prior \(6, 2\) must be \(6, 3\)"),
        (((6, 5), (5, 3)), r"prior \(5, 3\) must be \(6, 3\)"),
    ],
)
def test_shapes_are_checked(shapes, message, refuses):
    refuses(
        ValueError,
        (message, lambda: PriorGate(5, 3)(*map(torch.zeros, shapes))),
        ("prior_dim must be at least 1", lambda: PriorGate(5, 0)),
    )
