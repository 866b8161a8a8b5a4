import pytest

import core_gates.attention
from core_gates.attention import sma


@pytest.mark.fault("core S6")
@pytest.mark.parametrize(
    ("room", "needed"),
    [
        (
            core_gates.attention,
            "AttnGate BlockSelector CompressedKeys DecodeAttnGate GatedAttention"
            " GatedCrossAttention HeadGate KeyValueCache SeqBoatLayer TokenBatchNorm"
            " gate_distillation_loss rotate sma",
        ),
        (sma, "SeqBoatLayer SeqBoatState ScaleNorm TokenBatchNorm prefill step"),
    ],
)
def test_what_users_need_is_exported(room, needed):
    assert set(needed.split()) <= set(room.__all__)
    assert sorted(room.__all__) == sorted(set(room.__all__))
    assert all(getattr(room, name) is not None for name in room.__all__)
