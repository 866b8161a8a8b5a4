"""Fused and split views of the same adapter, and what follows from the factors alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.lora_file import Factors, FluxShape, FusedView, LoraBundle, LoraFileError, load_lora
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


@given(seeds, st.integers(1, 5))
@settings(max_examples=20)
def test_gauge_and_padding(seed, rank):
    plain = factors(seed, 8, rank, scale=0.5)
    generator = torch.Generator().manual_seed(seed)
    gauge = torch.randn(rank, rank, generator=generator, dtype=torch.float64) + 3 * torch.eye(rank)
    turned = plain._replace(down=gauge @ plain.down, up=plain.up @ torch.linalg.inv(gauge))
    torch.testing.assert_close(turned.delta_weight(), plain.delta_weight(), rtol=1e-8, atol=1e-8)
    norm = float(torch.linalg.matrix_norm(plain.delta_weight()))
    assert turned.norm() == pytest.approx(norm, rel=1e-8)
    padded = Factors(
        torch.cat([plain.down, torch.zeros(2, 6, dtype=torch.float64)]),
        torch.cat([plain.up, torch.zeros(8, 2, dtype=torch.float64)], 1),
        plain.scale,
    )
    close(padded.delta_weight(), plain.delta_weight())
    assert padded.norm() == pytest.approx(norm, rel=1e-12)


def test_blocks_are_not_seen_where_a_component_is_shared():
    up = torch.block_diag(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2))
    assert [list(part) for part in own_components(up, (4, 4, 4))] == [[0, 1], [2, 3], [4, 5]]
    up[11, 0] = 1
    assert own_components(up, (4, 4, 4)) == [None, None, None]
    assert own_components(torch.zeros(12, 6), (4, 4, 4)) == [None, None, None]


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
    written = dialects.Written("flux", tensors, {}, {})
    bundle = load_lora(written.save(tmp_path / "a.safetensors"))
    assert set(bundle.ranks().values()) == {2}
    whole = torch.cat([bundle.delta_weight(n) for n in
                       (f"transformer_blocks.0.attn.to_{c}" for c in "qkv")])  # fmt: skip
    torch.testing.assert_close(whole, 0.5 * up @ down)


def test_fused_view_of_a_file(dialects, tmp_path):
    written = dialects.write("bfl", "lora_down", seed=1)
    bundle = load_lora(written.save(tmp_path / "a.safetensors"))
    view = FusedView(bundle)
    assert next(iter(view)) == "blocks.0.attn.a_to_qkv"
    assert len(view) == 13
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


def test_dora_is_fused_whole_or_not_at_all():
    parts = [factors(n, size, 2, magnitude=True) for n, size in enumerate(SIZES)]
    fused = fuse(parts, SIZES)
    weight = torch.randn(sum(SIZES), 6, dtype=torch.float64)
    split = [p.delta_weight(w) for p, w in zip(parts, weight.split(SIZES), strict=True)]
    close(fused.delta_weight(weight), torch.cat(split))
    with pytest.raises(LoraFileError, match="DoRA"):
        fuse([parts[0], *(part._replace(magnitude=None) for part in parts[1:])], SIZES)
    with pytest.raises(LoraFileError, match="DoRA"):
        fuse([None, *parts[1:]], SIZES)
    with pytest.raises(LoraFileError, match="columns"):
        parts[0]._replace(magnitude=torch.ones(1, 6)).rows(0, 2)


def test_dora_needs_the_weight():
    with pytest.raises(LoraFileError, match="weight of the base"):
        factors(0, 4, 2, magnitude=True).delta_weight()
