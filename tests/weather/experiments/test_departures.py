import math

import pytest
import torch

from weather.baselines.assimilator import FreeRun
from weather.cycle import CycleStep
from weather.grid import regular_grid
from weather.metrics import Departures, figures, withheld_points
from weather.observations.gridded import GriddedObservations

GRID = regular_grid(16, 32, poles=False)


class HalfWay:
    """Analyse to the middle between background and observation, where there is one."""

    members = 1

    def analyse(self, background, observations):
        innovation = (observations.values - background[:, 0]) * observations.mask
        return background + innovation[:, None] / 2


@pytest.fixture
def step():
    """Background 0 and observations 2 everywhere in channel 0, 4 in channel 1; two timelines."""
    values = torch.tensor([2.0, 4.0])[:, None, None].expand(2, 2, 16, 32)
    observations = GriddedObservations.from_values(values, torch.ones(2))
    background = torch.zeros(2, 1, 2, 16, 32)
    return CycleStep(background, HalfWay().analyse(background, observations), observations)


def points():
    return torch.stack([withheld_points(GRID, 0, member) for member in range(2)])


def test_a_tenth_of_the_points_is_withheld_alike_at_each_call():
    chosen = withheld_points(GRID, 3, 1)
    assert torch.equal(chosen, withheld_points(GRID, 3, 1))
    assert not torch.equal(chosen, withheld_points(GRID, 3, 2))
    assert 0.05 < chosen.double().mean() < 0.16


def test_figures_of_a_known_analysis(step):
    departures = Departures(points())
    departures.add(step, HalfWay())
    found = figures(departures.assimilated, departures.withheld)
    assert found["ob_bias"] == [2.0, 4.0]
    assert found["oa_bias"] == [1.0, 2.0]
    assert found["oa_rms"] == [1.0, 2.0]
    # The withheld points keep the background: the analysis did not see them.
    assert found["withheld_rmse"] == [2.0, 4.0]
    assert float(departures.withheld.number[0]) == points().sum()
    assert float(departures.assimilated.number[0]) == 2 * 16 * 32


def test_timelines_that_are_lost_do_not_count(step):
    step.analysis[1] = math.nan
    departures = Departures(points())
    departures.add(step, HalfWay(), keep=torch.tensor([True, False]))
    assert figures(departures.assimilated, departures.withheld)["oa_rms"] == [1.0, 2.0]
    assert float(departures.assimilated.number[0]) == 16 * 32
    nobody = Departures(points())
    nobody.add(step, FreeRun(), keep=torch.tensor([False, False]))
    assert all(math.isnan(x) for x in figures(nobody.assimilated, None)["ob_rms"])


def test_extra_analyses_are_made_every_so_often(step):
    calls = []

    class Counting(HalfWay):
        def analyse(self, background, observations):
            calls.append(int(observations.mask.sum()))
            return super().analyse(background, observations)

    departures = Departures(points(), every=3)
    for _ in range(7):
        departures.add(step, Counting())
    assert len(calls) == 3
    assert set(calls) == {2 * int((~points()).sum())}
    assert float(departures.assimilated.number[0]) == 7 * 2 * 16 * 32


def test_nothing_departed_nothing_to_show():
    assert figures(None, None) == {}
