import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from weather.grid import gaussian_grid, regular_grid
from weather.observations.gridded import grid_table, left_out
from weather.observations.report_table import ObservationTable
from weather.state import ChannelSpec

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
        assert gridded.values[place] == value
        assert gridded.errors[place] == error
    assert gridded.values.dtype == torch.float32
    assert gridded.values.shape == (5, 6, 12)


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


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(200, 300), st.floats(0.1, 10)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_superob_invariants(pairs, random):
    """Order does not matter; the mean lies among the values; the error below each of them."""
    rows = [(15, 60, "temperature", 500, value, error) for value, error in pairs]
    gridded = grid_table(table(rows), GRID, CHANNELS, NOON)
    random.shuffle(rows)
    shuffled = grid_table(table(rows), GRID, CHANNELS, NOON)
    value, error = gridded.values[2, 2, 2].item(), gridded.errors[2, 2, 2].item()
    assert shuffled.values[2, 2, 2].item() == pytest.approx(value, rel=1e-6)
    assert min(v for v, _ in pairs) - 1e-3 <= value <= max(v for v, _ in pairs) + 1e-3
    assert error <= min(e for _, e in pairs) * (1 + 1e-6)
    weights = np.array([e**-2 for _, e in pairs])
    assert value == pytest.approx(weights @ [v for v, _ in pairs] / weights.sum(), rel=1e-6)


def test_two_batches_combine_like_one():
    """Gridding superobs again gives the same as gridding all reports at once."""
    rows = [(15, 60, "temperature", 500, 250.0 + i, 1.0 + i) for i in range(6)]
    together = grid_table(table(rows), GRID, CHANNELS, NOON)
    parts = [grid_table(table(half), GRID, CHANNELS, NOON) for half in (rows[:2], rows[2:])]
    rows = [
        (15, 60, "temperature", 500, part.values[2, 2, 2].item(), part.errors[2, 2, 2].item())
        for part in parts
    ]
    again = grid_table(table(rows), GRID, CHANNELS, NOON)
    torch.testing.assert_close(again.values, together.values)
    torch.testing.assert_close(again.errors, together.errors)


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


def test_flagged_reports_are_left_out():
    rows = [(45, 30, "temperature", 850, 280.0, 1.0), (45, 60, "temperature", 850, 281.0, 1.0)]
    gridded = grid_table(table(rows, qc=[0, 1]), GRID, CHANNELS, NOON)
    assert gridded.mask.nonzero().tolist() == [[1, 1, 1]]


def test_other_variables_are_left_out():
    rows = [(45, 30, "geopotential", 850, 14000.0, 1.0)]
    assert not grid_table(table(rows), GRID, CHANNELS, NOON).mask.any()


def test_empty_batch_is_all_absent():
    gridded = grid_table(ObservationTable.empty(), gaussian_grid(8, 16), CHANNELS, NOON)
    assert gridded.values.shape == (5, 8, 16)
    assert not gridded.mask.any()
    assert gridded.values.abs().max() == 0


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
    evening = NOON + np.timedelta64(6, "h")
    found = left_out(reports, CHANNELS, [NOON, evening])
    assert [part.index.tolist() for part in found] == [[], [4, 5], [2, 3]]
    flagged = table(rows, time=late, qc=1)
    assert not any(map(len, left_out(flagged, CHANNELS, [NOON])))
