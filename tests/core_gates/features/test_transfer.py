import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates.features.prior import TransferGate
from tests.core_gates.drawn import filled, randn


def drawn(*shape):
    return randn(*shape, seed=len(shape))


@pytest.fixture
def gate():
    gate = TransferGate(5, 3, dtype=torch.float64)
    return filled(gate)


def test_formula(gate):
    p, q = drawn(4, 2, 5), 2 * drawn(4, 2, 5) - 1
    scores, values = [], []
    for x in (p, q):
        first, second, third = (
            x @ weight.mT + bias for weight, bias in zip(gate.weight, gate.bias, strict=True)
        )
        scores.append((first * second).sum(-1) / math.sqrt(3))
        values.append(third)
    weights = torch.stack(scores, -1).softmax(-1)
    expected = weights[..., :1] * values[0] + weights[..., 1:] * values[1]
    assert_close((gate(p, q), gate.weights(p, q)), (expected, weights))
    assert_close(gate.gate_values(p, q), weights[..., 0])


def test_equal_inputs_share_the_weight(gate):
    q = drawn(6, 5)
    assert_close(gate.weights(q, q), torch.full((6, 2), 0.5, dtype=torch.float64))


def test_gradients(gate):
    assert gradcheck(gate, (drawn(3, 5).requires_grad_(), 2 * drawn(3, 5).requires_grad_()))


def test_shapes_are_checked(gate, refuses):
    refuses(
        ValueError,
        (r"p \(3, 5\) and q \(3, 4\) must be of one shape", lambda: gate(drawn(3, 5), drawn(3, 4))),
        ("hidden_dim must be at least 1", lambda: TransferGate(5, 0)),
    )
