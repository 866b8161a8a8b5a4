from functools import partial

import torch
from torch.testing import assert_close

from core_gates.attention.seer.gate import (
    decode_target,
    gate_distillation_loss,
    prefill_target,
)
from core_gates.ops.block_max_attention.op import block_max_attention

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def test_golden_prefill_target(prefill, rotated):
    _, golden, meta = prefill
    _, _, block_max = block_max_attention(*rotated(golden, meta), meta["block_size"])
    assert_close(block_max, golden["block_max"], **TOLERANCE)
    assert_close(prefill_target(block_max), golden["ground_truth"], **TOLERANCE)


def test_golden_decode_target(decode_gate):
    _, golden, meta = decode_gate
    q, k = golden["gt_q"].double(), golden["gt_k"].double()
    maxima = block_max_attention(q, k, k, meta["block_size"], per_row=True).block_max
    assert_close(decode_target(maxima, meta["num_kv_heads"]), golden["gt1d"], **TOLERANCE)


def test_the_loss_is_a_divergence(refuses):
    target = torch.rand(2, 3, 8, 8, dtype=torch.float64).tril()
    target = prefill_target(target)
    logits = target.log().clamp(min=torch.finfo(torch.float64).min)
    assert_close(gate_distillation_loss(logits, target), torch.zeros(()).double())
    other = torch.randn(2, 3, 8, 8).double()
    loss = gate_distillation_loss(other, target, skip=0.5)
    rows = target[..., 4:, :] * (target.log() - other.log_softmax(-1))[..., 4:, :]
    expected = rows.nan_to_num(0).sum(-1)
    assert_close(loss * 8, expected.mean())
    assert_close(gate_distillation_loss(other, target, skip=0.5, reduction="row"), expected.mean())
    refused = partial(gate_distillation_loss, other, target)
    refuses(
        ValueError,
        (r"skip must lie in \[0, 1\), got 1.0", partial(refused, skip=1.0)),
        ("reduction is 'mean'; choose one of element, row", partial(refused, reduction="mean")),
        ("must have one shape", lambda: gate_distillation_loss(other[:1], target)),
    )
