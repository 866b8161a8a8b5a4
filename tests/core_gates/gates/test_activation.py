import math

import pytest
import torch
from torch.testing import assert_close

from core_gates import ActivationGate, TemperatureSchedule, update_gates
from tests.core_gates.drawn import randn

DIM, EXPERTS = 3, 4


def build(**options):
    gate = ActivationGate(DIM, EXPERTS, dtype=torch.float64, **options)
    gate.weight.data, gate.bias.data = randn(EXPERTS, DIM), randn(EXPERTS, seed=1)
    return gate


def positions(*shape):
    return randn(*shape, DIM, seed=2)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("identity", lambda z: z),
        ("tanh", lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp())),
        ("sigmoid", lambda z: 1 / (1 + (-z).exp())),
        ("gelu", lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2),
        ("silu", lambda z: z / (1 + (-z).exp())),
    ],
)
def test_formula(activation, function):
    gate, x = build(activation=activation, tau=0.4), positions(7)
    routing = gate(x)
    logits = function(x @ gate.weight.T) + gate.bias
    assert_close(routing.logits, logits)
    expected = (logits / 0.4).exp()
    assert_close(routing.weights, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 2.0])
def test_only_a_linear_score_has_a_ridge(scale):
    x, changes = positions(200), {}
    for activation in ("identity", "tanh", "sigmoid"):
        gate = build(activation=activation, tau=0.5)
        scaled = build(activation=activation, tau=0.5 * scale)
        for parameter in (scaled.weight, scaled.bias):
            parameter.data.mul_(scale)
        change = scaled(x).weights.log() - gate(x).weights.log()
        changes[activation] = change.abs().max().item()
    assert changes["identity"] < 1e-10
    assert min(changes["tanh"], changes["sigmoid"]) > 0.01


def test_learned_temperature_starts_at_its_value_and_learns():
    gate = build(tau=0.7, learn_tau=True)
    assert_close(gate.tau.item(), 0.7)
    assert_close(gate(positions(5)).weights, build(tau=0.7)(positions(5)).weights)
    gate(positions(5)).weights[:, 0].sum().backward()
    assert gate.log_tau.grad != 0
    gate.log_tau.data.fill_(9.0)
    gate.reset_parameters()
    assert_close(gate.tau.item(), 0.7)


def test_temperature_follows_its_schedule_once_per_step():
    gate, seen = build(tau=TemperatureSchedule(2.0, 0.5, 3)), []
    for _ in range(5):
        gate(positions(2))
        seen.append(gate.tau.item())
        update_gates(gate)
    assert seen == [2.0, 1.5, 1.0, 0.5, 0.5]
    twin = build(tau=TemperatureSchedule(2.0, 0.5, 3))
    twin.load_state_dict(gate.state_dict())
    assert twin.tau == 0.5
