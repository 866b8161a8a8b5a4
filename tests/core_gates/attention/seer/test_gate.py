import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates import AttnGate, DecodeAttnGate, GateMonitor
from core_gates.attention import BlockSelector, gate_distillation_loss
from core_gates.ops import block_sparse_attention

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LOWEST = torch.finfo(torch.float32).min


def test_golden_prefill_logits_loss_and_gradients(prefill):
    gate, golden, _meta = prefill
    q, k = (golden[name].clone().requires_grad_() for name in ("q_nope", "k_nope"))
    logits = gate(q, k)
    assert_close(logits, golden["gate_logits"], **TOLERANCE)
    assert_close(logits.softmax(-1), golden["gate_probs"], **TOLERANCE)
    past = torch.ones(logits.shape[-2:], dtype=torch.bool).tril().expand_as(logits)
    assert_close(gate.gate_values(q, k), golden["gate_probs"][past], **TOLERANCE)
    rows = logits.shape[-2]
    loss = gate_distillation_loss(logits, golden["ground_truth"], skip=(rows // 4) / rows)
    assert_close(loss, gate_distillation_loss(logits, golden["ground_truth"]), rtol=0, atol=0)
    assert_close(loss.float(), golden["kl_loss_mean_all"], **TOLERANCE)
    loss.backward()
    assert_close((q.grad, k.grad), (golden["grad_q_nope"], golden["grad_k_nope"]), **TOLERANCE)
    for part, weight in (("q", gate.weight_q), ("k", gate.weight_k)):
        if weight is not None:
            assert_close(weight.grad, golden[f"grad.mask_linear_{part}.weight"], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("nz0.3", {"nz_ratio": 0.3}),
        ("nz0.6", {"nz_ratio": 0.6}),
        ("thr0.02", {"threshold": 0.02}),
        ("thr0.1", {"threshold": 0.1}),
    ],
)
def test_golden_masks_and_sparse_outputs(prefill, name, rule, rotated):
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


def test_all_poolings(tokens):
    kinds = ["max", "min", "avg", "maxmin", "maxavg", "minavg", "maxminavg"]
    for q_kinds, k_kinds in itertools.product(kinds, kinds):
        gate = AttnGate(4, 2, 6, block_size=4, gate_dim=6, pooling=f"Q{q_kinds}_K{k_kinds}")
        assert (gate.weight_q is None) == (len(q_kinds) == 3)
        logits = gate(tokens(9, 4, dtype=torch.float32), tokens(9, 2, dtype=torch.float32))
        assert logits.shape == (2, 4, 3, 3)
        assert_close(gate.weight_k.std(), torch.tensor(0.02), rtol=0.4, atol=0)


def test_gate_is_the_product_of_pooled_projections(tokens, filled):
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


@pytest.mark.fault("46 A4")
def test_queries_may_begin_inside_a_block_of_which_those_that_exist_are_pooled(tokens, filled):
    gate = filled(AttnGate(4, 2, 6, block_size=4, gate_dim=6, dtype=torch.float64))
    q, k = tokens(14, 4), tokens(14, 2)
    same = q.clone()
    same[:, 8] = q[:, 9:12].mean(1)
    found = gate(q[:, 9:], k)
    assert found.shape[-2:] == (2, 4)
    assert_close(found, gate(same[:, 8:], k))
    padding = torch.zeros(2, 14, dtype=torch.bool)
    padding[1, :10] = True
    masked = [gate(x, k, padding_mask=padding) for x in (q[:, 9:], q)]
    assert_close(masked[0][1], masked[1][1, :, 2:])


@pytest.mark.fault("core A13")
def test_padding_is_hidden_by_block_and_pooled_by_none(filled, tokens):
    gate = filled(AttnGate(4, 2, 6, block_size=4, gate_dim=6, rope_theta=1e12))
    q, k = tokens(14, 4, dtype=torch.float32), tokens(14, 2, dtype=torch.float32)
    padding = torch.zeros(2, 14, dtype=torch.bool)
    padding[0, :6] = True  # one whole block and a half
    padding[1, 11:] = True  # the end of a block, and the short last one
    plain, logits = gate(q, k), gate(q, k, padding_mask=padding)
    assert logits[0, :, 0].eq(LOWEST).all()
    assert logits[0, :, :, 0].eq(LOWEST).all()
    assert_close(logits[0, :, 2:, 2:], plain[0, :, 2:, 2:])
    assert logits[1, :, 3].eq(LOWEST).all()
    assert_close(logits[1, :, :3, :3], gate(q[1:, :11], k[1:, :11])[0])
    # The half block in front is pooled over its two tokens, wherever they are in it.
    order = [0, 1, 2, 3, 6, 7, 6, 7, *range(8, 14)]
    twice = gate(q[:1, order], k[:1, order])  # maximum, minimum and mean are those of two tokens
    assert_close(logits[0, :, 1:, 1:], twice[0, :, 1:, 1:])
    mask = BlockSelector(threshold=0.1)(logits)
    out = block_sparse_attention(*(t.transpose(1, 2) for t in (q, k, k)), mask, 4)
    assert out.isfinite().all()


@pytest.mark.parametrize("pooling", ["Qavg_Kmaxminavg", "Qmaxavg_Kmin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [14, 6])
def test_pooled_blocks_are_all_that_is_scored(pooling, dtype, queries, filled, tokens):
    options = {"block_size": 4, "gate_dim": 6, "pooling": pooling}
    gate = filled(AttnGate(4, 2, 6, **options))
    q, k = tokens(queries, 4, dtype=dtype), tokens(14, 2, dtype=dtype)
    padding = torch.zeros(2, 14, dtype=torch.bool)
    padding[0, :5] = padding[1, 12:] = True
    for mask in (None, padding):
        pooled = AttnGate(4, 2, 6, **options).pool(q, k, padding_mask=mask)  # other weights
        assert pooled.queries.shape[:2] == (2, 4 if queries == 14 else 2)
        assert pooled.keys.shape[:2] == (2, 4)
        assert pooled.queries.dtype == pooled.keys.dtype == dtype
        assert (pooled.empty is None) == (mask is None)
        logits = gate.score(pooled)
        assert torch.equal(logits, gate(q, k, padding_mask=mask))
        found, expected = (
            torch.autograd.grad(values[values > LOWEST].sum(), [*gate.parameters()])
            for values in (logits, gate(q, k, padding_mask=mask))
        )
        assert all(map(torch.equal, found, expected))
    assert pooled.empty.tolist() == [[True, False, False, False], [False, False, False, True]]


def test_pooled_blocks_of_another_gate_are_refused(tokens, refuses):
    gate = AttnGate(4, 2, 6, block_size=4)
    q, k = tokens(8, 4), tokens(8, 2)
    others = AttnGate(4, 2, 6, block_size=4, pooling="Qavg_Kavg"), AttnGate(4, 4, 6, block_size=4)
    refuses(
        ValueError,
        (
            r"keys \(2, 2, 2, 6\) must be \(B, Nq, 4, 6\) and \(B, Nk, 2, 18\)",
            lambda: gate.score(others[0].pool(q, k)),
        ),
        (r"keys \(2, 2, 4, 18\) must be", lambda: gate.score(others[1].pool(q, q))),
        (
            "no more queries than keys",
            lambda: gate.score(gate.pool(q, k)._replace(keys=gate.pool(q, k).keys[:, 1:])),
        ),
    )


@pytest.mark.fault("core A18")
def test_the_future_is_no_choice_of_the_gate(filled, tokens):
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[0, 12:] = True
    q, k = tokens(16, 4), tokens(16, 2)
    gate = filled(AttnGate(4, 2, 6, block_size=4, gate_dim=6, dtype=torch.float64))
    decode = filled(DecodeAttnGate(4, 2, 6, block_size=4, gate_dim=6, dtype=torch.float64))
    assert len(gate.gate_values(q, k)) == 2 * 4 * 10
    assert len(gate.gate_values(q, k, padding_mask=padding)) == 4 * (6 + 10)
    assert len(decode.gate_values(q, k)) == 2 * 2 * 4 * 10
    assert len(decode.gate_values(q, k, padding_mask=padding)) == 2 * 4 * (6 + 10)
    for watched in (gate, decode):
        with GateMonitor(watched) as monitor:
            watched(q, k)
        assert monitor.compute()[type(watched).__name__]["zero"] == 0


def test_gradients(tokens, filled):
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
def test_gates_compute_in_float32(gate_class, tokens, filled):
    gate = filled(gate_class(4, 2, 6, block_size=4, gate_dim=10))
    q, k = tokens(9, 4, dtype=torch.bfloat16), tokens(9, 2, dtype=torch.bfloat16)
    expected = gate.to(torch.bfloat16)(q, k)
    assert expected.dtype == torch.float32
    exact = gate.float()(q.float(), k.float())
    assert_close(expected, exact, rtol=0.05, atol=0.3)  # averages are rounded to bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gate(q.float(), k.float()), exact, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("gate_class", "options", "message"),
    [
        (AttnGate, {"pooling": "avg"}, "pooling must look like 'Qavg_Kmaxminavg', got 'avg'"),
        (AttnGate, {"pooling": "Qavg_Kavgmax"}, "max, min, avg in this order, got 'avgmax'"),
        (AttnGate, {"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        (AttnGate, {"block_size": 0}, "block_size must be at least 1, got 0"),
        (AttnGate, {"block_size": 2.5}, "block_size must be a whole number, got 2.5"),
        (DecodeAttnGate, {"block_size": True}, "block_size must be a whole number, got True"),
        (
            DecodeAttnGate,
            {"reduction": "Qmax"},
            "choose one of Qproj, Qavgproj",
        ),
        (DecodeAttnGate, {"reduction": "Qavg"}, "Qavg needs gate_dim == head_dim=6, got 128"),
    ],
)
def test_wrong_options_are_named(gate_class, options, message):
    with pytest.raises(ValueError, match=message):
        gate_class(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | options))


@pytest.mark.parametrize("length", [0, 1])
def test_few_tokens(length, tokens):
    q, k = tokens(length, 4, dtype=torch.float32), tokens(length, 2, dtype=torch.float32)
    assert AttnGate(4, 2, 6, block_size=4)(q, k).shape == (2, 4, length, length)
    assert DecodeAttnGate(4, 2, 6, block_size=4)(q, k).shape == (2, 2, length, length)
    gate = AttnGate(4, 2, 6, device="meta").to_empty(device="cpu")
    gate.reset_parameters()
    assert gate(q, k).isfinite().all()
