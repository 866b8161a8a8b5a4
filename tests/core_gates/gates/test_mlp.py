"""The gate of implementations of MMoE against layers of PyTorch."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates import MlpGate, MultiGate

DIM, EXPERTS = 6, 4


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2 + 1


def layers_of(gate, *, norm, norm_logits):
    """The same network from modules of PyTorch."""
    layers, sizes = [], [DIM, *gate.hidden_dims, EXPERTS]
    for j, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = j == len(gate.hidden_dims)
        linear = nn.Linear(inputs, outputs)
        linear.load_state_dict({"weight": gate.weights[j], "bias": gate.biases[j]})
        layers.append(linear)
        if norm_logits if last else norm:
            layers.append(nn.BatchNorm1d(outputs))
            layers[-1].load_state_dict(gate.norms[j].state_dict())
        layers.append(nn.Softmax(-1) if last else nn.ReLU())
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("options", "norm", "norm_logits"),
    [
        ({"norm": "batch"}, True, True),  # torch-rechub
        ({"norm": "batch", "norm_logits": False}, True, False),
        ({}, False, False),  # TorchEasyRec
        ({"norm": "batch", "hidden_dims": ()}, True, True),
    ],
)
def test_it_is_the_network_of_the_library(options, norm, norm_logits):
    torch.manual_seed(0)
    gate = MlpGate(DIM, EXPERTS, **{"hidden_dims": (7, 5)} | options)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    assert gate.couples_tokens == (norm or norm_logits)
    network, x = layers_of(gate, norm=norm, norm_logits=norm_logits), drawn(9, DIM)
    for training in (True, False):
        gate.train(training)
        network.train(training)
        assert_close(gate(x).weights, network(x))
        assert_close(gate(x.view(3, 3, DIM)).weights, network(x).view(3, 3, EXPERTS))
        if training:
            gate.eval(), network.eval()
            assert_close(gate(x).weights, network(x))


def test_padding_is_in_no_statistic():
    gate, twin = (MlpGate(DIM, EXPERTS, hidden_dims=(5,), norm="batch") for _ in range(2))
    twin.load_state_dict(gate.state_dict())
    x, mask = drawn(2, 4, DIM), torch.tensor([[False, True, False, False], [False] * 4])
    padded = x.masked_fill(mask.unsqueeze(-1), torch.nan)
    weights = gate(padded, padding_mask=mask).weights
    assert_close(weights[~mask], twin(x[~mask]).weights)
    assert not weights[mask].any()
    assert_close(gate.state_dict(), twin.state_dict())


def test_gates_with_hidden_layers_mix_experts():
    mask = torch.tensor([[True, True, True, True], [True, False, False, True]])
    gates = [MlpGate(DIM, int(row.sum()), hidden_dims=(5,), norm="batch") for row in mask]
    mixture, experts = MultiGate(gates, mask), drawn(9, EXPERTS, 3)
    weights = mixture.weights(drawn(9, DIM))
    assert torch.equal(weights != 0, mask.expand(9, -1, -1))
    assert_close(mixture(drawn(9, DIM), experts), weights @ experts)
