import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.seer.decode import BlockSelector, DecodeAttnGate
from core_gates.attention.seer.gate import pool_blocks

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def test_golden_decode_step(decode_gate):
    gate, golden, meta = decode_gate
    keys = gate.compress(golden["k_nope"])
    assert_close(keys.blocks, golden["k_compressed_complete_blocks"], **TOLERANCE)
    keys = gate.compress(golden["k_new_nope"], keys)
    logits = gate.decode(golden["q_nope"], keys)
    assert_close(logits.softmax(-1)[:, :, 0], golden["scores"], **TOLERANCE)
    size = meta["block_size"]
    for rule, name in (
        ({"threshold": meta["threshold"]}, "threshold"),
        ({"token_budget": meta["budget_blocks"] * size, "block_size": size}, "budget"),
    ):
        assert torch.equal(BlockSelector(**rule)(logits)[:, :, 0], golden[f"mask_{name}"])


@pytest.mark.parametrize("reduction", ["Qproj", "Qavgproj", "Qavg", "Qorig"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_decoding_token_by_token_equals_reading_at_once(reduction, qk_norm, tokens, filled):
    """Over three ends of a block; compressing while decoding equals compressing at once."""
    gate = filled(
        DecodeAttnGate(
            4,
            2,
            6,
            block_size=4,
            gate_dim=6,
            reduction=reduction,
            qk_norm=qk_norm,
            dtype=torch.float64,
        )
    )
    q, k = tokens(15, 4), tokens(15, 2)
    logits = gate(q, k)
    assert logits.shape == (2, 2, 15, 4)
    keys = gate.compress(k[:, :2])
    for position in range(2, 15):
        keys = gate.compress(k[:, position : position + 1], keys)
        step = gate.decode(q[:, position : position + 1], keys)
        num_blocks = position // 4 + 1
        assert_close(step, logits[:, :, position : position + 1, :num_blocks])
        future = logits[:, :, position, num_blocks:]
        assert future.eq(torch.finfo(torch.float64).min).all()
        if (position + 1) % 4:
            assert step[..., -1].eq(0).all()
        assert step[..., : (position + 1) // 4].ne(0).all()
    at_once = gate.compress(k)
    assert_close(tuple(keys), tuple(at_once))
    assert at_once.rest.shape[1] == 3


def test_some_rows_of_pooled_keys_score_as_all_tokens_do(tokens, filled):
    gate = filled(DecodeAttnGate(4, 2, 6, block_size=4, gate_dim=6, dtype=torch.float64))
    q, k = tokens(15, 4), tokens(15, 2)
    rows = torch.tensor([2, 7, 8, 14])
    pooled = pool_blocks(k, 4, gate.k_kinds)
    assert_close(gate.score(q[:, rows], rows, pooled), gate(q, k)[:, :, rows])


def test_reductions_of_a_group_agree_where_they_should(tokens, filled):
    make = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "block_size": 4, "gate_dim": 6}
    make["qk_norm"] = False
    q, k = tokens(9, 4), tokens(9, 2)
    gates = {
        r: filled(DecodeAttnGate(**make, reduction=r, dtype=torch.float64))
        for r in ("Qproj", "Qavgproj", "Qavg", "Qorig")
    }
    for gate in gates.values():
        gate.weight_k.data.copy_(gates["Qavg"].weight_k)
    expected = gates["Qavg"](q, k)
    assert_close(gates["Qorig"](q, k), expected)
    gates["Qavgproj"].weight_q.data.copy_(torch.eye(6).expand(2, 1, 6, 6))
    gates["Qproj"].weight_q.data.copy_(torch.eye(6).expand(2, 2, 6, 6) / 2)
    assert_close((gates["Qavgproj"](q, k), gates["Qproj"](q, k)), (expected, expected))


def test_wrong_tokens_are_named(tokens, refuses):
    gate = DecodeAttnGate(4, 2, 6, block_size=4)
    refuses(
        ValueError,
        (r"must be \(B, T, 4, D\) and \(B, T, 2, D\)", lambda: gate(tokens(3, 2), tokens(3, 2))),
        ("as many tokens, got 2 and 3", lambda: gate(tokens(2, 4), tokens(3, 2))),
        (
            "decode takes one query after its key, got 1 of 0",
            lambda: gate.decode(tokens(1, 4), gate.compress(tokens(0, 2))),
        ),
    )


@pytest.mark.fault("core A13")
def test_decoding_with_padding_equals_reading_at_once(filled, tokens):
    """Padding in front, at the end and in between, in whole blocks and in parts of them."""
    gate = filled(DecodeAttnGate(4, 2, 6, block_size=4, gate_dim=6, dtype=torch.float64))
    padding = torch.zeros(4, 15, dtype=torch.bool)
    padding[0, :6] = padding[1, 9:] = padding[2, 3:9] = True
    q, k = (
        t.masked_fill(padding[..., None, None], torch.nan)
        for t in (tokens(15, 4, batch=4), tokens(15, 2, batch=4))
    )
    logits = gate(q, k, padding_mask=padding)
    lowest = torch.finfo(torch.float64).min
    assert logits.isfinite().all()
    assert logits[0, :, 6:, 0].eq(lowest).all()  # nothing but padding
    assert logits[0, :, 7:, 1].ne(lowest).all()
    assert (
        logits.mT[padding.unsqueeze(1).expand(4, 2, 15)[:, :, None, :].expand_as(logits.mT)]
        .eq(lowest)
        .all()
    )
    assert_close(logits[3:], gate(q[3:], k[3:]))
    assert_close(logits[1:2, :, :9, :3], gate(q[1:2, :9], k[1:2, :9]))
    keys = gate.compress(k[:, :2], padding_mask=padding[:, :2])
    for position in range(2, 15):
        now = slice(position, position + 1)
        keys = gate.compress(k[:, now], keys, padding_mask=padding[:, now])
        step = gate.decode(q[:, now], keys, padding_mask=padding[:, now])
        assert_close(step, logits[:, :, now, : position // 4 + 1])
    assert_close(tuple(keys), tuple(gate.compress(k, padding_mask=padding)))
    assert BlockSelector(k=2)(step).isfinite().all()
