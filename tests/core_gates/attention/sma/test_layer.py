import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from core_gates.attention.sma.gated_attention_unit import GatedAttentionUnit
from core_gates.attention.sma.layer import ScaleNorm, SeqBoatLayer, TokenBatchNorm

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
LAYERS = [
    "seqboat_layer_bi_relu2_localpos",
    "seqboat_layer_bi_relu2_simple",
    "seqboat_layer_causal_softmax_rotary",
]
OPTIONS = [
    {},
    {"position": "simple", "weighting": "relu2"},
    {"position": "local"},
    {"causal": False, "position": "simple"},
    {"causal": False, "position": "local", "weighting": "relu2"},
    {"causal": False, "prenorm": False, "truncation": 4},
]


def build(meta):
    return SeqBoatLayer(
        meta["embed_dim"],
        meta["zdim"],
        meta["hdim"],
        num_states=meta["ndim"],
        window=meta["window_size"],
        causal=not meta["bidirectional"],
        weighting=meta["attention_activation"],
        position="local" if meta.get("local_pos") else meta["rel_pos_bias"],
        max_positions=meta["max_positions"],
    )


def renamed(g, kind, names):
    """Return the arrays of the published layer under our names."""
    first = {"configurator": slice(0, 2), "carry_proj": slice(2, None)}
    places = {
        "norm": "norm.norm",
        "ema": "ssm",
        "configurator": "hx_proj",
        "carry_proj": "hx_proj",
        "unit.input_proj": "mx_proj",
        "unit.output_proj": "h_proj",
    }
    arrays = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if name == "configurator.log_tau":
            arrays[name] = g[f"{kind}.q_router.temp"]
        elif name == "unit.bias.table":
            arrays[name] = g[f"{kind}.rel_pos_bias.rel_pos_bias"]
        elif module == "unit":
            arrays[name] = g[f"{kind}.{leaf}"]
        else:
            array = g[f"{kind}.{places[module]}.{leaf}"]
            array = array[first[module]] if module in first else array
            arrays[name] = array.squeeze(-1) if array.ndim == 3 else array
    return arrays


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("static_shapes", [False, True])
def test_golden_values_and_gradients(name, static_shapes, vectors):
    g, meta = vectors(name)
    layer = build(meta)
    layer.static_shapes = static_shapes
    names = list(layer.state_dict())
    layer.load_state_dict(renamed(g, "weight", names))
    x = g["x"].transpose(0, 1).requires_grad_()
    mixed = layer.mix(x)
    logits = layer.configurator.logits(mixed)
    assert_close(logits * layer.configurator.log_tau.exp(), g["router_logits"], **TOLERANCE)
    assert_close(logits.softmax(-1), g["router_probs"], **TOLERANCE)
    assert torch.equal(layer.configurator(mixed).mask, g["active_mask"])
    out = layer(x)
    assert_close(out, g["out"].transpose(0, 1), **TOLERANCE)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(out, [x, *parameters.values()], g["grad_out"].transpose(0, 1))
    assert_close(grads[0], g["grad_x"].transpose(0, 1), **TOLERANCE)
    expected = renamed(g, "grad", names)
    assert expected.keys() == parameters.keys()
    for key, grad in zip(parameters, grads[1:], strict=True):
        assert_close(grad, expected[key], **TOLERANCE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options, lively_layer):
    layer = lively_layer(**options)
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    assert 0 < layer.configurator(layer.mix(x)).mask.sum() < 9
    assert gradcheck(layer, (x,))


@settings(max_examples=25)
@given(st.integers(0, 3), st.integers(0, 10), st.booleans())
def test_static_shapes_change_no_result(seed, num_tokens, causal):
    torch.manual_seed(seed)
    layer = SeqBoatLayer(4, 2, 3, num_states=2, window=2, causal=causal)
    nn.init.normal_(layer.configurator.weight)
    x = torch.randn(2, num_tokens, 4)
    compressed = layer(x)
    layer.static_shapes = True
    assert_close(layer(x), compressed)


