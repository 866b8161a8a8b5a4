"""Observations on a grid: cells, super-observations, background errors."""

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from weather.grid import Grid, gaussian_grid, regular_grid
from weather.observations.gridded import (
    GriddedObservations,
    cell_of,
    confidence,
    grid_table,
    gross_check,
    innovation_sd,
    left_out,
)
from weather.observations.report_table import ObservationTable
from weather.state import ChannelSpec

GRIDS = {
    "gaussian": gaussian_grid(8, 16),
    "poles": regular_grid(9, 12, poles=True),
    "ascending": Grid(torch.linspace(-80, 80, 9), torch.arange(10) * 36.0),
    "from -180": Grid(torch.linspace(80, -80, 9), torch.arange(10) * 36.0 - 180),
}


@given(
    st.sampled_from(sorted(GRIDS)),
    st.floats(-90, 90),
    st.floats(-180, 360, exclude_max=True),
)
def test_cell_is_the_nearest_row_and_column(name, latitude, longitude):
    grid = GRIDS[name]
    row, column = cell_of(grid, torch.tensor([latitude]), torch.tensor([longitude]))
    rows = (grid.latitude - latitude).abs()
    columns = ((grid.longitude - longitude + 180) % 360 - 180).abs()
    assert rows[row].item() <= rows.min().item() + 1e-4
    assert columns[column].item() <= columns.min().item() + 1e-4


INF = torch.inf


def example():
    """Two channels on 1x3 cells; cell 1 of channel 0 and cell 2 of channel 1 are absent."""
    values = torch.tensor([[[1.0, torch.nan, 3.0]], [[4.0, 5.0, 6.0]]])
    errors = torch.tensor([[[0.5, 0.5, 0.5]], [[2.0, 2.0, INF]]])
    return GriddedObservations.from_values(values, errors)


def test_absence_is_an_infinite_error_and_a_zero_value():
    observations = example()
    assert observations.values.tolist() == [[[1, 0, 3]], [[4, 5, 0]]]
    assert observations.errors.tolist() == [[[0.5, INF, 0.5]], [[2, 2, INF]]]
    assert observations.mask.tolist() == [[[True, False, True]], [[True, True, False]]]


@pytest.mark.parametrize("error", [0.0, -1.0, torch.nan])
def test_impossible_errors_are_refused(error, refused):
    refused(
        "zero, negative or NaN",
        GriddedObservations.from_values,
        torch.zeros(1, 1, 1),
        torch.tensor([error]),
        error=ValueError,
    )
    absent = GriddedObservations.from_values(
        torch.full((1, 1, 1), torch.nan), torch.tensor([error])
    )
    assert not absent.mask.any()


def test_withhold_keeps_the_rest_untouched():
    observations = example()
    kept = observations.withhold(torch.tensor([True, True, False]))
    assert kept.values.tolist() == [[[1, 0, 0]], [[4, 5, 0]]]
    assert kept.errors.tolist() == [[[0.5, INF, INF]], [[2, 2, INF]]]
    assert observations.mask.sum() == 4


def test_stack_and_conversion():
    stacked = GriddedObservations.stack([example(), GriddedObservations.absent((2, 1, 3))])
    assert (stacked.values.shape, stacked.mask.sum((1, 2, 3)).tolist()) == ((2, 2, 1, 3), [4, 0])
    converted = stacked.to(torch.float64)
    assert converted.errors.dtype == converted.values.dtype == torch.float64
    assert torch.equal(converted.mask, stacked.mask)


def test_confidence(refused):
    reference = torch.tensor([0.5, 1.0])
    assert confidence(example(), reference, "binary").tolist() == [[[1, 0, 1]], [[1, 1, 0]]]
    expected = torch.tensor([[[0.5, 0.0, 0.5]], [[0.2, 0.2, 0.0]]])
    torch.testing.assert_close(confidence(example(), reference), expected)
    batched = GriddedObservations.stack([example()] * 2)
    torch.testing.assert_close(confidence(batched, reference)[1], expected)
    refused(
        "'soft' is unknown, expected 'error' or 'binary'",
        confidence,
        example(),
        reference,
        "soft",
        error=ValueError,
    )


def test_gross_check_rejects_beyond_five_combined_deviations():
    values = torch.tensor([[[24.9, 25.1, -24.9, -25.1, 1e6, 0.0]]])
    observations = GriddedObservations.from_values(values, torch.tensor([4.0]))
    background = torch.zeros(1, 1, 6)
    background[..., 5] = torch.nan
    checked = gross_check(observations, background, torch.tensor([3.0]))
    assert checked.mask.flatten().tolist() == [True, False, True, False, False, False]
    assert checked.values.flatten().tolist() == [values[0, 0, 0], 0, values[0, 0, 2], 0, 0, 0]
    assert not gross_check(observations, background, torch.tensor([3.0]), factor=4).mask.any()


