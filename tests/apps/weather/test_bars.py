"""The bars of ``gates weather evaluate``, from errors made by hand."""

from types import SimpleNamespace

import pytest
import torch

from harness.evidence import Resamples, moments, root_ratio
from weather.experiments.ensemble.era5_ensemble import EnsembleScores
from weather.experiments.twin.twin_experiment import Corruption, TwinChecks
from weather.experiments.twin.twin_scores import TwinScores
from weather.experiments.twin.twin_tasks import TwinTask

SPARSE = ("0.01/perfect", "0.01/error")
LABELS = ("h", "u")


def shown(bars):
    """Name -> value, sense, limit, met."""
    return {bar.name: (pytest.approx(bar.value), bar.sense, bar.bar, bar.met) for bar in bars}


@pytest.fixture
def ensemble():
    """Four cases of four members with two channels; square errors of the background are 4."""
    cases = [SimpleNamespace(member=member) for member in range(4)]
    source = SimpleNamespace(cases=lambda task: cases, channels=None)
    scores = EnsembleScores(source, (0.01, 0.1), None, (0,), ("adas_increment",), {})
    squares = {
        ("persistence/0.1", "oi"): [1.0, 1.44],
        ("persistence/0.1", "adas_increment"): [1.69, 1.0],
        ("ensemble/0.1", "oi"): [3.61, 1.0],
        ("ensemble/0.1", "letkf"): [1.0, 4.84],
    }
    for task in ("persistence", "ensemble"):
        for density in scores.densities:
            for method in ("background", "oi", "letkf", "adas_increment"):
                key = f"{task}/{density:.3g}", method
                one = squares.get(key, [4.0, 4.0] if method == "background" else [400.0, 400.0])
                scores.errors[key] = torch.tensor(one).repeat(4, 1)
    return scores


def test_bars_of_the_ensemble_are_those_of_the_largest_density(ensemble):
    assert shown(ensemble.bars()) == {
        "oi over background, worst field, persistence/0.1": (0.6, "<=", 1.0, True),
        "adas_increment over background, worst upper end, persistence/0.1": (
            0.65,
            "<=",
            1.0,
            True,
        ),
        "adas_increment over oi, worst field, persistence/0.1": (1.3, "<=", 1.25, False),
        "oi over background, worst field, ensemble/0.1": (0.95, "<=", 1.0, True),
        "letkf over background, worst field, ensemble/0.1": (1.1, "<=", 1.0, False),
    }


def test_bars_of_networks_that_are_missing_are_neither_met_nor_missed(ensemble):
    ensemble.forms = ()
    bars = {bar.name.partition(",")[0]: bar for bar in ensemble.bars()}
    assert {name for name, bar in bars.items() if bar.met is None} == {
        "adas_increment over background",
        "adas_increment over oi",
    }
    assert all("not measured" in bar.note for bar in bars.values() if bar.met is None)


def test_the_network_is_held_to_the_upper_end(ensemble):
    own = torch.tensor([0.1, 0.1, 0.1, 14.0])  # the mean is below that of the background
    errors = ensemble.errors["persistence/0.1", "adas_increment"]
    errors[:, 0] = own
    bar = next(bar for bar in ensemble.bars() if "upper end" in bar.name)
    pairs = torch.stack((own, torch.full((4,), 4.0)), 1)
    interval = Resamples.clusters(range(4)).intervals(moments(pairs, root_ratio))["value"]
    assert interval.value < 1 < interval.high
    assert bar.value == interval.high
    assert not bar.met


@pytest.fixture
def twin():
    """Three timelines at two densities; the increment form is better in the perfect model only."""
    world = SimpleNamespace(channels=SimpleNamespace(labels=LABELS))
    tasks = [TwinTask(d, model) for model in ("perfect", "error") for d in (0.1, 0.01)]
    evaluation = SimpleNamespace(world=world, tasks=tasks)
    forms = ("adas_increment", "adas_official", "ungated")
    scores = TwinScores(evaluation, None, (0, 1, 2), forms, {})
    errors = {
        ("0.01/perfect", "oi"): [10.0, 1.0, 90.0],
        ("0.01/perfect", "adas_increment"): [99.0, 8.0, 2.0],
        ("0.01/perfect", "adas_official"): [20.0, 20.0, 20.0],
        ("0.01/error", "oi"): [10.0, 10.0, 10.0],
        ("0.01/error", "adas_increment"): [30.0, 30.0, 30.0],
        ("0.01/error", "adas_official"): [9.0, 9.0, 1.0],
    }
    falling = 100.0 - torch.arange(20.0)  # 90 to 81 within the last half
    for task in tasks:
        for method in ("oi", *forms):
            each = errors.get((task.name, method), [1.0, 1.0, 1.0])
            scores.errors[task.name, method] = torch.tensor([[e, 5000.0] for e in each])
            steady = torch.full((20, 3, 2), 50.0)
            if (task.name, method) == ("0.01/error", "adas_official"):
                steady[:, :, 0] = falling[:, None]
            scores.scores[task.name, method] = SimpleNamespace(analysis=steady)
    return scores


def test_bars_of_the_twin_are_medians_of_the_better_form_at_the_smallest_density(twin):
    assert shown(twin.bars()) == {
        "adas_increment over oi, rmse_h, 0.01/perfect": (0.8, "<=", 0.85, True),
        "drift of adas_increment, 0.01/perfect": (0.0, "<=", 0.1, True),
        "adas_official over oi, rmse_h, 0.01/error": (0.9, "<=", 0.85, False),
        "drift of adas_official, 0.01/error": (10 / 85.5, "<=", 0.1, False),
    }


@pytest.mark.parametrize(
    ("corruption", "met"), [((1.05, 1.10, 1.10), True), ((1.06, 1.09, 1.08), False)]
)
def test_bars_of_the_checks(twin, corruption, met):
    checks = TwinChecks(twin)
    checks.corruption["adas_increment"] = Corruption(*corruption)
    checks.crossed = {
        (SPARSE[0], "adas_increment"): [2.0, 3.0, 1.0],
        (SPARSE[0], "ungated"): [3.0, 4.0, 9.0],
        (SPARSE[1], "adas_increment"): [2.0, 3.5, 1.0],
        (SPARSE[1], "ungated"): [9.0, 2.8, 4.0],
    }
    worst = "worst gated over best ungated seed, rmse_h"
    half = "adas_increment, corrupted half"
    assert shown(checks.bars()) == {
        f"{worst}, {SPARSE[0]}": (1.0, "<=", 1.0, True),
        f"{worst}, {SPARSE[1]}": (1.25, "<=", 1.0, False),
        f"{half} declared over withheld": (corruption[0], "<=", 1.05, met),
        f"{half} denied over withheld": (corruption[1], ">=", 1.10, met),
        f"{half} forced over withheld": (corruption[2], ">=", 1.10, met),
    }
