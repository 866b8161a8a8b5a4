"""Every module of the room is built where and as the caller says, also without memory."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core_gates.attention
from core_gates.attention import (
    AttnGate,
    DecodeAttnGate,
    GatedAttention,
    GatedAttentionUnit,
    GatedCrossAttention,
    HeadGate,
    MultiHeadEMA,
    ScaleNorm,
    SeqBoatLayer,
    SparseModularActivation,
    SwinBlock,
    WindowAttention,
)

D = 8
MODULES = {
    "AttnGate": lambda **o: AttnGate(4, 2, D, **o),
    "DecodeAttnGate": lambda **o: DecodeAttnGate(4, 2, D, **o),
    "GatedAttention": lambda **o: GatedAttention(D, 4, 2, qk_norm=True, qkv_bias=True, **o),
    "GatedAttentionUnit": lambda **o: GatedAttentionUnit(D, 4, 6, window=3, position="simple", **o),
    "GatedCrossAttention": lambda **o: GatedCrossAttention(D, 2, (1, 2, 2), **o),
    "HeadGate": lambda **o: HeadGate(D, 4, 2, bias_init=3.0, **o),
    "MultiHeadEMA": lambda **o: MultiHeadEMA(D, **o),
    "ScaleNorm": lambda **o: ScaleNorm(**o),
    "SeqBoatLayer": lambda **o: SeqBoatLayer(D, 4, 6, position="local", **o),
    "SparseModularActivation": lambda **o: SparseModularActivation(D, **o),
    "SwinBlock": lambda **o: SwinBlock(D, 2, (1, 2, 2), **o),
    "WindowAttention": lambda **o: WindowAttention(D, 2, (1, 2, 2), **o),
}


@pytest.mark.fault("core A17")
@pytest.mark.fault("core S9")
@pytest.mark.parametrize("name", MODULES)
def test_device_and_dtype(name):
    make = MODULES[name]
    parameters = dict(make(device="meta", dtype=torch.bfloat16).named_parameters())
    assert parameters
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters.values())
    assert {p.dtype for p in make(dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.fault("core A17")
@pytest.mark.parametrize("name", MODULES)
def test_what_was_built_without_memory_starts_like_the_others(name):
    late = MODULES[name](device="meta").to_empty(device="cpu")
    for parameter in late.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    late.reset_parameters()
    again = MODULES[name]()
    for parameter in again.parameters():
        nn.init.constant_(parameter, 7.0)
    torch.manual_seed(0)
    again.reset_parameters()
    assert_close(late.state_dict(), again.state_dict(), rtol=0, atol=0)
    torch.manual_seed(0)
    fresh = MODULES[name]()
    for key, value in fresh.state_dict().items():
        assert late.state_dict()[key].isfinite().all()
        spread, expected = late.state_dict()[key].std(correction=0), value.std(correction=0)
        assert_close(spread, expected, rtol=0.5, atol=0.02)


def test_every_module_of_the_room_is_among_them():
    offered = (getattr(core_gates.attention, name) for name in core_gates.attention.__all__)
    modules = {m.__name__ for m in offered if inspect.isclass(m) and issubclass(m, nn.Module)}
    without_parameters = {"BlockSelector", "TokenBatchNorm"}
    assert modules - without_parameters == set(MODULES)
