"""Codes in few bits, compared with those of KIVI, and the bytes that they take."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from language.scbench.policies.kivi import Quantized, dequantize, quantize
from language.scbench.policies.registry import policy_of

GOLDEN = Path(__file__).parents[3] / "golden" / "attention_sequence"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "kivi_quest.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays if "meta" not in name}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("part", ["k", "v"])
def test_codes_scales_and_minima_of_kivi(bits, part, golden):
    vectors = {
        n.removeprefix(f"b{bits}.{part}_"): x for n, x in golden.items() if f"b{bits}.{part}" in n
    }
    x = vectors.pop(f"b{bits}.{part}")
    packed = quantize(x.mT if part == "k" else x, bits, 32)
    restored = dequantize(packed, bits, 32)
    if part == "k":
        packed, restored = Quantized(*(y.mT for y in packed)), restored.mT
    for name, own in zip(("code", "scale", "min", "dequant"), (*packed, restored), strict=True):
        assert torch.equal(own.flatten(), golden[f"b{bits}.{part}_{name}"].flatten())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_channel_is_restored_and_others_within_half_a_step(bits, dtype):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(bits)).to(dtype)
    x[1, :32] = -0.3
    packed = quantize(x, bits, 32)
    restored = dequantize(packed, bits, 32)
    assert restored.dtype == dtype
    assert packed.codes.shape == (3, 2 * bits)
    assert packed.codes.dtype == torch.int32
    assert torch.equal(restored[1, :32], x[1, :32])
    assert not packed.codes[1, :bits].any()
    step = packed.scale.float().repeat_interleave(32, -1)
    slack = 1e-5 if dtype == torch.float32 else 2**-7 * x.float().abs().amax()
    assert ((restored - x).float().abs() <= step / 2 + slack).all()


def filled(policy, model, length, tokens_after=0):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 64, (1, length + tokens_after), generator=generator)
    cache = policy.make_cache(model)
    model(tokens[:, :length], cache=cache)
    for at in range(length, length + tokens_after):
        model(tokens[:, at : at + 1], cache=cache)
    return cache


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.21), (torch.bfloat16, 0.34)])
def test_bytes_of_4_bits_at_2048_tokens(dtype, most, tiny):
    model = tiny("Phi3", hidden_size=256).to(dtype)  # whose values are a slice of queries too
    bytes_of = {}
    for policy in (policy_of("kivi", bits=4, group=32), policy_of("full")):
        cache = filled(policy, model, 2048)
        bytes_of[policy.name] = policy.cache_bytes(cache)
        assert bytes_of[policy.name] == sum(t.numel() * t.element_size() for t in cache.tensors)
    assert bytes_of["full"] == 3 * 2 * 2 * 2048 * 64 * dtype.itemsize
    assert bytes_of["kivi"] <= most * bytes_of["full"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_appended_and_never_rounded_again(bits, tiny):
    model, policy = tiny(head_dim=16), policy_of("kivi", bits=bits, group=16)
    cache = filled(policy, model, 40, tokens_after=40)
    state = cache.layers[1].states[0]
    assert state.held["keys"].shape[2] == 32
    assert state.held["keys.scale"].shape[2] == 3
    before = filled(policy, model, 40, tokens_after=30)
    for name, x in before.layers[1].states[0].held.items():
        if "." in name:
            assert torch.equal(state.held[name][:, :, : x.shape[2]], x)
    plain = filled(policy_of("full"), model, 80)
    assert_close(
        cache.layers[0].states[0].held["values"],
        plain.layers[0].states[0].held["values"][:, :, 48:],
    )


def test_more_bits_are_closer_and_few_tokens_are_whole(tiny, tokens):
    model = tiny(head_dim=16)

    def last(policy, length):
        cache = policy.make_cache(model)
        model(tokens[:, :length], cache=cache)
        return model(tokens[:, length:], cache=cache).logits

    plain = last(policy_of("full"), 64)
    errors = [
        (last(policy_of("kivi", bits=b, group=16), 64) - plain).abs().max() for b in (8, 4, 2)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]
    short = policy_of("kivi", bits=2, group=16)
    assert_close(last(short, 40), last(policy_of("full"), 40), rtol=1e-5, atol=1e-5)
