"""A table of reports against backgrounds: what is rejected, and what is left alone."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from weather.assimilation import Reports, WhereObserved, by_channel
from weather.baselines.assimilator import Climatology, InverseDistance
from weather.grid import regular_grid
from weather.observations.gridded import GriddedObservations
from weather.observations.operators import BackgroundFrames
from weather.observations.report_table import ObservationTable
from weather.observations.simulated import simulate_table
from weather.state import ERA5_SAMPLE, ChannelSpec

GRID = regular_grid(12, 24, poles=False)
CHANNELS = ChannelSpec((), ("temperature",), (500,))
NOON = np.datetime64("2020-01-01T12", "ns")
SD = torch.tensor([2.0])


def truth(warm=30.0):
    """Colder northwards, so that the hemispheres differ."""
    return (260 - warm * GRID.latitude.deg2rad().sin()).float()[None, :, None].expand(1, 12, 24)


def table(field, count=200, error=0.5):
    sd = torch.tensor([error])
    return simulate_table(field, GRID, CHANNELS, time=NOON, count=count, error_sd=sd, seed=0)


def reports(frame, **changes):
    return Reports(ObservationTable.from_frame(frame), GRID, CHANNELS, SD, **changes)


def test_good_reports_are_taken_without_a_warning():
    background = truth() + 1
    made = reports(table(truth()).frame)
    observations = made.at(NOON, background)
    assert made.observed == [int(observations.mask.sum())]
    assert made.rejected == [0]
    assert made.warning() == ""


@pytest.mark.fault("weather Bc")
def test_flipped_latitudes_are_named():
    frame = table(truth()).frame
    made = reports(frame.assign(latitude=-frame["latitude"]))
    made.at(NOON, truth() + 1)
    line = made.warning()
    assert line.startswith(f"warning: {made.rejected[0]} of {made.observed[0]} observed cells are")
    assert line.endswith("latitudes of the wrong sign, with which only 0 would be")
    assert "\n" not in line


@pytest.mark.fault("weather Bc")
def test_other_causes_of_many_rejections_are_named():
    made = reports(table(truth() + 40).frame)
    made.at(NOON, truth())
    assert made.rejected == made.observed
    for cause in ("units", "latitudes", "time"):
        assert cause in made.warning()


@pytest.mark.parametrize("count", [5, 200])
def test_a_channel_that_loses_every_observation_is_refused(count):
    """A background or reports in another unit; a handful may all be wrong by chance."""
    made = reports(table(truth() + 40, count).frame)
    made.at(NOON, truth())
    if count < 10:
        made.require_plausible()
    else:
        with pytest.raises(GatesError, match=rf"rejects all {made.observed[0]} .* cells of t500"):
            made.require_plausible()
    some = reports(table(truth(), count).frame)
    some.at(NOON, truth())
    some.require_plausible()


def test_a_few_bad_reports_are_no_reason_to_warn():
    frame = table(truth()).frame
    frame.loc[:1, "value"] += 60
    made = reports(frame)
    passed = made.at(NOON, truth())
    away = torch.where(passed.mask[0], passed.values[0] - truth(), 0)
    assert away.abs().max() < 3  # the good ones, where they were reported
    assert made.rejected == [2]
    assert made.warning() == ""


@pytest.mark.fault("weather Bb")
def test_a_background_is_not_altered_by_nothing():
    background = truth()[None, None] + 1
    method = WhereObserved(Climatology(torch.zeros(1, 12, 24)))
    nothing = GriddedObservations.absent((1, 1, 12, 24))
    found = method.analyse(background, nothing)
    assert torch.equal(found, background)
    assert found.data_ptr() != background.data_ptr()
    one = nothing.values.clone()
    seen = GriddedObservations(one, torch.ones_like(one))
    assert not torch.equal(method.analyse(background, seen), background)


def test_backgrounds_are_analyzed_at_their_own_times():
    states = torch.stack((truth(), truth()))
    times = np.array([NOON - np.timedelta64(12, "h"), NOON])
    made = reports(table(truth() + 1).frame)
    found = made.analyze(InverseDistance(GRID), states, times)
    assert torch.equal(found.states[0], states[0])
    assert (found.states[1] - states[1] - 1).abs().mean() < 0.5
    assert (found.observed[0], found.rejected) == (0, [0, 0])


def test_representativeness_adds_to_the_errors_of_cells():
    made = reports(table(truth()).frame, representativeness=torch.tensor([3.0]))
    errors = made.at(NOON, truth()).errors
    assert errors.min() >= 3


def test_numbers_by_variable():
    default = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = by_channel({"temperature": 0.5}, ERA5_SAMPLE, default, "background_error")
    assert found.tolist() == [1, 2, 0.5, 0.5]
    assert default.tolist() == [1, 2, 3, 4]
    for wrong in ({"temperatur": 0.5}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(GatesError, match=r"--background_error .* positive numbers for geopot"):
            by_channel(wrong, ERA5_SAMPLE, default, "background_error")


@pytest.mark.parametrize(("sd", "factor"), [(0.0, 5.0), (float("nan"), 5.0), (1.0, 0.0)])
def test_a_gross_check_needs_positive_numbers(sd, factor):
    empty = ObservationTable.from_frame(pd.DataFrame(table(truth()).frame))
    with pytest.raises(GatesError, match="positive"):
        Reports(empty, GRID, CHANNELS, torch.tensor([sd]), factor=factor)


def ramp(hours=0.0):
    """A field that is linear in longitude away from the seam, and in time."""
    field = 250 + 0.1 * GRID.longitude.float() + 0.5 * hours
    return field.expand(1, 12, 24).clone()


def soundings(**columns):
    """Three reports off the centers of their cells, before, at and after noon."""
    longitude = [31.0, 91.0, 151.0]
    offsets = pd.to_timedelta([-2, 0, 2], unit="h")
    frame = pd.DataFrame({"longitude": longitude, "time": pd.Timestamp(NOON) + offsets})
    rows = frame.assign(latitude=22.5, variable="temperature", level_hpa=500.0, error=0.1)
    hours = np.array([-2.0, 0.0, 2.0])
    rows = rows.assign(value=250 + 0.1 * frame["longitude"] + 0.5 * hours)
    return rows.assign(**columns)


def innovations(made, around=None):
    seen = made.at(NOON, ramp(), around)
    return (seen.values[0] - ramp())[seen.mask[0]]


def test_the_operator_that_interpolates_is_a_switch():
    """Exact reports off the grid: the nearest cell is off by the slope, interpolation is not."""
    exact = soundings(time=pd.Timestamp(NOON), value=250 + 0.1 * soundings()["longitude"])
    assert_close(innovations(reports(exact)), torch.full((3,), 0.1), rtol=0, atol=1e-4)
    interpolating = reports(exact, observation_operator="interpolation")
    assert_close(innovations(interpolating), torch.zeros(3), rtol=0, atol=1e-4)


def test_reports_are_compared_at_their_own_time():
    frames = BackgroundFrames(torch.stack([ramp(h) for h in (-3, 0, 3)]), (-3.0, 0.0, 3.0))
    made = reports(soundings(), observation_operator="interpolation")
    expected = torch.tensor([-1.0, 0.0, 1.0])
    assert_close(innovations(made), expected, rtol=0, atol=1e-4)
    timely = reports(soundings(), observation_operator="interpolation_in_time")
    assert_close(innovations(timely, frames), torch.zeros(3), rtol=0, atol=1e-4)


def test_backgrounds_of_other_times_are_found_around_each():
    times = NOON + np.array([-6, 0, 6, 36]) * np.timedelta64(1, "h")
    states = torch.stack([ramp(h) for h in (-6, 0, 6, 36)])
    made = reports(soundings(), observation_operator="interpolation_in_time")
    analyses = made.analyze(InverseDistance(GRID), states[:3], times[:3])
    assert_close(analyses.states, states[:3], rtol=0, atol=1e-4)
    untimely = reports(soundings(), observation_operator="interpolation")
    moved = untimely.analyze(InverseDistance(GRID), states[:3], times[:3]).states
    assert (moved - states[:3]).abs().max() > 0.5
    with pytest.raises(GatesError, match=r"no other background lies within 12 h of 2020-01-03T00"):
        made.analyze(InverseDistance(GRID), states, times)


def test_in_a_cycle_the_model_fills_the_window():
    """Truth warms by .5 K/h and so does the model: no report at its own time moves anything."""

    def model(states, hours):
        return states + 0.5 * hours

    times = NOON + np.array([0, 6]) * np.timedelta64(1, "h")
    late = soundings(time=soundings()["time"] + pd.Timedelta("6h"), value=soundings()["value"] + 3)
    both = pd.concat((soundings(), late))
    found = {}
    for own_time in (True, False):
        made = reports(both, observation_operator="interpolation" + "_in_time" * own_time)
        found[own_time] = made.cycle(InverseDistance(GRID), model, ramp(), times, 6.0).states
    # The first window has no forecast before noon: its frame of noon is the earliest.
    assert (found[True][0] - ramp()).abs().max() > 0.5
    kept = reports(late, observation_operator="interpolation_in_time")
    second = kept.cycle(InverseDistance(GRID), model, ramp(), times, 6.0).states[1]
    assert_close(second, ramp(6), rtol=0, atol=1e-4)
    assert (found[False][1] - ramp(6)).abs().max() > 0.5


def test_operators_that_do_not_fit_are_refused():
    with pytest.raises(GatesError, match="'nearest' is unknown, expected nearest_cell, interp"):
        reports(soundings(), observation_operator="nearest")


class Steps:
    """A model of two frames, six hours apart, that cannot take less."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        self.given = []

    def __call__(self, states, hours, previous=None):
        assert hours == 6
        self.given.append(previous)
        return states + 3.0


@pytest.mark.parametrize("own_time", [False, True])
def test_a_model_of_two_frames_is_given_the_last_two_analyses(own_time):
    """And a window that ends within its step is filled from both ends of the step."""
    model, times = Steps(), NOON + np.array([0, 6, 12]) * np.timedelta64(1, "h")
    later = [
        soundings(time=soundings()["time"] + pd.Timedelta(6 * n, "h"),
                  value=soundings()["value"] + 3 * n) for n in (1, 2)
    ]  # fmt: skip
    operator = "interpolation_in_time" if own_time else "interpolation"
    made = reports(pd.concat(later), observation_operator=operator)
    found = made.cycle(InverseDistance(GRID), model, ramp(), times, 6.0).states
    assert torch.equal(found[0], ramp())
    given = [previous for previous in model.given if previous is not None]
    assert any(torch.equal(previous[0], found[0]) for previous in given)
    off = (found[2] - ramp(12)).abs().max()  # the truth warms by .5 K/h and so does the model
    assert off < 1e-3 if own_time else off > 0.1
    if not own_time:
        assert [previous is None for previous in model.given] == [True, False]
