"""Gates that know the diffusion time of a model whose layers are not told it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates.adapters import DiffusionTime, GatedLoraLinear, LoraGate, LowRank, attach_adapters
from tests.core_gates.drawn import filled

DIM = 6


class Denoiser(nn.Module):
    """Two layers in a block that may be recomputed; the time is an argument of the model alone."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
        self.recompute = False

    def forward(self, x, timestep=None, scale=1.0):
        x = x * scale
        return (
            checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x),
        )


def gate():
    return filled(LoraGate(DIM, time="film", dtype=torch.float64), scale=0.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Denoiser().double()
    given = [LowRank(*(torch.randn(*s, dtype=torch.float64) for s in ((2, DIM), (DIM, 2))))]
    layers = attach_adapters(
        made, lambda linear: GatedLoraLinear(linear, given, gate=gate()), transparent=True
    )
    clock = DiffusionTime(made, scale=1000.0)
    for layer in layers.values():
        layer.clock = clock
    return made, layers, clock


def by_hand(layers, x, time):
    first, last = layers.values()
    return last(first(x, time=time).tanh(), time=time)


@pytest.mark.parametrize("how", ["keyword", "place", "a sample"])
def test_the_time_of_the_model_reaches_the_gates(model, how):
    made, layers, _ = model
    x = torch.randn(3, DIM, dtype=torch.float64)
    time = torch.tensor([0.1, 0.5, 0.9] if how == "a sample" else 0.3, dtype=torch.float64)
    (found,) = made(x, time) if how == "place" else made(x, timestep=time)
    assert_close(found, by_hand(layers, x, 1000 * time))
    (later,) = made(x, timestep=time + 0.05)
    assert not torch.allclose(later, found)


def test_a_recomputed_block_has_the_time_of_its_own_forward_pass(model):
    made, layers, _ = model
    x = torch.randn(3, DIM, dtype=torch.float64)
    parameters = [p for layer in layers.values() for p in layer.gate.parameters()]

    def loss():
        times = torch.tensor([0.2, 0.8], dtype=torch.float64).unbind()
        (early,), (late,) = (made(x, timestep=time) for time in times)
        return early.square().sum() - 0.5 * late.square().sum()

    expected = torch.autograd.grad(loss(), parameters)
    made.recompute = True
    assert_close(torch.autograd.grad(loss(), parameters), expected)


def test_it_stops_and_what_is_missing_is_said(refuses, model):
    made, _, clock = model
    x = torch.randn(3, DIM, dtype=torch.float64)
    refuses(ValueError, ("needs the diffusion time", lambda: made(x)))
    clock.stop()
    clock.time = None
    refuses(ValueError, ("needs the diffusion time", lambda: made(x, timestep=torch.tensor(0.5))))
    assert not made._forward_hooks
    assert not made._forward_pre_hooks
    with pytest.raises(ValueError, match=r"Denoiser.forward has no argument 't': it takes x, time"):
        DiffusionTime(made, argument="t")


def test_all_layers_may_share_one_gate_of_the_published_kind():
    adapt = partial(GatedLoraLinear, adapters=[LowRank(torch.ones(1, DIM), torch.ones(DIM, 1))])
    made = Denoiser()
    attach_adapters(made, adapt)
    (found,) = made(torch.zeros(1, DIM))
    assert found.isfinite().all()
