from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.cross import GatedCrossAttention
from core_gates.attention.window import WindowLayout
from tests.core_gates.drawn import filled, randn

GOLDEN = Path(__file__).parents[2] / "golden" / "weather" / "adas_gated_cross_attention_a.npz"
WINDOW = (2, 3, 4)
EXACT = {"rtol": 0, "atol": 1e-10}


def streams(size=(4, 6, 16), batch=1, dim=6):
    x, o, g = (randn(batch, dim, *size, seed=seed) for seed in range(3))
    return x, o, g.sigmoid()


def cross(**options):
    torch.manual_seed(0)
    return filled(GatedCrossAttention(6, 2, WINDOW, **options).double(), scale=0.5)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].ndim}


def ours(name):
    for old, new in (
        ("back", "background"),
        ("obser", "observation"),
        ("norm_condition", "norm_key"),
        ("relative_position_bias_table", "position_bias"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
        (".attn.q.", ".attn.qkv."),
    ):
        name = name.replace(old, new)
    return name


def test_official_vectors_with_gradients(golden):
    weights = {}
    for name, value in golden.items():
        if not name.startswith("w/") or ".attn.k." in name or ".attn.v." in name:
            continue
        if ".attn.q." in name:
            value = torch.cat([golden[name.replace(".q.", f".{part}.")] for part in "qkv"])
        weights[ours(name[2:])] = value.flatten(1) if name == "w/gate.weight" else value
    module = GatedCrossAttention(6, 2, tuple(golden["window"].tolist())).double()
    module.load_state_dict(weights)
    inputs = [golden[f"in/{name}"].clone().requires_grad_() for name in ("x1", "x2", "gate")]
    outputs = module(*inputs)
    for name, output in zip(("x1", "x2", "gate"), outputs, strict=True):
        assert_close(output, golden[f"out/{name}"], **EXACT)
    sum((y * golden[f"in/cot{i}"]).sum() for i, y in enumerate(outputs)).backward()
    for name, leaf in zip(("x1", "x2", "gate"), inputs, strict=True):
        assert_close(leaf.grad, golden[f"grad/{name}"], **EXACT)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    checked = 0
    for name, expected in golden.items():
        if name.startswith("grad/w/"):
            gradient = gradients[ours(name.removeprefix("grad/w/"))]
            gradient = gradient[:6] if ".attn.q." in name else gradient
            assert_close(gradient.reshape(expected.shape), expected, **EXACT)
            checked += 1
    assert checked == 3


def test_gated_residual_is_spelled_without_its_cancelling_terms():
    module = cross()
    x, o, g = streams()
    plain, shifted = (WindowLayout.of(x.shape[2:], WINDOW, shifted=s) for s in (False, True))

    def block(function, query, key, layout):
        return layout.reverse(function(layout.partition(query), layout.partition(key), layout))

    x_m = x * (1 - g) + block(module.background1, x * g, o, plain)
    o_m = block(module.observation1, o, x, plain)
    x_2 = x_m * (1 - g) + block(module.background2, x_m * g, o_m, shifted)
    o_2 = block(module.observation2, o_m, x_m, shifted)
    g_2 = module.gate(g.movedim(1, -1)).movedim(-1, 1).sigmoid()
    assert_close((module(x, o, g), module.gate_values(x, o, g)), ((x_2, o_2, g_2), g_2))


def test_ungated_control_has_the_parameters_but_not_the_gates():
    gated, ungated = cross(), cross(gated=False)
    ungated.load_state_dict(gated.state_dict())
    x, o, g = streams()
    other = 1 - g
    for first, second in zip(ungated(x, o, g)[:2], ungated(x, o, other)[:2], strict=True):
        assert torch.equal(first, second)
    assert (gated(x, o, g)[0] - gated(x, o, other)[0]).abs().max() > 1e-2
    assert_close(ungated(x, o, g), (*gated(x, o, torch.ones_like(g))[:2], gated(x, o, g)[2]))


@pytest.mark.parametrize(("dim", "reaches"), [(2, False), (3, False), (4, True)])
def test_only_longitude_wraps_around(dim, reaches):
    """A change in the first cells reaches the last ones only around the globe."""
    module = cross()
    x, o, g = streams((4, 9, 16))
    other = x.clone()
    other.narrow(dim, 0, 1).copy_(randn(*x.narrow(dim, 0, 1).shape, seed=9))
    change = (module(other, o, g)[0] - module(x, o, g)[0]).abs()
    last = x.shape[dim] - 1
    assert change.narrow(dim, 2, 1).max() > 1e-3
    assert (change.narrow(dim, last, 1).max() > 1e-9) == reaches


def test_recompute_and_tracing_change_nothing():
    inputs = streams()
    expected = cross()(*inputs)
    leaves = [t.requires_grad_() for t in streams()]
    assert_close(cross(recompute=True)(*leaves), expected)
    assert_close(torch.compile(cross(), backend="eager", fullgraph=True)(*inputs), expected)


def test_bfloat16_autocast_stays_close():
    torch.manual_seed(0)
    module, inputs = GatedCrossAttention(6, 2, WINDOW), [t.float() for t in streams()]
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(*inputs)
    assert_close([t.float() for t in rough], list(module(*inputs)), rtol=0.05, atol=0.05)


def test_streams_must_agree(refuses):
    x, o, g = streams()
    refuses(
        ValueError,
        ("must have one shape", lambda: cross()(x, o[..., :-1], g)),
        (r"\(B, C, D, H, W\)", lambda: cross()(*[t[:, :, 0] for t in (x, o, g)])),
    )


@pytest.mark.fault("core A17")
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", [(4, 6, 16), (4, 9, 15)])
def test_an_empty_batch_gives_an_empty_batch(size, gated):
    module = cross(gated=gated)
    inputs = [torch.zeros(0, 6, *size, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    outputs = module(*inputs)
    assert [y.shape for y in outputs] == [(0, 6, *size)] * 3
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
