import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from core_gates.attention import GatedAttention, KeyValueCache, rotary_table, rotate
from tests.core_gates.drawn import randn


@pytest.mark.fault("core S8")
@pytest.mark.parametrize(
    ("interleaved", "first", "second"), [(False, [0, 1], [2, 3]), (True, [0, 2], [1, 3])]
)
def test_which_features_are_a_pair(interleaved, first, second):
    x = randn(5, 4)
    turned = rotate(x, torch.arange(5), 100.0, interleaved=interleaved)
    angles = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1]).double()
    plane = torch.complex(x[:, first], x[:, second]) * torch.polar(torch.ones_like(angles), angles)
    assert_close((turned[:, first], turned[:, second]), (plane.real, plane.imag))


def test_positions_broadcast():
    x = randn(2, 5, 3, 4)
    by_head = rotate(x.transpose(1, 2), torch.arange(5))
    assert_close(rotate(x, torch.arange(5)[:, None]), by_head.transpose(1, 2))
    shifted = rotate(x, (torch.tensor([[0], [7]]) + torch.arange(5))[..., None])
    assert_close(shifted[1:], rotate(x[1:], torch.arange(7, 12)[:, None]))
    half = rotate(x.bfloat16(), torch.arange(5)[:, None])
    assert_close(
        half, rotate(x.bfloat16().float(), torch.arange(5)[:, None]).bfloat16(), rtol=0, atol=0
    )


def test_odd_features_are_refused():
    with pytest.raises(ValueError, match="even number of features, got 3"):
        rotate(torch.zeros(1, 3), torch.zeros(1))


def published(x, positions, theta):
    """Rotate (..., T, D) by halves, written out as before there was a table."""
    acc = torch.promote_types(x.dtype, torch.float32)
    dim = x.shape[-1]
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=acc) / dim)
    angles = positions.to(acc).unsqueeze(-1) * frequencies
    first, second = x.to(acc).chunk(2, -1)
    turned = [first * angles.cos() - second * angles.sin()]
    return torch.cat([*turned, second * angles.cos() + first * angles.sin()], -1).to(x.dtype)


def layer(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "head_dim": 6, "rope_theta": 500.0} | options
    return GatedAttention(12, 4, **options, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_a_table_for_all_layers_changes_no_bit(monkeypatch, dtype, batched):
    module, x = layer(dtype, qk_norm=True), randn(2, 7, 12).to(dtype)
    positions = torch.tensor([[3], [70_000]]) + torch.arange(7) if batched else torch.arange(7)
    table = rotary_table(positions, 6, 500.0, dtype=dtype)
    turned = rotate(x[..., :6], positions, 500.0)
    assert torch.equal(turned, published(x[..., :6], positions, 500.0))
    expected, cache = module(x, positions=positions), KeyValueCache()
    monkeypatch.setattr(torch, "arange", None)  # no layer computes angles
    assert torch.equal(module(x, rotary=table), expected)
    module(x[:, :4], rotary=tuple(part[..., :4, :] for part in table), cache=cache)
    keys = module.k_norm(module.k_proj(x[:, :4]).unflatten(-1, (2, 6))).transpose(1, 2)
    places = positions[..., :4].unsqueeze(-2) if batched else positions[:4]
    monkeypatch.undo()
    assert torch.equal(cache.keys, published(keys, places, 500.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": torch.arange(5)}, "give rotary alone, got positions"),
        (
            {"rotary": rotary_table(torch.arange(4), 6)},
            r"rotary \(4, 3\) .* must end with \(5, 3\)",
        ),
        ({"rotary": rotary_table(torch.arange(1), 6)}, r"\(1, 3\) .* must end with \(5, 3\)"),
        ({"rotary": rotary_table(torch.arange(5), 8)}, r"\(5, 4\) .* must end with \(5, 3\)"),
        ({"rotary": rotary_table(torch.arange(5), 6, dtype=torch.float64)}, "be in torch.float32"),
    ],
)
def test_a_table_of_something_else_is_refused(refuses, options, message):
    refuses(
        ValueError,
        (
            message,
            lambda: layer()(
                torch.zeros(1, 5, 12), **{"rotary": rotary_table(torch.arange(5), 6)} | options
            ),
        ),
        (
            "rope_theta=None",
            lambda: layer(rope_theta=None)(
                torch.zeros(1, 5, 12), rotary=rotary_table(torch.arange(5), 6)
            ),
        ),
    )


def test_the_norms_have_the_epsilon_that_is_given():
    x, results = 1e-3 * randn(1, 4, 12).float(), []
    for eps in (1e-6, 1e-2):
        module = layer(qk_norm=True, norm_eps=eps)
        for projection in (module.q_proj, module.k_proj):
            nn.init.eye_(projection.weight)
        assert [module.q_norm.eps, module.k_norm.eps] == [eps, eps]
        results.append(module(x))
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in itertools.combinations(results, 2))
