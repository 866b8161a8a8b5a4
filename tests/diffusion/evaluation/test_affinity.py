"""Likeness of adapters without training."""

import pytest
import torch

from diffusion.evaluation.retrieval_scores import delta_cosine, sketches
from diffusion.lora_file import Factors, FluxShape, LoraBundle
from diffusion.retrieval import collate, modules_of

SHAPE = FluxShape(1, 1, num_heads=2, head_dim=8)
MODULES = modules_of(SHAPE)


def adapter(seed, rank, kept=1.0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {part: (m.in_features, size) for m in MODULES
             for part, size in zip(m.parts, m.sizes, strict=True)}  # fmt: skip
    layers = {
        name: Factors(torch.randn(rank, i, generator=generator),
                      torch.randn(o, rank, generator=generator), 0.5)
        for number, (name, (i, o)) in enumerate(sizes.items()) if number < kept * len(sizes)
    }  # fmt: skip
    return LoraBundle("flux", layers)


BUNDLES = [adapter(0, 2), adapter(1, 3), adapter(2, 1, kept=0.5)]


def stacked(bundle):
    return torch.cat([
        (bundle.delta_weight(part) if part in bundle.modules
         else torch.zeros(size, m.in_features)).double().flatten()
        for m in MODULES for part, size in zip(m.parts, m.sizes, strict=True)
    ])  # fmt: skip


def test_delta_cosine_is_that_of_the_matrices():
    first, second = collate(BUNDLES, MODULES), collate(BUNDLES[::-1], MODULES)
    flat = torch.stack([stacked(bundle) for bundle in BUNDLES])
    flat = flat / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        delta_cosine(first, second), flat @ flat.flip(0).mT, atol=1e-6, rtol=0
    )


def test_sketches_estimate_it():
    batch = collate(BUNDLES, MODULES)
    shared = collate(
        [
            BUNDLES[0],
            LoraBundle("flux", {
                name: Factors(torch.cat([f.down, g.down]), torch.cat([f.up, g.up], 1), 0.5)
                for (name, f), g in zip(
                    BUNDLES[0].modules.items(), adapter(5, 2).modules.values(), strict=True
                )
            }),
        ],
        MODULES,
    )  # fmt: skip
    exact = delta_cosine(shared, shared)[0, 1].item()
    few = sketches(shared, MODULES, probes=64)
    assert exact == pytest.approx(0.75, abs=0.05)
    assert (few @ few.mT)[0, 1].item() == pytest.approx(exact, abs=0.05)
    first, again = sketches(batch, MODULES), sketches(batch, MODULES)
    assert torch.equal(first, again)
    assert not torch.allclose(first, sketches(batch, MODULES, seed=1))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3, dtype=torch.float64))
