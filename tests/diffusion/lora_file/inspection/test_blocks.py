"""Sums over the blocks of a model."""

import math

import pytest
import torch

from diffusion.lora_file import Factors, LoraBundle, shrink_bundle
from diffusion.lora_file.inspection import OUTSIDE, block_of, relative_errors, sums_of_squares


def test_blocks():
    names = [
        "x_embedder", "single_transformer_blocks.10.proj_out", "transformer_blocks.2.attn.to_q",
        "transformer_blocks.10.attn.to_q", "single_transformer_blocks.2.norm.linear", "proj_out",
        "transformer_blocks.2.attn.to_k",
    ]  # fmt: skip
    assert block_of(names[1]) == "single_transformer_blocks.10"
    sums = sums_of_squares({name: float(n) for n, name in enumerate(names)})
    assert list(sums) == [
        "transformer_blocks.2", "transformer_blocks.10", "single_transformer_blocks.2",
        "single_transformer_blocks.10", OUTSIDE,
    ]  # fmt: skip
    assert sums["transformer_blocks.2"] == pytest.approx(math.hypot(2, 6))
    assert sums[OUTSIDE] == 5


def test_errors_of_blocks_are_those_of_their_weights():
    generator = torch.Generator().manual_seed(0)
    modules = {
        f"transformer_blocks.{block}.attn.to_{one}": Factors(
            torch.randn(4, 16, generator=generator) * (block + 1) ** 2,
            torch.randn(16, 4, generator=generator),
        )
        for block in range(2)
        for one in "qk"
    }
    bundle = LoraBundle("flux", modules)
    small, errors = shrink_bundle(bundle, rank=2)
    found = relative_errors(errors, bundle.norms())
    for block in range(2):
        own = [name for name in modules if name.startswith(f"transformer_blocks.{block}.")]
        one = torch.stack([bundle.delta_weight(name) for name in own])
        two = torch.stack([small.delta_weight(name) for name in own])
        exact = float((one - two).norm() / one.norm())
        assert found[f"transformer_blocks.{block}"] == pytest.approx(exact, rel=1e-4)


def test_nothing_is_lost_of_nothing():
    assert relative_errors({"proj_out": 0.0}, {"proj_out": 0.0}) == {OUTSIDE: 0.0}
