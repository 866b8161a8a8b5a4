"""Lower ranks: the best approximation, measured against the singular values of ΔW itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.lora_file import Factors, LoraBundle, LoraFileError, shrink, shrink_bundle


def factors(seed=0, rank=6, scale=-0.5):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 10, generator=generator, dtype=torch.float64)
    return Factors(down, torch.randn(12, rank, generator=generator, dtype=torch.float64), scale)


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=25)
def test_rank(seed, rank):
    full = factors(seed)
    shrunk, error = shrink(full, rank=rank)
    delta = full.delta_weight()
    singular = torch.linalg.svdvals(delta)
    best = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    found = torch.linalg.matrix_norm(shrunk.delta_weight() - delta) / torch.linalg.matrix_norm(
        delta
    )
    assert shrunk.rank == rank
    assert float(found) == pytest.approx(best, rel=1e-8)
    assert error == pytest.approx(best, rel=1e-8)
    assert shrunk.scale == 1


@given(st.integers(0, 1000), st.floats(0.05, 0.999))
@settings(max_examples=25)
def test_energy(seed, energy):
    full = factors(seed)
    squares = torch.linalg.svdvals(full.delta_weight()).square()
    kept = shrink(full, energy=energy).factors.rank
    assert squares[:kept].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: kept - 1].sum() < energy * squares.sum()


def test_singular_values_are_divided_equally():
    shrunk = shrink(factors(), rank=3).factors
    torch.testing.assert_close(shrunk.down @ shrunk.down.T, shrunk.up.T @ shrunk.up)


def test_all_energy_drops_components_without_any():
    full = factors(rank=3)
    doubled = Factors(torch.cat([full.down] * 2), torch.cat([full.up] * 2, 1), full.scale / 2)
    shrunk, error = shrink(doubled, energy=1 - 1e-9)
    assert shrunk.rank == 3
    assert error < 1e-6
    torch.testing.assert_close(shrunk.delta_weight(), full.delta_weight())


def test_a_low_rank_stays_as_it_is():
    full = factors()
    assert shrink(full, rank=6).factors is full
    assert shrink(full, rank=100).factors is full


def test_a_rank_above_the_sizes_of_the_layer():
    full = factors(rank=40)
    shrunk, error = shrink(full, rank=30)
    assert shrunk.rank == 10
    assert error < 1e-12
    torch.testing.assert_close(shrunk.delta_weight(), full.delta_weight())


def test_zero():
    zero = Factors(torch.ones(3, 4), torch.zeros(5, 3))
    for options in ({"rank": 1}, {"energy": 0.5}):
        shrunk, error = shrink(zero, **options)
        assert not shrunk.delta_weight().any()
        assert error == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "how far"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": float("nan")}, "energy is nan"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(LoraFileError, match=words):
        shrink_bundle(LoraBundle("flux", {}), **options)


def test_nan_is_refused():
    with pytest.raises(LoraFileError, match="NaN"):
        shrink(Factors(torch.full((1, 2), float("nan")), torch.ones(2, 1)), rank=1)


def test_bundle():
    name, text = "transformer_blocks.0.attn.to_q", "text_model.encoder.layers.0.mlp.fc1"
    bundle = LoraBundle("flux", {name: factors()}, {"text_encoder": {text: factors(1)}})
    small, errors = shrink_bundle(bundle, rank=2)
    assert small.ranks() == {name: 2}
    assert small.text_encoders["text_encoder"][text].rank == 2
    assert set(errors) == {name}
    assert 0 < errors[name] < 1
