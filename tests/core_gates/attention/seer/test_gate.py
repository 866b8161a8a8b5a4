import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates.attention.rotary import rotate
from core_gates.attention.seer.decode import DecodeAttnGate
from core_gates.attention.seer.distillation import (
    decode_target,
    gate_distillation_loss,
    prefill_target,
)
from core_gates.attention.seer.gate import AttnGate
from core_gates.attention.seer.pooling import pool_blocks
from core_gates.attention.seer.selector import BlockSelector
from core_gates.ops.block_max_attention.op import block_max_attention
from core_gates.ops.block_sparse_attention.op import block_sparse_attention

GOLDEN = Path(__file__).parents[3] / "golden" / "attention_sequence"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PREFILL = ["seer_prefill_Qavg_Kmaxminavg", "seer_prefill_Qmaxavg_Kavg_double"]
LOWEST = torch.finfo(torch.float32).min


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind != "U"}
        return arrays, json.loads(str(file["meta"]))


@pytest.fixture(params=PREFILL)
def prefill(request):
    golden, meta = load(request.param)
    gate = AttnGate(
        meta["num_q_heads"],
        meta["num_kv_heads"],
        meta["head_dim"],
        block_size=meta["block_size"],
        gate_dim=meta["gate_hidden"],
        pooling=meta["gate_type"],
        force_double=meta["force_double"],
        rope_theta=meta["theta"],
    )
    weights = {
        f"weight_{part}": golden[f"weight.mask_linear_{part}.weight"]
        for part in "qk"
        if f"weight.mask_linear_{part}.weight" in golden
    }
    gate.load_state_dict(weights)
    return gate, golden, meta


def rotated(golden, meta):
    """Return q, k and v in float64 as attention takes them, (B, H, L, D)."""
    q, k, v = (golden[name].double() for name in ("q_nope", "k_nope", "v"))
    positions = torch.arange(q.shape[1])
    q, k = (rotate(t, positions, meta["theta"]) for t in (q, k))
    return tuple(t.transpose(1, 2) for t in (q, k, v))


def test_golden_prefill_logits_loss_and_gradients(prefill):
    gate, golden, _meta = prefill
    q, k = (golden[name].clone().requires_grad_() for name in ("q_nope", "k_nope"))
    logits = gate(q, k)
    assert_close(logits, golden["gate_logits"], **TOLERANCE)
    assert_close(gate.gate_values(q, k), golden["gate_probs"], **TOLERANCE)
    rows = logits.shape[-2]
    loss = gate_distillation_loss(logits, golden["ground_truth"], skip=(rows // 4) / rows)
    assert_close(loss, gate_distillation_loss(logits, golden["ground_truth"]), rtol=0, atol=0)
    assert_close(loss.float(), golden["kl_loss_mean_all"], **TOLERANCE)
    loss.backward()
    assert_close(q.grad, golden["grad_q_nope"], **TOLERANCE)
    assert_close(k.grad, golden["grad_k_nope"], **TOLERANCE)
    for part, weight in (("q", gate.weight_q), ("k", gate.weight_k)):
        if weight is not None:
            assert_close(weight.grad, golden[f"grad.mask_linear_{part}.weight"], **TOLERANCE)


def test_golden_prefill_target(prefill):
    _, golden, meta = prefill
    _, _, block_max = block_max_attention(*rotated(golden, meta), meta["block_size"])
    assert_close(block_max, golden["block_max"], **TOLERANCE)
    assert_close(prefill_target(block_max), golden["ground_truth"], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("nz0.3", {"nz_ratio": 0.3}),
        ("nz0.6", {"nz_ratio": 0.6}),
        ("thr0.02", {"threshold": 0.02}),
        ("thr0.1", {"threshold": 0.1}),
    ],
)
def test_golden_masks_and_sparse_outputs(prefill, name, rule):
    gate, golden, meta = prefill
    expected = golden[f"mask_{name}"]
    mask = BlockSelector(**rule)(gate(golden["q_nope"], golden["k_nope"]))
    diagonal = torch.eye(mask.shape[-1], dtype=torch.bool)
    assert torch.equal(mask, expected | diagonal)
    qkv, size = rotated(golden, meta), meta["block_size"]
    with_diagonal = golden.get(f"sparse_out_{name}_plus_diag")
    if with_diagonal is not None:
        assert torch.equal(mask, golden[f"mask_{name}_plus_diag"])
        assert_close(block_sparse_attention(*qkv, mask, size), with_diagonal, **TOLERANCE)
    if f"sparse_out_{name}" in golden:
        wanted = golden[f"sparse_out_{name}"].nan_to_num(0)  # rows without any key
        assert_close(block_sparse_attention(*qkv, expected, size), wanted, **TOLERANCE)


def decode_gate():
    golden, meta = load("seer_decode_Qproj")
    gate = DecodeAttnGate(
        meta["num_q_heads"],
        meta["num_kv_heads"],
        meta["head_dim"],
        block_size=meta["block_size"],
        gate_dim=meta["gate_hidden"],
        reduction=meta["q_head_pooling"],
        k_pooling=meta["gate_type"],
        qk_norm=meta["use_qk_norm"],
        rope_theta=meta["theta"],
    )
    names = {
        "weight_q": "linear_q",
        "weight_k": "linear_k",
        "q_norm.weight": "qnorm",
        "k_norm.weight": "knorm",
    }
    gate.load_state_dict({k: golden[f"weight.attngate_{v}.weight"] for k, v in names.items()})
    return gate, golden, meta


def test_golden_decode_step():
    gate, golden, meta = decode_gate()
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


def test_golden_decode_target():
    _, golden, meta = decode_gate()
    q, k = golden["gt_q"].double(), golden["gt_k"].double()
    maxima = block_max_attention(q, k, k, meta["block_size"], per_row=True).block_max
    assert_close(decode_target(maxima, meta["num_kv_heads"]), golden["gt1d"], **TOLERANCE)


def tokens(length, heads, dim=6, batch=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)
    return values.to(dtype)


def filled(gate):
    generator = torch.Generator().manual_seed(9)
    for parameter in gate.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values)
    return gate


