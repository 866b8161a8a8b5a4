"""States, their units, and scores of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.grid import Grid, regular_grid
from weather.metrics import DepartureSums, mse, rmse, spatial_mean
from weather.observations.gridded import GriddedObservations
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


def test_select_refuses_a_missing_level_and_a_wrong_source(refused):
    normalizer = Normalizer(torch.zeros(4), torch.ones(4))
    refused(
        "no geopotential at level 300",
        normalizer.select,
        ERA5_SAMPLE,
        ChannelSpec(upper=("geopotential",), levels=(300,)),
        error=KeyError,
    )
    refused(
        "source has 3 channels, the statistics 4",
        normalizer.select,
        SHALLOW_WATER,
        SHALLOW_WATER,
        error=ValueError,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surface": ("height", "height")}, "must not repeat"),
        ({"upper": ("temperature",)}, "belong together"),
        ({"levels": (500,)}, "belong together"),
        ({}, "at least one"),
    ],
)
def test_impossible_specs_are_refused(arguments, message, refused):
    refused(message, ChannelSpec, **arguments, error=ValueError)


def test_lists_make_the_same_hashable_spec():
    spec = ChannelSpec(surface=["height", "u_component_of_wind", "v_component_of_wind"])
    assert (spec, hash(spec)) == (SHALLOW_WATER, hash(SHALLOW_WATER))


def test_wrong_channel_counts_name_both(refuses, refused):
    refuses(
        ValueError,
        ("expected 3 channels", lambda: SHALLOW_WATER.split(torch.zeros(2, 4, 2, 2))),
        (
            r"expected \(\.\.\., 3, H, W\)",
            lambda: Normalizer(torch.zeros(3), torch.ones(3)).normalize(torch.zeros(3, 4)),
        ),
    )
    refused("no temperature at the surface", SHALLOW_WATER.index, "temperature", error=KeyError)


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
    assert (y.dtype, y.flatten().tolist()) == (torch.float64, [1.0, -2.0])
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
def test_bad_statistics_are_refused(mean, std, message, refused):
    refused(message, Normalizer, torch.tensor(mean), torch.tensor(std), error=ValueError)


def test_fit_refuses_nothing_and_nan(refuses):
    refuses(
        ValueError,
        ("there is no state", lambda: Normalizer.fit([])),
        ("not finite", lambda: Normalizer.fit(torch.full((1, 1, 2, 2), float("nan")))),
    )


GOLDEN = Path(__file__).parents[1] / "golden" / "weather"


@pytest.fixture(params=["wb2_asc_with_poles", "wb2_desc_no_poles"])
def golden(request):
    """Fields (variable, time, level, H, W), their scores, in either latitude order."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        vectors = {
            name: torch.from_numpy(file[name]) for name in file if file[name].dtype.kind == "f"
        }
    grid = Grid(vectors["latitude"], vectors["longitude"])
    ensemble = vectors["ensemble"].transpose(0, 1)  # members first
    return SimpleNamespace(**vectors, grid=grid, weights=grid.area_weights(), members=ensemble)


@pytest.fixture
def same():
    """Compare with a golden vector: relative 1e-10, NaN equal to NaN."""

    def check(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)

    return check


def test_golden_errors(golden, same):
    fields = golden.forecast, golden.truth, golden.weights
    same(mse(*fields), golden.wb2_mse_chunk)
    same(mse(*fields).mean(1), golden.wb2_mse_timemean)
    same(rmse(*fields).mean(1), golden.wb2_rmse_sqrt_before_time_avg)


@pytest.mark.fault("faults 6")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_fields_are_scored_in_single_precision(dtype):
    """721 x 1440 weights of one add up beyond the largest number of float16."""
    grid = regular_grid(721, 1440, poles=True)
    generator = torch.Generator().manual_seed(0)
    forecast, truth = (torch.randn(2, *grid.shape, generator=generator) * 300).to(dtype)
    weights = grid.area_weights()
    expected = mse(forecast.double(), truth.double(), weights)
    torch.testing.assert_close(
        mse(forecast, truth, weights).double(), expected, rtol=1e-4, atol=1e-2
    )


@pytest.mark.fault("faults 6")
def test_whole_numbers_do_not_truncate_the_weights():
    grid = regular_grid(9, 16, poles=True)
    field = torch.arange(9)[:, None].expand(grid.shape) * 25
    expected = rmse(field.double(), torch.zeros(grid.shape).double(), grid.area_weights())
    found = rmse(field, torch.zeros(grid.shape, dtype=torch.int64), grid.area_weights())
    torch.testing.assert_close(found.double(), expected)
    torch.testing.assert_close(grid.area_mean(field).double(), grid.area_mean(field.double()))


def test_golden_tropics(golden, same):
    """An area is a weight (H, W) of zero outside of it."""
    tropics = golden.grid.latitude.abs() <= 20
    weights = (golden.weights * tropics)[:, None].expand(golden.grid.shape)
    same(mse(golden.forecast, golden.truth, weights).mean(1), golden.wb2_mse_tropics)


def test_what_lies_outside_does_not_matter():
    weights = torch.ones(8, 16)
    weights[4:] = 0
    field = torch.ones(8, 16).where(weights > 0, torch.nan)
    assert spatial_mean(field, weights) == pytest.approx(1.0)
    assert spatial_mean(torch.full((8, 16), torch.nan), weights).isnan()


def test_shapes_that_do_not_fit(refused):
    refused("weights", spatial_mean, torch.zeros(4, 8), torch.ones(5), error=ValueError)


def test_hand_calculated():
    values = torch.tensor([[[1.0, 4.0, 0.0]], [[2.0, 0.0, 0.0]]])
    errors = torch.tensor([[[1.0, 2.0, torch.inf]], [[0.5, torch.inf, torch.inf]]])
    background = torch.tensor([[[0.0, 1.0, 9.0]], [[0.0, torch.nan, 9.0]]])
    analysis = torch.tensor([[[1.0, 3.0, 9.0]], [[1.0, torch.nan, 9.0]]])
    sums = DepartureSums.of(background, analysis, GriddedObservations(values, errors))
    assert (sums.number.tolist(), sums.background_bias().tolist()) == ([2, 1], [2, 2])
    assert_close(sums.background_rms(), torch.tensor([5.0, 4.0]).double().sqrt())
    assert sums.analysis_bias().tolist() == [0.5, 1]
    assert_close(sums.analysis_rms(), torch.tensor([0.5, 1.0]).double().sqrt())


def test_sums_add_up_and_withstand_channels_without_observations():
    fields = torch.randn(3, 6, 2, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    errors = torch.full((6, 2, 4, 8), 2.0).double()
    errors[:, 1] = torch.inf
    observations = GriddedObservations(fields[2], errors)
    whole = DepartureSums.of(fields[0], fields[1], observations)
    parts = [
        DepartureSums.of(
            fields[0, part], fields[1, part], GriddedObservations(fields[2, part], errors[part])
        )
        for part in (slice(0, 2), slice(2, 6))
    ]
    for mine, theirs in zip(parts[0].plus(parts[1]), whole, strict=True):
        assert_close(mine, theirs)
    assert whole.background_rms()[1].isnan()
