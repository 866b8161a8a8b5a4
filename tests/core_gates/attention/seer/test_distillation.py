from functools import partial

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.gate import (
    decode_target,
    gate_distillation_loss,
    pad_to_blocks,
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


MASK = torch.zeros(3, 22, dtype=torch.bool)
MASK[0, :8] = True
MASK[1, 13:] = True


def padded_problem(rows):
    """Return random logits and targets of three sequences, NaN where they concern padding."""
    generator = torch.Generator().manual_seed(4)
    columns = 6
    target = torch.rand(3, 2, rows, columns, generator=generator).double()
    logits = torch.randn(3, 2, rows, columns, generator=generator).double()
    size = 1 if rows == 22 else 4
    future = torch.arange(columns) * 4 > torch.arange(rows).unsqueeze(-1) * size
    hidden_rows = MASK if rows == 22 else pad_to_blocks(MASK, 4).all(-1)
    hidden_columns = pad_to_blocks(MASK, 4).all(-1)
    hidden = hidden_rows[:, None, :, None] | hidden_columns[:, None, None, :]
    lowest = torch.finfo(torch.float64).min
    logits = logits.masked_fill(future | hidden, lowest)
    target = target.masked_fill(future, 0).masked_fill(hidden, torch.nan)
    return logits, target, ~hidden_rows, ~hidden_columns


@pytest.mark.fault("core A13")
@pytest.mark.parametrize("reduction", ["element", "row"])
@pytest.mark.parametrize("rows", [6, 22])
@pytest.mark.parametrize("skip", [0.0, 0.25, 0.5])
def test_the_loss_of_a_padded_batch_is_that_of_its_sequences(reduction, rows, skip):
    logits, target, real_rows, real_columns = padded_problem(rows)
    logits.requires_grad_()
    options = {"skip": skip, "reduction": reduction}
    total = count = 0
    for i in range(3):
        alone = logits[i : i + 1, :, real_rows[i]][..., real_columns[i]]
        wanted = prefill_target(target[i : i + 1, :, real_rows[i]][..., real_columns[i]])
        left = alone.shape[2] - int(skip * alone.shape[2])
        number = left * alone.shape[3] if reduction == "element" else left
        total = total + number * gate_distillation_loss(alone, wanted, **options)
        count += number
    loss = gate_distillation_loss(logits, target, padding_mask=MASK, block_size=4, **options)
    assert_close(loss, total / count)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(gradient, torch.autograd.grad(total / count, logits)[0])
    nothing = torch.zeros_like(MASK)
    whole, wanted = logits[2:].detach(), prefill_target(target[2:])
    assert_close(
        gate_distillation_loss(whole, wanted, padding_mask=nothing[2:], block_size=4, **options),
        gate_distillation_loss(whole, wanted, **options),
    )
    everything = gate_distillation_loss(
        logits, target, padding_mask=~nothing, block_size=4, **options
    )
    assert everything == 0


def test_padding_that_does_not_fit_is_refused(refuses):
    logits, target, *_ = padded_problem(6)
    refuses(
        ValueError,
        (
            "row for each of 22 tokens or 2 blocks of 16",
            lambda: gate_distillation_loss(logits, target, padding_mask=MASK, block_size=16),
        ),
        (
            r"padding_mask \(2, 22\) must have the shape",
            lambda: gate_distillation_loss(logits, target, padding_mask=MASK[1:], block_size=4),
        ),
    )