@pytest.mark.fault("faults 7")
def test_a_value_that_is_not_finite_is_absent_however_it_came():
    for bad in (torch.nan, INF, -INF):
        values = torch.tensor([[[1.0, bad, 3.0]]])
        for found in (
            GriddedObservations(values, torch.ones(1, 1, 3)),
            GriddedObservations.stack([GriddedObservations(values, torch.ones(1, 1, 3))]),
            GriddedObservations(values, torch.ones(1, 1, 3)).to(torch.float64),
        ):
            assert found.values.flatten().tolist() == [1, 0, 3]
            assert found.errors.flatten().tolist() == [1, INF, 1]


GRID = regular_grid(6, 12, poles=False)  # rows at 75, 45, 15, ...; columns every 30 degrees
CHANNELS = ChannelSpec(
    surface=("2m_temperature",), upper=("temperature", "u_component_of_wind"), levels=(850, 500)
)
NOON = np.datetime64("2020-01-01T12", "ns")


def table(rows, **columns):
    """Build from (latitude, longitude, variable, level, value, error)."""
    names = ["latitude", "longitude", "variable", "level_hpa", "value", "error"]
    frame = pd.DataFrame(rows, columns=names).assign(time=NOON).assign(**columns)
    return ObservationTable.from_frame(frame)


def test_reports_land_in_their_cell_and_channel():
    gridded = grid_table(
        table(
            [
                (75, 0, "2m_temperature", np.nan, 260.0, 1.0),
                (59, 16, "temperature", 850, 270.0, 2.0),
                (-75, -16, "temperature", 500, 250.0, 3.0),
                (1, 359, "u_component_of_wind", 500, -20.0, 4.0),
            ]
        ),
        GRID,
        CHANNELS,
        NOON,
    )
    expected = {(0, 0, 0): (260, 1), (1, 1, 1): (270, 2), (2, 5, 11): (250, 3), (4, 2, 0): (-20, 4)}
    assert {tuple(place) for place in gridded.mask.nonzero().tolist()} == set(expected)
    for place, (value, error) in expected.items():
        assert (gridded.values[place], gridded.errors[place]) == (value, error)
    assert (gridded.values.dtype, gridded.values.shape) == (torch.float32, (5, 6, 12))


def test_superob_in_closed_form():
    rows = [
        (40, 40, "temperature", 850, 280.0, 1.0),
        (50, 20, "temperature", 850, 284.0, 2.0),
        (45, 30, "temperature", 850, 290.0, 2.0),
    ]
    gridded = grid_table(table(rows), GRID, CHANNELS, NOON)
    weights = np.array([1, 1 / 4, 1 / 4])
    expected = weights @ [280, 284, 290] / weights.sum()
    assert gridded.values[1, 1, 1].item() == pytest.approx(expected)
    assert gridded.errors[1, 1, 1].item() == pytest.approx(weights.sum() ** -0.5)
    assert gridded.mask.sum() == 1


def test_representativeness_does_not_average_out():
    rows = [(45, 30, "temperature", 850, 280.0, 2.0)] * 400
    representativeness = torch.tensor([9.0, 0.5, 9.0, 9.0, 9.0])
    gridded = grid_table(
        table(rows), GRID, CHANNELS, NOON, representativeness_sd=representativeness
    )
    expected = (2.0**2 / 400 + 0.5**2) ** 0.5
    assert gridded.errors[1, 1, 1].item() == pytest.approx(expected, rel=1e-6)
    assert gridded.mask.sum() == 1


def test_windows_tile_the_time_axis():
    offsets = pd.to_timedelta([-181, -180, -1, 0, 179, 180], unit="min")
    row = (45, 30, "temperature", 850, 280.0, 1.0)
    reports = table([row] * 6, time=pd.Timestamp(NOON) + offsets)
    counts = [
        grid_table(reports, GRID, CHANNELS, NOON + np.timedelta64(6 * step, "h"))
        .errors[1, 1, 1]
        .item()
        ** -2
        for step in (-1, 0, 1)
    ]
    assert counts == pytest.approx([1, 4, 1])


