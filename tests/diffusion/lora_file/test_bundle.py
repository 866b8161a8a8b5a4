"""Fused views of adapters, and adapters of lower rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.lora_file import (
    Factors,
    FluxShape,
    FusedView,
    LoraBundle,
    LoraFileError,
    load_lora,
    shrink,
    shrink_bundle,
)
from diffusion.lora_file.bundle import fuse, own_components, split

SIZES = (4, 4, 4, 16)
seeds = st.integers(0, 2**31)


def factors(seed, outputs, rank, inputs=6, scale=1.0, magnitude=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Factors(
        draw(rank, inputs), draw(outputs, rank), scale, draw(outputs, 1) if magnitude else None
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def stacked(parts, inputs=6):
    return torch.cat(
        [
            torch.zeros(size, inputs, dtype=torch.float64) if part is None else part.delta_weight()
            for part, size in zip(parts, SIZES, strict=True)
        ]
    )


@given(
    seeds,
    st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=4, max_size=4),
    st.lists(st.sampled_from([1.0, 0.5, 2.0]), min_size=4, max_size=4),
)
@settings(max_examples=40)
def test_fusing_keeps_the_change_and_splitting_undoes_it(seed, ranks, scales):
    if not any(ranks):
        return
    parts = [
        None if rank is None else factors(seed + n, size, rank, scale=scale)
        for n, (rank, size, scale) in enumerate(zip(ranks, SIZES, scales, strict=True))
    ]
    fused = fuse(parts, SIZES)
    assert fused.rank == sum(rank or 0 for rank in ranks)
    close(fused.delta_weight(), stacked(parts))
    again = split(fused, SIZES, own_components(fused.up, SIZES))
    assert [part.rank for part in again] == [rank or 0 for rank in ranks]
    for part, before in zip(again, parts, strict=True):
        if before is not None:
            close(part.delta_weight(), before.delta_weight())


@given(seeds, st.integers(1, 4), st.sampled_from([1.0, 0.25]))
@settings(max_examples=20)
def test_splitting_shares_a_and_fusing_finds_it_again(seed, rank, scale):
    whole = factors(seed, sum(SIZES), rank, scale=scale)
    parts = split(whole, SIZES, own_components(whole.up, SIZES))
    assert all(part.down is whole.down for part in parts)
    close(stacked(parts), whole.delta_weight())
    fused = fuse(parts, SIZES)
    assert fused.rank == rank
    assert torch.equal(fused.up, whole.up)
    assert torch.equal(fused.down, whole.down)
    assert fused.scale == scale


def test_blocks_are_not_seen_where_a_component_is_shared():
    up = torch.block_diag(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2))
    assert [list(part) for part in own_components(up, (4, 4, 4))] == [[0, 1], [2, 3], [4, 5]]
    up[11, 0] = 1
    assert own_components(up, (4, 4, 4)) == [None, None, None]
    assert own_components(torch.zeros(12, 6), (4, 4, 4)) == [None, None, None]


@given(seeds, st.lists(st.integers(1, 4), min_size=4, max_size=4), st.booleans())
@settings(max_examples=20)
def test_rows_that_all_parts_share_are_kept_once_and_found_again(seed, ranks, shared_first):
    shared, parts = factors(seed, sum(SIZES), 3), []
    for n, (rank, size, common) in enumerate(zip(ranks, SIZES, split(shared, SIZES), strict=True)):
        both = (common, factors(seed + 1 + n, size, rank))[:: 1 if shared_first else -1]
        down, up = torch.cat([f.down for f in both]), torch.cat([f.up for f in both], 1)
        parts.append(Factors(down, up, 0.5))
    fused = fuse(parts, SIZES)
    assert fused.rank == 3 + sum(ranks)
    close(fused.delta_weight(), stacked(parts))
    again = split(fused, SIZES, own_components(fused.up, SIZES))
    assert [part.rank for part in again] == [3 + rank for rank in ranks]
    close(stacked(again), stacked(parts))
    twice = fuse(again, SIZES)
    assert torch.equal(twice.down, fused.down)
    assert torch.equal(twice.up, fused.up)


def test_a_part_without_rows_is_left_out_also_where_others_share_a():
    up = torch.ones(12, 6)
    up[4:8] = 0
    first, second, third = own_components(up, (4, 4, 4))
    assert (first, len(second), third) == (None, 0, None)


def test_block_diagonal_file_is_split_into_a_third_of_its_rank(dialects, tmp_path):
    down, up = torch.randn(6, 16), torch.block_diag(*(torch.randn(16, 2) for _ in range(3)))
    name = "lora_unet_double_blocks_0_img_attn_qkv."
    tensors = {
        f"{name}lora_down.weight": down,
        f"{name}lora_up.weight": up,
        f"{name}alpha": torch.tensor(3.0),
    }
    bundle = load_lora(dialects.Written("flux", tensors, {}, {}).save(tmp_path / "a.safetensors"))
    assert set(bundle.ranks().values()) == {2}
    whole = torch.cat([bundle.delta_weight(n) for n in
                       (f"transformer_blocks.0.attn.to_{c}" for c in "qkv")])  # fmt: skip
    torch.testing.assert_close(whole, 0.5 * up @ down)


def test_fused_view_of_a_file(dialects, tmp_path):
    written = dialects.write("bfl", "lora_down", seed=1)
    bundle = load_lora(written.save(tmp_path / "a.safetensors"))
    view = FusedView(bundle)
    assert (next(iter(view)), len(view)) == ("blocks.0.attn.a_to_qkv", 13)
    assert {view.layer(name).type for name in view} == {layer.type for layer in FluxShape().fused()}
    for name in view:
        parts = [torch.from_numpy(written.expected[part]) for part in view.layer(name).parts]
        torch.testing.assert_close(
            view[name].delta_weight().double(), torch.cat(parts), rtol=1e-5, atol=1e-5
        )
    assert (
        view["single_blocks.0.to_qkv_mlp"].rank
        == bundle.ranks()["single_transformer_blocks.0.proj_mlp"]
    )


def test_fused_view_of_a_model_with_absent_parts():
    shape = FluxShape(num_layers=1, num_single_layers=1, num_heads=2, head_dim=3)
    only = "single_transformer_blocks.0.attn.to_k"
    bundle = LoraBundle("flux", {only: factors(0, 6, 2)})
    view = FusedView(bundle, shape.fused())
    assert list(view) == ["single_blocks.0.to_qkv_mlp"]
    delta = view["single_blocks.0.to_qkv_mlp"].delta_weight()
    assert delta.shape == (42, 6)
    close(delta[6:12], bundle.delta_weight(only))
    assert not delta[:6].any()
    assert not delta[12:].any()
    assert list(FusedView(bundle)) == list(view)
    close(FusedView(bundle)["single_blocks.0.to_qkv_mlp"].delta_weight(), delta)


def test_dora_is_fused_whole_or_not_at_all(refuses):
    parts = [factors(n, size, 2, magnitude=True) for n, size in enumerate(SIZES)]
    fused = fuse(parts, SIZES)
    weight = torch.randn(sum(SIZES), 6, dtype=torch.float64)
    split = [p.delta_weight(w) for p, w in zip(parts, weight.split(SIZES), strict=True)]
    close(fused.delta_weight(weight), torch.cat(split))
    refuses(
        LoraFileError,
        (
            "DoRA",
            lambda: fuse([parts[0], *(part._replace(magnitude=None) for part in parts[1:])], SIZES),
        ),
        ("DoRA", lambda: fuse([None, *parts[1:]], SIZES)),
        ("columns", lambda: parts[0]._replace(magnitude=torch.ones(1, 6)).rows(0, 2)),
    )


def test_dora_needs_the_weight():
    with pytest.raises(LoraFileError, match="weight of the base"):
        factors(0, 4, 2, magnitude=True).delta_weight()


def shrinkable(seed=0, rank=6):
    return factors(seed, 12, rank, 10, -0.5)


@given(st.integers(0, 1000), st.integers(1, 5))
@settings(max_examples=25)
def test_rank(seed, rank):
    full = shrinkable(seed)
    shrunk, error = shrink(full, rank=rank)
    delta = full.delta_weight()
    singular = torch.linalg.svdvals(delta)
    best = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    found = torch.linalg.matrix_norm(shrunk.delta_weight() - delta) / torch.linalg.matrix_norm(
        delta
    )
    assert (shrunk.rank, float(found)) == (rank, pytest.approx(best, rel=1e-8))
    assert (error, shrunk.scale) == (pytest.approx(best, rel=1e-8), 1)


@given(st.integers(0, 1000), st.floats(0.05, 0.999))
@settings(max_examples=25)
def test_energy(seed, energy):
    full = shrinkable(seed)
    squares = torch.linalg.svdvals(full.delta_weight()).square()
    kept = shrink(full, energy=energy).factors.rank
    assert squares[:kept].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert squares[: kept - 1].sum() < energy * squares.sum()


def test_singular_values_are_divided_equally():
    shrunk = shrink(shrinkable(), rank=3).factors
    torch.testing.assert_close(shrunk.down @ shrunk.down.T, shrunk.up.T @ shrunk.up)


def test_a_low_rank_stays_as_it_is():
    full = shrinkable()
    assert shrink(full, rank=6).factors is full
    assert shrink(full, rank=100).factors is full


def test_a_rank_above_the_sizes_of_the_layer():
    full = shrinkable(rank=40)
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
    bundle = LoraBundle("flux", {name: shrinkable()}, {"text_encoder": {text: shrinkable(1)}})
    small, errors = shrink_bundle(bundle, rank=2)
    assert (small.ranks(), small.text_encoders["text_encoder"][text].rank) == ({name: 2}, 2)
    assert set(errors) == {name}
    assert 0 < errors[name] < 1


def parts_of(shared, seed=0):
    """The three parts of a fused layer, with one A or with one each."""
    one = shrinkable(seed)
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    generator = torch.Generator().manual_seed(seed + 1)
    modules = {}
    for number, name in enumerate(names):
        down = one.down if shared else shrinkable(seed + number).down
        up = torch.randn(10, 6, generator=generator, dtype=torch.float64)
        modules[name] = Factors(down, up, (0.5, -2.0, 1.0)[number])
    modules["proj_out"] = shrinkable(9)
    return LoraBundle("flux", modules)


@pytest.mark.parametrize("shared", [True, False])
def test_layers_that_are_fused_elsewhere_are_shrunk_together(shared):
    bundle = parts_of(shared)
    small, errors = shrink_bundle(bundle, rank=2, fused=True)
    own = [name for name in bundle.modules if name != "proj_out"]
    assert {id(small.modules[name].down) for name in own} == {id(small.modules[own[0]].down)}
    assert small.ranks() == dict.fromkeys(sorted(bundle.modules), 2)
    before, after = (torch.cat([b.delta_weight(name) for name in own]) for b in (bundle, small))
    best = float(torch.linalg.svdvals(before)[2:].square().sum().sqrt())
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
