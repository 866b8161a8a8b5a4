"""A table of reports against backgrounds: what is rejected, and what is left alone."""

import numpy as np
import pandas as pd
import pytest
import torch

from core_gates.errors import GatesError
from weather.assimilation import Reports, WhereObserved, by_channel
from weather.baselines.constant import Climatology
from weather.baselines.inverse_distance import InverseDistance
from weather.grid import regular_grid
from weather.observations.gridded import GriddedObservations
from weather.observations.simulation import simulate_table
from weather.observations.table import ObservationTable
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
