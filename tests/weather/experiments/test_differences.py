"""Differences from the reference: paired, and never more certain than their units allow."""

from types import SimpleNamespace

import pytest
import torch

from weather.experiments.ensemble.era5_ensemble import EnsembleScores
from weather.experiments.twin.twin_experiment import TwinChecks
from weather.experiments.twin.twin_scores import TwinScores
from weather.experiments.twin.twin_tasks import CycleScores, TwinTask, settled

TASK = TwinTask(0.1, "perfect")
CYCLES = 90


@pytest.fixture
def twin():
    """Three timelines; Adas errs by 0.8 of OI, cycle by cycle; the first OI timeline is lost."""
    world = SimpleNamespace(channels=SimpleNamespace(labels=("h", "u")))
    evaluation = SimpleNamespace(world=world, tasks=[TASK])
    scores = TwinScores(evaluation, None, (0, 1, 2), ("adas_increment", "ungated"), {})
    error = 1 + torch.rand(CYCLES, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    free = CycleScores(error, 9 * error, 0 * error, torch.zeros(3, dtype=torch.bool))
    lost = torch.tensor([True, False, False])
    for method, factor in (("free_run", 9.0), ("oi", 1.0), ("adas_increment", 0.8)):
        own = free._replace(analysis=factor * error, lost=lost & torch.tensor(method == "oi"))
        scores.scores[TASK.name, method] = own
        scores.errors[TASK.name, method] = settled(own, free)
    for form, factor in (("adas_increment", 0.8), ("ungated", 0.9)):
        square = factor * torch.tensor([1.0, 2.0, 3.0]).double()
        scores.crossed[TASK.name, form] = square[None, :, None].repeat(3, 1, 2)
    return scores


def only(rows, **wanted):
    (row,) = [r for r in rows if all(getattr(r, name) == v for name, v in wanted.items())]
    return row


def test_a_twin_is_compared_with_oi_and_lost_timelines_count_as_the_free_run(twin):
    rows = twin.rows()
    own, other = (only(rows, method=m, metric="rmse_h", versus="")
                  for m in ("adas_increment", "oi"))  # fmt: skip
    gap = only(rows, method="adas_increment", metric="rmse_h", versus="oi")
    assert gap.value == pytest.approx(own.value - other.value)
    assert own.low < own.value < own.high
    assert gap.low <= gap.value <= gap.high < 0
    assert gap.n == own.n == 9  # three blocks of five days on each timeline
    assert not any(row.versus and row.method == "oi" for row in rows)


def test_lost_timelines_are_drawn_as_the_free_run(twin):
    pictures = twin.pictures()
    own, free = (pictures[f"{TASK.name}|{method}"] for method in ("oi", "free_run"))
    assert torch.equal(own[:, 0], free[:, 0])
    assert not torch.equal(own[:, 1], free[:, 1])


def test_three_timelines_make_no_difference_significant(twin):
    differences = [row for row in twin.rows() if row.versus]
    assert {(row.method, row.metric) for row in differences} == {
        (method, metric) for method in ("free_run", "adas_increment")
        for metric in ("rmse_h", "rmse_u")
    }  # fmt: skip
    assert all(row.p >= 0.25 for row in differences)
    assert not any(row.significant for row in differences)


def test_crossed_seeds_compare_the_gate_with_its_control(twin):
    checks = TwinChecks(twin)
    gap = only(checks.rows(), task="0.1/perfect/crossed", metric="rmse_h", versus="ungated")
    assert gap.method == "adas_increment"
    assert gap.value == pytest.approx(-0.1 * (14 / 3) ** 0.5)
    assert (gap.n, gap.p >= 0.25) == (3, True)
    assert gap.high < 0


def test_two_times_make_no_difference_significant():
    cases = [SimpleNamespace(member=m, time=t) for t in range(2) for m in range(9)]
    source = SimpleNamespace(cases=lambda kind: cases, channels=SimpleNamespace(labels=("z", "t")))
    scores = EnsembleScores(source, (0.1,), None, (), (), {})
    for kind in ("persistence", "ensemble"):
        for method, factor in (("background", 4.0), ("oi", 1.0)):
            square = 1 + torch.rand(18, 2, generator=torch.Generator().manual_seed(0))
            scores.errors[f"{kind}/0.1", method] = factor * square
            scores.departures[f"{kind}/0.1", method] = (None, None)
    gap = only(scores.rows(), task="ensemble/0.1", metric="rmse_z", versus="background")
    assert gap.high < 0
    assert gap.p == 0.5
    assert gap.n == 2
    assert not gap.significant
    own = only(scores.rows(), task="ensemble/0.1", metric="ratio_z", method="oi")
    assert own.value == pytest.approx(0.5)
