import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from core_gates.attention.head_gate import HeadGate, fuse_q_proj, split_fused_q_proj
from core_gates.attention.output_gate import GatedAttention
from tests.core_gates.drawn import filled, randn

GOLDEN = Path(__file__).parents[2] / "golden" / "attention_sequence"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
DIM, HEADS, KV_HEADS, HEAD_DIM = 12, 4, 2, 3


def tokens(*shape, dtype=torch.float64, seed=0):
    return randn(*shape, DIM, seed=seed, dtype=dtype)


def attention(**options):
    options = {"rope_theta": None, "head_dim": HEAD_DIM} | options
    return filled(GatedAttention(DIM, HEADS, KV_HEADS, **options).double())


def load(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind != "U"}
        return arrays, json.loads(str(file["meta"]))


def unfused(values, meta):
    """Return weights or gradients of the fused module under the names of ours."""
    heads, groups = meta["num_heads"], meta["num_kv_heads"]
    ours = dict(values)
    if meta["mode"] != "none":
        parts = split_fused_q_proj(ours["q_proj.weight"], heads, groups, meta["head_dim"])
        ours["q_proj.weight"], ours["gate.weight"] = parts
    return ours


@pytest.mark.parametrize("mode", ["elementwise", "headwise", "none"])
def test_golden_vectors_with_gradients(mode):
    golden, meta = load(f"gated_attn_{mode}")
    gate = {"position": "none"} if mode == "none" else {"granularity": mode}
    module = GatedAttention(
        meta["hidden_size"],
        meta["num_heads"],
        meta["num_kv_heads"],
        head_dim=meta["head_dim"],
        qk_norm=meta["qk_norm"],
        qkv_bias=meta["qkv_bias"],
        rope_theta=meta["rope_theta"],
        **gate,
    )
    parts = {
        prefix: {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        for prefix in ("weight.", "grad.")
    }
    module.load_state_dict(unfused(parts["weight."], meta))
    x = golden["x"].clone().requires_grad_()
    out = module(x)
    assert_close(out, golden["out"], **TOLERANCE)
    out.backward(golden["grad_out"])
    assert_close(x.grad, golden["grad_x"], **TOLERANCE)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert_close(gradients, unfused(parts["grad."], meta), **TOLERANCE)


@pytest.mark.parametrize("mode", ["elementwise", "headwise"])
def test_fused_projections_come_back_exactly(mode, refuses):
    golden, meta = load(f"gated_attn_{mode}")
    fused = golden["weight.q_proj.weight"]
    sizes = meta["num_heads"], meta["num_kv_heads"], meta["head_dim"]
    for tensor in (fused, fused[:, 0]):
        queries, gates = split_fused_q_proj(tensor, *sizes)
        assert queries.shape[0] == sizes[0] * sizes[2]
        assert torch.equal(fuse_q_proj(queries, gates, sizes[1]), tensor)
    rows = torch.arange(len(fused))
    queries, gates = split_fused_q_proj(rows, *sizes)
    per_group = len(fused) // 2
    assert torch.equal(queries[:32], rows[:32])
    assert torch.equal(gates[: len(gates) // 2], rows[32:per_group])
    refuses(
        ValueError,
        (
            "are not a fused projection of 4 heads of 7 features",
            lambda: split_fused_q_proj(fused, 4, 2, 7),
        ),
        ("do not fall into 3 groups", lambda: fuse_q_proj(queries, gates, 3)),
    )


@pytest.mark.fault("core A15")
@pytest.mark.parametrize("mode", ["elementwise", "headwise"])
def test_published_weights_with_biases(mode):
    """The reference gives all four projections a bias, the gate's rows of the first included."""
    golden, meta = load(f"gated_attn_{mode}")
    published = {k.removeprefix("weight."): v for k, v in golden.items() if "weight." in k}
    generator = torch.Generator().manual_seed(3)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows = len(published[f"{name}.weight"])
        published[f"{name}.bias"] = torch.randn(rows, generator=generator)
    ours = unfused(published, meta)
    heads, groups, width = meta["num_heads"], meta["num_kv_heads"], meta["head_dim"]
    ours["q_proj.bias"], ours["gate.bias"] = split_fused_q_proj(
        published["q_proj.bias"], heads, groups, width
    )
    module = GatedAttention(
        meta["hidden_size"],
        heads,
        groups,
        head_dim=width,
        granularity=mode,
        qk_norm=True,
        qkv_bias=True,
    )
    assert not any(p.any() for name, p in module.named_parameters() if name.endswith("bias"))
    module.load_state_dict(ours)
    x = golden["x"]
    fused, k, v = (
        F.linear(x, published[f"{name}.weight"], published[f"{name}.bias"])
        for name in ("q_proj", "k_proj", "v_proj")
    )
    fused = fused.unflatten(-1, (groups, -1))
    cut = heads // groups * width
    q = fused[..., :cut].reshape(*x.shape[:2], heads, width)
    gate = fused[..., cut:].reshape(*x.shape[:2], heads, -1).sigmoid()
    k, v = (t.unflatten(-1, (groups, width)).repeat_interleave(heads // groups, 2) for t in (k, v))
    q, k = (
        F.rms_norm(t, (width,), published[f"{name}_norm.weight"], 1e-6)
        for t, name in ((q, "q"), (k, "k"))
    )
    cos, sin = (golden[name][:, :, None] for name in ("cos", "sin"))

    def turned(t):
        first, second = t.chunk(2, -1)
        return t * cos + torch.cat([-second, first], -1) * sin

    y = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (turned(q), turned(k), v)), is_causal=True
    )
    y = (y.transpose(1, 2) * gate).flatten(-2)
    expected = F.linear(y, published["o_proj.weight"], published["o_proj.bias"])
    assert_close(module(x), expected, **TOLERANCE)


@pytest.mark.fault("core A15")
@pytest.mark.parametrize("padded", [False, True])
def test_without_causality_every_token_sees_all(padded):
    module, x = attention(causal=False), tokens(2, 5)
    padding = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    out = module(x, padding_mask=padding if padded else None)
    q, k, v = (
        projection(x).unflatten(-1, (-1, HEAD_DIM))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    if padded:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    gate = (x @ module.gate.weight.mT).sigmoid().unflatten(-1, (-1, HEAD_DIM))
    expected = module.o_proj((y * gate).flatten(-2))
    if padded:
        expected = expected.masked_fill(padding[..., None], 0)
    assert_close(out, expected)


def plain(module, x, *, q=None, k=None, v=None):
    """Attend without gates; a function may change the queries, keys or values."""
    q, k, v = (
        change(projection(x).unflatten(-1, (-1, HEAD_DIM)))
        for change, projection in (
            (q or (lambda t: t), module.q_proj),
            (k or (lambda t: t), module.k_proj),
            (v or (lambda t: t), module.v_proj),
        )
    )
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD_DIM**-0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
@pytest.mark.parametrize("position", ["G1", "G2", "G3", "G4"])
def test_the_gate_multiplies_what_its_position_says(position, granularity):
    module, x = attention(position=position, granularity=granularity), tokens(2, 5)
    width = HEAD_DIM if granularity == "elementwise" else 1
    gate = (x @ module.gate.weight.mT).sigmoid().unflatten(-1, (-1, width))
    assert gate.shape[2] == (HEADS if position in ("G1", "G4") else KV_HEADS)
    assert_close(module.gate_values(x), gate)

    def gated(y):
        return y * gate

    changed = {"G2": {"v": gated}, "G3": {"k": gated}, "G4": {"q": gated}, "G1": {}}[position]
    heads = plain(module, x, **changed)
    heads = gated(heads) if position == "G1" else heads
    assert_close(module(x), module.o_proj(heads.flatten(-2)))
    assert (module(x) - module.o_proj(plain(module, x).flatten(-2))).abs().max() > 1e-3


def test_g5_gates_the_result():
    module, x = attention(position="G5"), tokens(2, 5)
    expected = module.o_proj(plain(module, x).flatten(-2)) * (x @ module.gate.weight.mT).sigmoid()
    assert_close(module(x), expected)
    assert module.gate.weight.shape == (DIM, DIM)


@pytest.mark.parametrize(
    ("position", "options", "parameters"),
    [
        ("G1", {}, DIM * HEADS * HEAD_DIM),
        ("G1", {"granularity": "headwise"}, DIM * HEADS),
        ("G1", {"sharing": "head_shared"}, DIM * HEAD_DIM),
        ("G1", {"input_dependent": False}, HEADS * HEAD_DIM),
        ("G1", {"gate_bias_init": 3.0}, (DIM + 1) * HEADS * HEAD_DIM),
        ("G2", {}, DIM * KV_HEADS * HEAD_DIM),
        ("G3", {"granularity": "headwise"}, DIM * KV_HEADS),
        ("G4", {}, DIM * HEADS * HEAD_DIM),
        ("G5", {}, DIM * DIM),
    ],
)
def test_extra_parameters(position, options, parameters):
    with_gate, without = attention(position=position, **options), attention(position="none")
    count = [sum(p.numel() for p in m.parameters()) for m in (with_gate, without)]
    assert count[0] - count[1] == parameters


def head_gate(**options):
    return filled(HeadGate(DIM, HEADS, HEAD_DIM, **options).double(), seed=2)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("sigmoid", lambda z: 1 / (1 + torch.exp(-z))),
        ("silu", lambda z: z / (1 + torch.exp(-z))),
        ("identity", lambda z: z),
        ("tanh", torch.tanh),
        ("ns_sigmoid", lambda z: 0.5 + 0.5 / (1 + torch.exp(-z))),
    ],
)
@pytest.mark.parametrize("form", ["multiplicative", "additive"])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
@pytest.mark.parametrize("sharing", ["head_specific", "head_shared"])
def test_every_form(activation, function, form, granularity, sharing):
    gate = head_gate(activation=activation, form=form, granularity=granularity, sharing=sharing)
    x, y = tokens(2, 5), torch.randn(2, 5, HEADS, HEAD_DIM, dtype=torch.float64)
    values = function(x @ gate.weight.mT)
    values = values.view(2, 5, *gate.gate_shape).expand_as(y)
    assert_close(gate(x, y), y * values if form == "multiplicative" else y + values)
    assert gradcheck(gate, (x.requires_grad_(), y.requires_grad_()))


def test_gates_that_do_not_depend_on_the_input():
    gate, y = head_gate(input_dependent=False), torch.ones(2, 5, HEADS, HEAD_DIM).double()
    assert_close(gate(tokens(2, 5), y), gate(tokens(2, 5, seed=3), y), rtol=0, atol=0)
    assert_close(gate(tokens(2, 5), y)[1, 2], gate.bias.sigmoid().view(HEADS, HEAD_DIM))


def test_start():
    x = tokens(3, 50, dtype=torch.float32)
    half = HeadGate(DIM, HEADS, HEAD_DIM).gate_values(x)
    assert_close(half, torch.full_like(half, 0.5), rtol=0, atol=0.1)
    opened = HeadGate(DIM, HEADS, HEAD_DIM, bias_init=3.0).gate_values(x)
    assert_close(opened, torch.full_like(opened, 0.9526), rtol=0, atol=0.02)


def test_half_precision_computes_the_activation_in_float32():
    gate = head_gate().bfloat16()
    x, y = tokens(2, 5).bfloat16(), torch.ones(2, 5, HEADS, HEAD_DIM).bfloat16()
    values = gate.gate_values(x)
    assert values.dtype == torch.float32
    assert_close(values.flatten(-2), (x @ gate.weight.mT).float().sigmoid())
    assert gate(x, y).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1)])
