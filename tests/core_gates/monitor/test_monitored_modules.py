"""The monitor measures every module that offers gate values, whatever forward was given."""

import inspect

import pytest
import torch
from torch import nn

import core_gates
from core_gates import (
    AttnGate,
    DecodeAttnGate,
    FeatureSelectionGate,
    GatedAttention,
    GatedConv,
    GatedCrossAttention,
    GatedLoraLinear,
    GateMonitor,
    LowRankFeatureGate,
    MaskedMixture,
    SelfGate,
    SparseLowRank,
    adapters,
    attention,
    features,
)
from core_gates.adapters import GatedSiblings, LoraGate, LowRank, OpenGate, SoftThreshold
from core_gates.attention import HeadGate, SparseModularActivation

D, E, T = 8, 3, 6
PADDED = torch.zeros(2, T, dtype=torch.bool)
PADDED[1, 4:] = True
Tensors = (tuple, list)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def lora():
    return GatedLoraLinear(nn.Linear(D, D), [LowRank(draw(2, D), draw(D, 2))] * E)


STREAMS = (draw(1, 4, 2, 4, 4), draw(1, 4, 2, 4, 4), draw(1, 4, 2, 4, 4))
TOKENS = draw(2, T, D)
HEADS = (draw(2, T, 2, 4), draw(2, T, 2, 4))
CASES = {
    "AttnGate": (lambda: AttnGate(2, 2, 4, block_size=2, gate_dim=4), HEADS, {}),
    "AttnGate padded": (
        lambda: AttnGate(2, 2, 4, block_size=2, gate_dim=4),
        HEADS,
        {"padding_mask": PADDED},
    ),
    "DecodeAttnGate": (lambda: DecodeAttnGate(2, 2, 4, block_size=2, gate_dim=4), HEADS, {}),
    "FeatureSelectionGate": (lambda: FeatureSelectionGate(D), (TOKENS,), {}),
    "GatedAttention": (lambda: GatedAttention(D, 2), (TOKENS,), {}),
    "GatedAttention padded": (
        lambda: GatedAttention(D, 2, rope_theta=1e4),
        (TOKENS,),
        {"padding_mask": PADDED, "positions": torch.arange(T)},
    ),
    "GatedConv": (lambda: GatedConv(4, 4, 3), STREAMS, {}),
    "GatedCrossAttention": (lambda: GatedCrossAttention(4, 2, (1, 2, 2)), STREAMS, {}),
    "GatedLoraLinear": (lora, (TOKENS,), {}),
    "GatedSiblings": (
        lambda: GatedSiblings(
            [nn.Linear(D, D), nn.Linear(D, 4)], [LowRank(draw(2, D), draw(D + 4, 2))] * E
        ),
        (TOKENS,),
        {},
    ),
    "HeadGate": (lambda: HeadGate(D, 2, 4), (TOKENS, HEADS[0]), {}),
    "LoraGate": (lambda: LoraGate(D), (TOKENS, draw(2, T, E, D)), {}),
    "OpenGate": (lambda: OpenGate(D), (TOKENS, draw(2, T, E, D)), {}),
    "LowRankFeatureGate": (lambda: LowRankFeatureGate(D, rank=2), (draw(5, D),), {}),
    "LowRankFeatureGates": (
        lambda: features.LowRankFeatureGates(D, 3, 2, reads=[[0], [1], [0, 1]]),
        (draw(5, 2, D),),
        {},
    ),
    "PriorGate": (
        lambda: features.PriorGate(D, 4, input_dim=5),
        (draw(5, D), draw(5, 4)),
        {"seen": draw(5, 5)},
    ),
    "TransferGate": (lambda: features.TransferGate(D, 4), (draw(5, D), draw(5, D)), {}),
    "MaskedMixture of two inputs": (
        lambda: MaskedMixture(D, torch.ones(2, E, dtype=torch.bool), reads=[1, 0]),
        (draw(5, 2, D), draw(5, E, D)),
        {},
    ),
    "MaskedMixture": (
        lambda: MaskedMixture(D, torch.ones(2, E, dtype=torch.bool)),
        (draw(5, D), draw(5, E, D)),
        {},
    ),
    "SelfGate": (lambda: SelfGate(D, E), (draw(5, D), draw(5, E, D)), {}),
    "SoftThreshold": (lambda: SoftThreshold(4), (draw(5, 4),), {}),
    "SparseLowRank": (lambda: SparseLowRank(D, D, 4), (TOKENS,), {}),
    "SparseModularActivation": (
        lambda: SparseModularActivation(D),
        (TOKENS,),
        {"padding_mask": PADDED},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_watching_changes_nothing_and_sees_the_gate_once(case):
    make, inputs, options = case
    module = make().eval()
    alone = module(*inputs, **options)
    with GateMonitor(nn.ModuleDict({"layer": module})) as monitor:
        watched = module(*inputs, **options)
    first, second = (out if isinstance(out, Tensors) else (out,) for out in (alone, watched))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert list(monitor.compute()) == ["layer"]  # not again as what lies within
    figures = monitor.compute()["layer"]
    values = module.gate_values(*inputs, **options).detach().double()
    assert figures["values"] == values.numel() > 0
    assert figures["mean"] == pytest.approx(values.mean().item(), rel=1e-6, abs=1e-9)


def test_attention_without_a_gate_has_no_values():
    plain = GatedAttention(D, 2, position="none")
    with GateMonitor(plain) as monitor:
        plain(TOKENS)
    assert monitor.compute() == {"GatedAttention": {"values": 0.0, "non_finite": 0.0}}


def test_padding_is_not_measured():
    module = GatedAttention(D, 2)
    whole = module.gate_values(TOKENS)
    kept = module.gate_values(TOKENS, padding_mask=PADDED)
    assert torch.equal(kept, torch.cat([whole[0], whole[1, :4]]))


def test_every_exported_module_with_gate_values_is_among_the_cases():
    offering = {
        name
        for room in (core_gates, adapters, attention, features)
        for name in room.__all__
        if inspect.isclass(module := getattr(room, name)) and hasattr(module, "gate_values")
    }
    aliases = {"HardAttentionGate"}  # the same class as FeatureSelectionGate
    assert offering - aliases == {name.split()[0] for name in CASES}


@pytest.mark.parametrize("name", [n for n in CASES if " " not in n])
def test_gate_values_take_what_forward_takes(name):
    module = type(CASES[name][0]())
    forward = inspect.signature(module.forward).parameters
    assert list(inspect.signature(module.gate_values).parameters) == list(forward)
