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


def parts_of(shared, seed=0):
    """The three parts of a fused layer, with one A or with one each."""
    one = factors(seed)
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    generator = torch.Generator().manual_seed(seed + 1)
    modules = {}
    for number, name in enumerate(names):
        down = one.down if shared else factors(seed + number).down
        up = torch.randn(10, 6, generator=generator, dtype=torch.float64)
        modules[name] = Factors(down, up, (0.5, -2.0, 1.0)[number])
    modules["proj_out"] = factors(9)
    return LoraBundle("flux", modules)


@pytest.mark.parametrize("shared", [True, False])
def test_layers_that_are_fused_elsewhere_are_shrunk_together(shared):
    bundle = parts_of(shared)
    small, errors = shrink_bundle(bundle, rank=2, fused=True)
    own = [name for name in bundle.modules if name != "proj_out"]
    assert {id(small.modules[name].down) for name in own} == {id(small.modules[own[0]].down)}
    assert small.ranks() == dict.fromkeys(sorted(bundle.modules), 2)
    before, after = (torch.cat([b.delta_weight(name) for name in own]) for b in (bundle, small))
    values = torch.linalg.svdvals(before)
    best = float(values[2:].square().sum().sqrt())
    assert float((before - after).norm()) == pytest.approx(best, rel=1e-8)
    for name in bundle.modules:
        one, two = bundle.delta_weight(name), small.delta_weight(name)
        assert errors[name] == pytest.approx(float((one - two).norm() / one.norm()), rel=1e-6)


def test_fused_layers_of_a_lower_rank_stay_as_they_are():
    bundle = parts_of(shared=True)
    small, errors = shrink_bundle(bundle, rank=6, fused=True)
    for name, one in bundle.modules.items():
        assert torch.equal(small.modules[name].up, one.up)
    assert set(errors.values()) == {0.0}


def test_a_part_of_a_fused_layer_that_is_not_changed_stays_so():
    bundle = parts_of(shared=True)
    some = bundle.select(name for name in bundle.modules if not name.endswith("to_k"))
    small, _ = shrink_bundle(some, rank=1, fused=True)
    assert set(small.modules) == set(some.modules)