def test_few_tokens(shape):
    assert attention()(tokens(*shape)).shape == (*shape, DIM)


def test_meta_device_and_round_trip():
    module = GatedAttention(DIM, HEADS, KV_HEADS, head_dim=4, device="meta")
    module.to_empty(device="cpu").reset_parameters()
    other = GatedAttention(DIM, HEADS, KV_HEADS, head_dim=4)
    other.load_state_dict(module.state_dict())
    x = tokens(2, 4, dtype=torch.float32)
    assert torch.equal(module(x), other(x))
    assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "G6"}, "position is 'G6'; choose one of none, G1, G2, G3, G4, G5"),
        ({"position": "G5", "granularity": "headwise"}, "a gate at G5 has no heads"),
        (
            {"granularity": "tokenwise"},
            "granularity is 'tokenwise'; choose one of elementwise, headwise",
        ),
        ({"form": "divisive"}, "form is 'divisive'; choose one of multiplicative, additive"),
        ({"activation": "relu"}, "activation is 'relu'; choose one of identity, tanh"),
        ({"sharing": "none"}, "sharing is 'none'; choose one of head_specific, head_shared"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_heads": 5}, "dim=12 must be a multiple of num_heads=5; set head_dim"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GatedAttention(**({"dim": DIM, "num_heads": HEADS} | options))
