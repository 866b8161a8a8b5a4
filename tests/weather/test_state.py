import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weather.state import ERA5_SAMPLE, FENGWU, SHALLOW_WATER, ChannelSpec, Normalizer


def test_fengwu_order_is_the_published_one():
    assert FENGWU.num_channels == 69
    assert FENGWU.labels.index("z500") == FENGWU.index("geopotential", 500) == 11
    assert FENGWU.labels.index("t850") == FENGWU.index("temperature", 850) == 66
    assert FENGWU.labels[:5] == ("u10", "v10", "t2m", "msl", "z50")


def test_preset_labels():
    assert SHALLOW_WATER.labels == ("h", "u", "v")
    assert ERA5_SAMPLE.labels == ("z850", "z500", "t850", "t500")


@pytest.mark.parametrize("spec", [FENGWU, SHALLOW_WATER, ERA5_SAMPLE])
def test_split_keeps_every_channel_in_place(spec):
    x = torch.arange(2 * spec.num_channels * 6.0).reshape(2, spec.num_channels, 2, 3)
    surface, upper = spec.split(x)
    assert surface.shape == (2, len(spec.surface), 2, 3)
    assert upper.shape == (2, len(spec.upper), len(spec.levels), 2, 3)
    for channel, (name, level) in enumerate(spec):
        assert spec.index(name, level) == channel
        part = (
            surface[:, spec.surface.index(name)]
            if level is None
            else upper[:, spec.upper.index(name), spec.levels.index(level)]
        )
        assert torch.equal(part, x[:, channel])


def test_statistics_are_matched_by_level_value():
    source = ChannelSpec(upper=("geopotential", "temperature"), levels=(1000, 850, 700, 500, 300))
    mean = torch.tensor([level + (1e4 if name == "temperature" else 0) for name, level in source])
    chosen = Normalizer(mean, torch.ones(10)).select(source, ERA5_SAMPLE)
    assert chosen.mean.tolist() == [850.0, 500.0, 10850.0, 10500.0]


def test_select_refuses_a_missing_level_and_a_wrong_source():
    normalizer = Normalizer(torch.zeros(4), torch.ones(4))
    with pytest.raises(KeyError, match="no geopotential at level 300"):
        normalizer.select(ERA5_SAMPLE, ChannelSpec(upper=("geopotential",), levels=(300,)))
    with pytest.raises(ValueError, match="source has 3 channels, the statistics 4"):
        normalizer.select(SHALLOW_WATER, SHALLOW_WATER)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surface": ("height", "height")}, "must not repeat"),
        ({"upper": ("temperature",)}, "belong together"),
        ({"levels": (500,)}, "belong together"),
        ({}, "at least one"),
    ],
)
def test_impossible_specs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChannelSpec(**arguments)


def test_lists_make_the_same_hashable_spec():
    spec = ChannelSpec(surface=["height", "u_component_of_wind", "v_component_of_wind"])
    assert spec == SHALLOW_WATER
    assert hash(spec) == hash(SHALLOW_WATER)


def test_wrong_channel_counts_name_both():
    with pytest.raises(ValueError, match="expected 3 channels"):
        SHALLOW_WATER.split(torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 3, H, W\)"):
        Normalizer(torch.zeros(3), torch.ones(3)).normalize(torch.zeros(3, 4))
    with pytest.raises(KeyError, match="no temperature at the surface"):
        SHALLOW_WATER.index("temperature")


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4), weighted=st.booleans())
def test_fit_in_chunks_equals_one_weighted_formula(chunks, weighted):
    generator = torch.Generator().manual_seed(sum(chunks))
    shift = torch.tensor([1e5, 0.0])[:, None, None]
    x = torch.randn(sum(chunks), 2, 3, 4, generator=generator, dtype=torch.float64) * 7 + shift
    w = torch.tensor([0.2, 1.0, 1.8], dtype=torch.float64) if weighted else torch.ones(3).double()
    fitted = Normalizer.fit(iter(x.split(chunks)), area_weights=w if weighted else None)
    w = w[:, None].expand(len(x), 3, 4)[:, None]
    mean = (x * w).sum((0, 2, 3)) / w.sum()
    std = (((x - mean[:, None, None]) ** 2 * w).sum((0, 2, 3)) / w.sum()).sqrt()
    torch.testing.assert_close(fitted.mean, mean.float())
    torch.testing.assert_close(fitted.std, std.float())


def test_normalize_and_back():
    normalizer = Normalizer(torch.tensor([10.0, -1.0]), torch.tensor([2.0, 0.5]))
    x = torch.tensor([12.0, -2.0], dtype=torch.float64)[None, :, None, None]
    y = normalizer.normalize(x)
    assert y.dtype == torch.float64
    assert y.flatten().tolist() == [1.0, -2.0]
    assert torch.equal(normalizer.denormalize(y), x)
    assert torch.equal(normalizer(x), y)
    assert set(normalizer.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0, 0.0], [1.0], "must both be"),
        ([0.0, 0.0], [1.0, 0.0], r"channels \[1\]"),
        ([0.0, float("nan")], [1.0, 1.0], r"channels \[1\]"),
    ],
)
def test_bad_statistics_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalizer(torch.tensor(mean), torch.tensor(std))


def test_fit_refuses_nothing_and_nan():
    with pytest.raises(ValueError, match="there is no state"):
        Normalizer.fit([])
    with pytest.raises(ValueError, match="not finite"):
        Normalizer.fit(torch.full((1, 1, 2, 2), float("nan")))