def test_inactive_tokens_bypass_attention(lively_layer):
    layer = lively_layer()
    x = torch.randn(2, 14, 8, dtype=torch.float64)
    mask = layer.configurator(layer.mix(x)).mask
    before = layer(x)
    with torch.no_grad():
        layer.unit.output_proj.bias += 1
    assert torch.equal((layer(x) != before).any(-1), mask)
    assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("active", [True, False])
def test_all_tokens_active_or_none(active, lively_layer):
    layer = lively_layer(causal=False)
    with torch.no_grad():
        layer.configurator.weight.zero_()
        layer.configurator.bias.copy_(torch.tensor([0.0, 1.0 if active else -1.0]))
    y = layer(torch.randn(2, 7, 8, dtype=torch.float64))
    y.sum().backward()
    assert y.isfinite().all()
    # Every rank of a distributed training has a gradient for every parameter.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.unit.input_proj.weight.grad.any() == active


@pytest.mark.parametrize("norm", [ScaleNorm(), TokenBatchNorm(nn.BatchNorm1d(8))])
def test_other_norms(norm):
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 30, 8) + 1
    y = norm(x)
    axes = -1 if isinstance(norm, ScaleNorm) else (0, 1)
    assert_close(y.square().mean(axes), torch.ones_like(y.square().mean(axes)), rtol=0, atol=1e-4)
    assert SeqBoatLayer(8, 4, 6, norm=norm)(x).shape == x.shape


def test_scale_norm_has_one_scale():
    norm = ScaleNorm()
    norm.scale.data.fill_(3.0)
    assert_close(norm(torch.tensor([3.0, 4.0])), 3 * torch.tensor([3.0, 4.0]) / 12.5**0.5)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_scales_what_it_leaves(causal, lively_layer):
    layer = lively_layer(causal=causal, dropout=0.5)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    seen = []
    layer.dropout.register_forward_hook(lambda _m, inputs, y: seen.append((inputs[0], y)))
    layer(x)
    (before, after), dropped = seen[0], seen[0][1] == 0
    assert_close(after[~dropped], 2 * before[~dropped])
    assert dropped.any()
    # Causal layers drop from the whole update, others from attention alone.
    assert bool(before[~layer.configurator(layer.mix(x)).mask].any()) == causal
    layer.eval()
    assert_close(layer(x), layer(x), rtol=0, atol=0)


def test_checkpointing_and_autocast(lively_layer):
    layer = lively_layer().float()
    x = torch.randn(2, 9, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert_close(half.float(), layer(x), rtol=0.1, atol=0.1)


def test_static_shapes_compile_into_one_graph(lively_layer):
    layer = lively_layer(static_shapes=True)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.fault("core A14")
@pytest.mark.parametrize("weighting", ["softmax", "relu2"])
def test_what_empty_slots_hold_is_ignored(weighting):
    unit = GatedAttentionUnit(8, 4, 6, window=3, weighting=weighting)
    x = torch.randn(2, 5, 8)
    positions = torch.tensor([[0, 2, 5, -1, -1], [1, 2, 3, 4, 9]])
    spoiled = x.masked_fill((positions < 0).unsqueeze(-1), torch.nan).requires_grad_()
    out = unit(spoiled, positions)
    out.sum().backward()
    assert torch.equal(out[positions >= 0], unit(x, positions)[positions >= 0])
    assert all(p.grad.isfinite().all() for p in (spoiled, *unit.parameters()))


def test_options_are_checked(refuses):
    refuses(
        ValueError,
        (r"dropout must lie in \[0, 1\), got 1", lambda: SeqBoatLayer(8, 4, 6, dropout=1)),
        ("position is 'none'; choose one of", lambda: SeqBoatLayer(8, 4, 6, position="none")),
        ("key_dim must be at least 1, got 0", lambda: GatedAttentionUnit(8, 0, 6, window=3)),
        ("key_dim must be even, got 3", lambda: GatedAttentionUnit(8, 3, 6, window=3)),
        ("window must be at least 1, got 0", lambda: GatedAttentionUnit(8, 4, 6, window=0)),
    )
