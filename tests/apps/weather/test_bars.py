"""The bars of ``gates weather evaluate``, from errors made by hand."""

from types import SimpleNamespace

import pytest
import torch

from harness.evidence import Resamples, moments, root_ratio
from weather.experiments.ensemble.ensemble_sample import TASKS, EnsembleTask
from weather.experiments.ensemble.source import EnsembleScores

SPARSE = ("0.01/perfect", "0.01/error")
LABELS = ("h", "u")


def shown(bars):
    """Name -> value, sense, limit, met."""
    return {bar.name: (pytest.approx(bar.value), bar.sense, bar.bar, bar.met) for bar in bars}


@pytest.fixture
def ensemble():
    """Four cases of four members with two channels; square errors of the background are 4."""
    cases = [SimpleNamespace(member=member) for member in range(4)]
    source = SimpleNamespace(cases=lambda task: cases, channels=SimpleNamespace(labels=LABELS))
    tasks = [EnsembleTask(kind, density) for kind in TASKS for density in (0.01, 0.1)]
    scores = EnsembleScores(source, tasks, None, (0,), ("adas_increment",), {})
    squares = {
        ("persistence/0.1", "oi"): [1.0, 1.44],
        ("persistence/0.1", "adas_increment"): [1.69, 1.0],
        ("ensemble/0.1", "oi"): [3.61, 1.0],
        ("ensemble/0.1", "letkf"): [1.0, 4.84],
    }
    for task in tasks:
        for method in ("background", "oi", "letkf", "adas_increment"):
            key = task.name, method
            one = squares.get(key, [4.0, 4.0] if method == "background" else [400.0, 400.0])
            scores.errors[key] = torch.tensor(one).repeat(1, 4, 1)
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
    errors[0, :, 0] = own
    bar = next(bar for bar in ensemble.bars() if "upper end" in bar.name)
    pairs = torch.stack((own, torch.full((4,), 4.0)), 1)
    interval = Resamples.clusters(range(4)).intervals(moments(pairs, root_ratio))["value"]
    assert interval.value < 1 < interval.high
    assert bar.value == interval.high
    assert not bar.met
