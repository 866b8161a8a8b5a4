"""Learned strengths: what they weigh, one static adapter that does the same, and training."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle
from diffusion.rivals.layer_strengths import LayerStrengths


class Dense(LoraBundle):
    """An adapter whose layers are multiplied."""

    def delta_weight(self, module, weight=None):
        return super().delta_weight(module, weight) * self.metadata["factor"](module)


@pytest.mark.parametrize("first", ["a", "b"])  # b and c lack layers, b has another rank
def test_the_first_and_the_others_are_weighed_layer_by_layer(flux, inputs, adapters, dense, first):
    given = {first: adapters[first]} | adapters
    rival = LayerStrengths(flux, given).double()
    with rival:
        assert_close(flux(**inputs)[0], dense(given))  # ones at the start
    torch.manual_seed(0)
    for parameter in rival.parameters():
        nn.init.normal_(parameter)

    def factor(kind):
        return {"factor": lambda module: rival.factors[module.replace(".", "___")][1, kind]}

    expected = {
        name: Dense(b.family, b.modules, metadata=factor(int(name != first)))
        for name, b in given.items()
    }
    with torch.no_grad():
        truth = dense(expected, {"a": 0.6, "b": 1.0, "c": -0.3})
    with rival:
        rival.set_strengths({"a": 0.6, "c": -0.3})
        assert_close(flux(**inputs)[0].detach(), truth)
    assert_close(dense({"one": rival.bundle}), truth)


def test_what_was_learned_serves_other_adapters(flux, inputs, adapters, bundle, dense):
    rival = LayerStrengths(flux, adapters).double()
    with torch.no_grad():
        for parameter in rival.parameters():
            parameter.copy_(torch.tensor([[0.5, 2.0], [3.0, 4.0]]))
    rival.set_adapters({"x": bundle(7), "y": bundle(8)})  # two: the first row
    truth = dense({"x": bundle(7), "y": bundle(8)}, {"x": 0.5, "y": 2.0})
    assert_close(dense({"one": rival.bundle}), truth)
    with rival:
        assert_close(flux(**inputs)[0].detach(), truth)
        rival.set_adapters({"y": bundle(8), "x": bundle(7)})
        assert not torch.allclose(flux(**inputs)[0].detach(), truth)


def test_factors_are_learned(flux, inputs, adapters, dense):
    target = dense(adapters, {"a": 0.3, "b": 0.8, "c": 0.8})
    rival = LayerStrengths(flux, adapters).double()
    optimizer = torch.optim.Adam(rival.parameters(), lr=0.05)
    losses = []
    with rival:
        for _ in range(80):
            loss = (flux(**inputs)[0] - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert all(parameter.grad is not None for parameter in rival.parameters())


def test_refusals(flux, bundle):
    rival = LayerStrengths(flux, {"a": bundle(1, where="attn")})
    with pytest.raises(GatesError, match="nothing is learned for"):
        rival.set_adapters({"a": bundle(1)})
    assert list(rival.adapters["a"].modules) == list(bundle(1, where="attn").modules)