def test_levels_match_within_tolerance():
    pressures = [491, 489, 509, 511, 850, 600, np.nan]
    rows = [(45, 30 * i, "temperature", p, 250.0, 1.0) for i, p in enumerate(pressures)]
    gridded = grid_table(table(rows), GRID, CHANNELS, NOON)
    assert gridded.mask[2, 1].nonzero().flatten().tolist() == [0, 2]
    assert gridded.mask[1, 1].nonzero().flatten().tolist() == [4]
    wide = grid_table(table(rows), GRID, CHANNELS, NOON, level_tolerance=0.05)
    assert wide.mask[2, 1].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_what_no_analysis_takes_is_told_apart():
    rows = [
        (0, 0, "temperature", 850, 270.0, 2.0),
        (0, 0, "2m_temperature", np.nan, 270.0, 2.0),
        (0, 0, "temperature", 700, 270.0, 2.0),
        (0, 0, "temperature", np.nan, 270.0, 2.0),
        (0, 0, "geopotential", 850, 15000.0, 50.0),
        (0, 0, "geopotential", 700, 30000.0, 50.0),
    ]
    late = pd.to_datetime(["2020-01-01T12"] * 5 + ["2020-01-01T15"])
    reports = table(rows, time=late, qc=[0, 0, 0, 0, 0, 0])
    found = left_out(reports, CHANNELS, [NOON])
    assert [part.index.tolist() for part in found] == [[5], [4], [2, 3]]
    found = left_out(reports, CHANNELS, [NOON, NOON + np.timedelta64(6, "h")])
    assert [part.index.tolist() for part in found] == [[], [4, 5], [2, 3]]
    assert not any(map(len, left_out(table(rows, time=late, qc=1), CHANNELS, [NOON])))


FIRST = torch.tensor([100.0, 9.0, 8.0])
UNIT = FIRST[:, None, None]


def innovations(factor, density=0.1, problems=32):
    """Return a background whose errors are ``factor`` times the first guess, and observations."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(problems, 3, 32, 64, generator=draw) * 300 + 5000
    background = truth + factor * UNIT * torch.randn(truth.shape, generator=draw)
    errors = 0.1 * UNIT * torch.exp(3 * torch.rand(truth.shape, generator=draw) - 0.7)
    values = truth + errors * torch.randn(truth.shape, generator=draw)
    seen = torch.rand(problems, 1, 32, 64, generator=draw) < density
    return background, GriddedObservations.from_values(values, errors).withhold(seen)


def test_it_solves_its_equation():
    background, observations = innovations(0.5, problems=4)
    factors = innovation_sd(background.double(), observations, FIRST) / FIRST
    assert_close(factors[:, 0], factors[:, 2])  # one for all channels
    variance = factors[:, 0].square()
    noise = (observations.errors / UNIT).double().square()
    square = ((observations.values - background) / UNIT).double().square()
    weight = (variance[:, None, None, None] + noise).pow(-2)
    excess = torch.where(observations.mask, weight * (square - noise), 0).sum((1, 2, 3))
    assert_close(excess / weight.sum((1, 2, 3)), variance, rtol=1e-3, atol=0)


def test_without_observations_the_first_guess_is_kept():
    background, observations = innovations(0.5, problems=2)
    observations = observations.withhold(torch.tensor([True, False])[:, None, None, None])
    found = innovation_sd(background, observations, FIRST)
    assert found[0, 0] < 0.7 * FIRST[0]
    assert torch.equal(found[1], FIRST)


def test_the_estimate_is_bounded():
    background, observations = innovations(0.0, problems=4)
    perfect = observations._replace(values=background * observations.mask)
    assert_close(innovation_sd(background, perfect, FIRST), (0.02 * FIRST).expand(4, 3))
    wild = observations._replace(values=observations.values * 1e6)
    assert_close(innovation_sd(background, wild, FIRST), (10 * FIRST).expand(4, 3))


def test_absent_cells_and_gradients_do_not_count():
    background, observations = innovations(0.5, problems=2)
    wild = torch.where(observations.mask, observations.values, torch.inf)
    found = innovation_sd(background.requires_grad_(), observations, FIRST)
    assert torch.equal(found, innovation_sd(background, observations._replace(values=wild), FIRST))
    assert not found.requires_grad


@pytest.mark.parametrize("gone", ["flagged", "of another variable", "none"])
def test_what_is_flagged_or_of_another_variable_is_left_out(gone):
    variable = "geopotential" if gone == "of another variable" else "temperature"
    rows = [(45, 30, variable, 850, 280.0, 1.0)]
    reports = ObservationTable.empty() if gone == "none" else table(rows, qc=gone == "flagged")
    gridded = grid_table(reports, GRID, CHANNELS, NOON)
    assert gridded.values.shape == (5, 6, 12)
    assert not gridded.mask.any()