@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_pooling_over_short_blocks(length):
    x = tokens(length, 2)
    pooled = pool_blocks(x, 4, ("max", "min", "avg"))
    assert pooled.shape == (2, -(-length // 4), 2, 18)
    for block in range(pooled.shape[1]):
        part = x[:, 4 * block : 4 * block + 4]
        expected = [part.amax(1), part.amin(1), part.sum(1) / part.shape[1]]
        assert_close(pooled[:, block], torch.cat(expected, -1))


def test_all_poolings():
    kinds = ["max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg"]
    for q_kinds, k_kinds in itertools.product(kinds, kinds):
        gate = AttnGate(4, 2, 6, block_size=4, gate_dim=6, pooling=f"Q{q_kinds}_K{k_kinds}")
        assert (gate.weight_q is None) == (len(q_kinds) == 3)
        logits = gate(tokens(9, 4, dtype=torch.float32), tokens(9, 2, dtype=torch.float32))
        assert logits.shape == (2, 4, 3, 3)
        assert_close(gate.weight_k.std(), torch.tensor(0.02), rtol=0.4, atol=0)


def test_gate_is_the_product_of_pooled_projections():
    """Without rotation: the first blocks of queries and keys are at position 0."""
    gate = filled(AttnGate(4, 2, 6, block_size=4, gate_dim=10, dtype=torch.float64))
    q, k = tokens(9, 4), tokens(9, 2)
    logits = gate(q, k)
    for head in range(4):
        pooled = torch.cat([k[:, :4, head // 2].amax(1), k[:, :4, head // 2].amin(1)], -1)
        pooled = torch.cat([pooled, k[:, :4, head // 2].mean(1)], -1)
        query = q[:, :4, head].mean(1) @ gate.weight_q[head]
        expected = (query * (pooled @ gate.weight_k[head // 2])).sum(-1) / 10**0.5
        assert_close(logits[:, head, 0, 0], expected)


def test_later_tokens_do_not_change_earlier_rows():
    gate = filled(AttnGate(4, 2, 6, block_size=4, gate_dim=6, dtype=torch.float64))
    q, k = tokens(14, 4), tokens(14, 2)
    logits = gate(q, k)
    assert_close(gate(q[:, :8], k[:, :8]), logits[:, :, :2, :2])
    assert_close(gate(q[:, 8:], k), logits[:, :, 2:])
    assert (
        logits.triu(1)
        .masked_select(torch.ones(4, 4).triu(1) > 0)
        .eq(torch.finfo(torch.float64).min)
        .all()
    )
    with pytest.raises(ValueError, match="5 queries must be the last of 14 positions"):
        gate(q[:, 9:], k)


def test_blocks_of_padding_are_hidden():
    gate = filled(AttnGate(4, 2, 6, block_size=4, gate_dim=6))
    q, k = tokens(14, 4, dtype=torch.float32), tokens(14, 2, dtype=torch.float32)
    padding = torch.zeros(2, 14, dtype=torch.bool)
    padding[0, :6] = True  # one whole block and a half
    padding[1, 12:] = True  # the short last block
    plain, logits = gate(q, k), gate(q, k, padding_mask=padding)
    assert logits[0, :, 0].eq(LOWEST).all()
    assert logits[0, :, :, 0].eq(LOWEST).all()
    assert_close(logits[0, :, 1:, 1:], plain[0, :, 1:, 1:])
    assert logits[1, :, 3].eq(LOWEST).all()
    assert_close(logits[1, :, :3, :3], plain[1, :, :3, :3])
    mask = BlockSelector(threshold=0.1)(logits)
    out = block_sparse_attention(*(t.transpose(1, 2) for t in (q, k, k)), mask, 4)
    assert out.isfinite().all()


@pytest.mark.parametrize("reduction", ["Qproj", "Qavgproj", "Qavg", "Qorig"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_decoding_token_by_token_equals_reading_at_once(reduction, qk_norm):
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


def test_reductions_of_a_group_agree_where_they_should():
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
    assert_close(gates["Qavgproj"](q, k), expected)
    assert_close(gates["Qproj"](q, k), expected)


def test_gradients():
    prefill = filled(AttnGate(2, 1, 4, block_size=2, gate_dim=6, dtype=torch.float64))
    decode = filled(DecodeAttnGate(2, 1, 4, block_size=2, gate_dim=6, dtype=torch.float64))
    q, k = (t.requires_grad_() for t in (tokens(5, 2, 4, 1), tokens(5, 1, 4, 1)))
    for gate in (prefill, decode):
        names, parameters = zip(*gate.named_parameters(), strict=True)

        def probs(q, k, *parameters, gate=gate, names=names):
            weights = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(gate, weights, (q, k)).softmax(-1)

        assert gradcheck(probs, (q, k, *parameters))


@pytest.mark.parametrize("gate_class", [AttnGate, DecodeAttnGate])
def test_gates_compute_in_float32(gate_class):
    gate = filled(gate_class(4, 2, 6, block_size=4, gate_dim=10))
    q, k = tokens(9, 4, dtype=torch.bfloat16), tokens(9, 2, dtype=torch.bfloat16)
    expected = gate.to(torch.bfloat16)(q, k)
    assert expected.dtype == torch.float32
    exact = gate.float()(q.float(), k.float())
    assert_close(expected, exact, rtol=0.05, atol=0.3)  # averages are rounded to bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gate(q.float(), k.float()), exact, rtol=0, atol=0)


def test_distillation_learns_the_target():
    torch.manual_seed(0)
    gate = AttnGate(2, 2, 6, block_size=4, gate_dim=6)
    q, k = tokens(32, 2, batch=1, dtype=torch.float32), tokens(32, 2, batch=1, dtype=torch.float32)
    maxima = block_max_attention(*(3 * t.transpose(1, 2) for t in (q, k, k)), 4).block_max
    target = prefill_target(maxima)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        loss = gate_distillation_loss(gate(q, k), target, reduction="row")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_loss_is_a_divergence():
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
    for options, message in (
        ({"skip": 1.0}, r"skip must lie in \[0, 1\), got 1.0"),
        ({"reduction": "mean"}, "reduction must be element or row, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            gate_distillation_loss(other, target, **options)
    with pytest.raises(ValueError, match="must have one shape"):
        gate_distillation_loss(other[:1], target)


@pytest.mark.parametrize(
    ("gate_class", "options", "message"),
    [
        (AttnGate, {"pooling": "avg"}, "pooling must look like 'Qavg_Kmaxminavg', got 'avg'"),
        (AttnGate, {"pooling": "Qavg_Kavgmax"}, "max, min, avg in this order, got 'avgmax'"),
        (AttnGate, {"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        (AttnGate, {"block_size": 0}, "block_size must be at least 1, got 0"),
        (DecodeAttnGate, {"reduction": "Qmax"}, "reduction must be one of Qproj, Qavgproj"),
        (DecodeAttnGate, {"reduction": "Qavg"}, "Qavg needs gate_dim == head_dim=6, got 128"),
    ],
)
def test_wrong_options_are_named(gate_class, options, message):
    with pytest.raises(ValueError, match=message):
        gate_class(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | options))


def test_wrong_tokens_are_named():
    gate = DecodeAttnGate(4, 2, 6, block_size=4)
    with pytest.raises(ValueError, match=r"must be \(B, T, 4, D\) and \(B, T, 2, D\)"):
        gate(tokens(3, 2), tokens(3, 2))
    with pytest.raises(ValueError, match="as many tokens, got 2 and 3"):
        gate(tokens(2, 4), tokens(3, 2))
    with pytest.raises(ValueError, match="decode takes one query after its key, got 1 of 0"):
        gate.decode(tokens(1, 4), gate.compress(tokens(0, 2)))


@pytest.mark.parametrize("length", [0, 1])
def test_few_tokens(length):
    q, k = tokens(length, 4, dtype=torch.float32), tokens(length, 2, dtype=torch.float32)
    assert AttnGate(4, 2, 6, block_size=4)(q, k).shape == (2, 4, length, length)
    assert DecodeAttnGate(4, 2, 6, block_size=4)(q, k).shape == (2, 2, length, length)
    gate = AttnGate(4, 2, 6, device="meta").to_empty(device="cpu")
    gate.reset_parameters()
    assert gate(q, k).isfinite().all()
