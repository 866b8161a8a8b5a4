import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from core_gates.attention.window import (
    SwinBlock,
    WindowAttention,
    WindowLayout,
    _attention,
    _fused_attention,
    _position_index,
)
from tests.core_gates.drawn import filled, randn

CPU = torch.device("cpu")


def attention(dim, heads, window, **options):
    torch.manual_seed(0)
    return filled(WindowAttention(dim, heads, window, **options).double(), scale=0.5)


def test_constants_made_in_inference_mode_serve_training():
    layout = WindowLayout.of((1, 5, 11), (1, 4, 4), shifted=True)
    module = attention(4, 2, (1, 4, 4))
    with torch.inference_mode():
        module(layout.partition(randn(1, 4, 1, 5, 11)), None, layout)
    module(layout.partition(randn(1, 4, 1, 5, 11)), None, layout).sum().backward()
    assert module.position_bias.grad.abs().max() > 0


@pytest.mark.parametrize("full", [(2, 3, 4), (3, 3, 5)])
def test_position_index_is_the_offset_of_the_pair(full):
    window = (1, 3, 2)
    index = _position_index(window, full, False, CPU)
    cells = list(itertools.product(*map(range, window)))
    for (i, a), (j, b) in itertools.product(enumerate(cells), repeat=2):
        z, y, x = (p - q + n - 1 for p, q, n in zip(a, b, full, strict=True))
        assert index[i, j] == (z * (2 * full[1] - 1) + y) * (2 * full[2] - 1) + x
    legacy = _position_index(window, full, True, CPU)
    assert torch.equal(legacy, _position_index(full, full, False, CPU)[:6, :6])
    assert not torch.equal(legacy, index)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_attention_is_its_formula(cross, shifted):
    layout = WindowLayout.of((3, 5, 8), (2, 3, 4), shifted=shifted)
    module = attention(6, 2, (2, 3, 4))
    query = layout.partition(randn(2, 6, 3, 5, 8))
    key = layout.partition(randn(2, 6, 3, 5, 8, seed=1)) if cross else query
    q, k, v = (
        (source @ weight.T + bias).unflatten(-1, (2, 3)).transpose(2, 3)
        for source, weight, bias in zip(
            (query, key, key), module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True
        )
    )
    index = _position_index((2, 3, 4), (2, 3, 4), False, CPU)
    logits = q @ k.transpose(-1, -2) / math.sqrt(3) + module.position_bias[index].permute(2, 0, 1)
    if shifted:
        mask = layout.mask(CPU).repeat_interleave(layout.counts[2], dim=0)
        logits = logits + mask[None, :, None]
    expected = module.proj((logits.softmax(-1) @ v).transpose(2, 3).flatten(3))
    assert_close(module(query, key if cross else None, layout), expected)


def test_explicit_and_fused_attention_agree():
    q, k, v = (randn(12, 2, 3, 8, seed=seed) for seed in range(3))
    for bias in (randn(1, 1, 2, 8, 8), randn(3, 1, 2, 8, 8)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v, bias)]
        outputs = [f(*inputs, 6) for f in (_attention, _fused_attention)]
        assert_close(*outputs)
        assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in outputs))


def test_legacy_clip_changes_clipped_windows_only():
    ours, legacy = attention(4, 2, (2, 3, 4)), attention(4, 2, (2, 3, 4), legacy_clip=True)
    for size, equal in (((2, 3, 4), True), ((1, 3, 4), True), ((2, 2, 4), False)):
        layout = WindowLayout.of(size, (2, 3, 4))
        x = layout.partition(randn(1, 4, *size))
        assert torch.allclose(ours(x, None, layout), legacy(x, None, layout)) == equal


def block(**options):
    torch.manual_seed(0)
    return filled(SwinBlock(6, 2, (2, 3, 4), **options).double(), scale=0.5)


def test_block_is_its_formula():
    layout = WindowLayout.of((3, 5, 8), (2, 3, 4))
    q, k = (layout.partition(randn(2, 6, 3, 5, 8, seed=seed)) for seed in range(2))
    module, inside = block(), layout.inside(CPU)
    r = q + module.attn(module.norm1(q) * inside, module.norm_key(k) * inside, layout)
    assert_close(module(q, k, layout), r + module.mlp(module.norm2(r)))
    assert_close(module.update(q, k, layout), module(q, k, layout) - q)


def test_recomputing_changes_no_gradient():
    layout = WindowLayout.of((2, 6, 8), (2, 3, 4), shifted=True)
    results = []
    for recompute in (False, True):
        module = block(recompute=recompute, drop_path=0.3)
        leaves = [layout.partition(randn(4, 6, 2, 6, 8, seed=s)).requires_grad_() for s in (0, 1)]
        torch.manual_seed(3)
        y = module(*leaves, layout)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in (*leaves, *module.parameters()))])
    assert_close(results[1], results[0])


def test_misuse_is_refused(refuses):
    layout = WindowLayout.of((2, 3, 4), (2, 3, 4))
    x = layout.partition(randn(1, 6, 2, 3, 4))
    refuses(
        ValueError,
        ("found no key", lambda: block()(x, None, layout)),
        ("found a key", lambda: block(cross=False)(x, x, layout)),
        ("multiple of num_heads=4", lambda: SwinBlock(6, 4, (2, 3, 4))),
    )
