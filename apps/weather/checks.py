"""What the verbs of ``gates weather`` refuse before they begin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.weather.choices import Budget
from core_gates.errors import GatesError
from weather.experiments.experiment import Experiment
from weather.models.adas.forms import FORMS
from weather.training.stream import ProblemSource

MAX_SEED = 2**32  # what Lightning and NumPy take


def truth_store(experiment: Experiment, folder: Path) -> Path:
    """Return the store that ``prepare`` wrote.

    Raises:
        GatesError: There is none yet.
    """
    path = experiment.store(folder)
    if not path.exists():
        raise GatesError(f"{path} does not exist: run `gates weather prepare`, or give --truth")
    return path


def check_prepared(source: ProblemSource) -> None:
    """Refuse existing data of an experiment that are not those of the configuration.

    Raises:
        GatesError: They are damaged or belong to another experiment.
    """
    if hasattr(source, "check"):
        source.check()


def check_densities(densities: Sequence[float]) -> None:
    """Refuse densities that are out of range, or that give two tasks the same name.

    Raises:
        GatesError: There is none, one is out of range, or two have one name.
    """
    names = {f"{density:.3g}" for density in densities}
    shares = all(0 < density <= 1 for density in densities)  # false for NaN
    if not densities or not shares or len(names) < len(densities):
        raise GatesError(
            f"--densities {list(densities)} cannot be used: give one or more fractions of the grid "
            "points above 0 and up to 1, no two alike"
        )


def check_only(experiment: Experiment, densities: Sequence[float], only: Sequence[str]) -> None:
    """Refuse methods that do not exist.

    Raises:
        GatesError: One of them is unknown.
    """
    if not only:
        return
    tasks = [task.name for task in experiment.tasks(densities)]
    methods = [method.name for task in tasks for method in experiment.methods(task)]
    known = dict.fromkeys([*FORMS, *methods])
    if unknown := [name for name in only if name not in known]:
        raise GatesError(f"--only {', '.join(unknown)} is unknown: choose from {', '.join(known)}")


def check_tuning(experiment: Experiment, budget: Budget) -> None:
    """Refuse a tuning budget of nothing, or one longer than the timelines of a twin world.

    Raises:
        GatesError: A number is too small or too large.
    """
    cycles = budget.cycles
    for name in ("trials", "cycles", "trial_steps"):
        value = getattr(budget, name)
        if value < 1:
            raise GatesError(f"--{name} must be at least 1, found {value}")
    if experiment.max_cycles is not None and cycles > experiment.max_cycles:
        raise GatesError(
            f"--cycles {cycles} is more than the {experiment.max_cycles} cycles of the world: take "
            "fewer or set cycles of the world"
        )


def check_seeds(experiment: Experiment, seeds: Sequence[int]) -> None:
    """Refuse seeds that are out of range or repeated, or more than there are test timelines.

    Raises:
        GatesError: There is no seed, one is out of range or given twice, or there are too many.
    """
    valid = all(0 <= seed < MAX_SEED for seed in seeds)
    if not seeds or not valid or len(set(seeds)) < len(seeds):
        raise GatesError(
            f"--seeds {list(seeds)} cannot be used: give one or more numbers from 0 to "
            f"{MAX_SEED - 1}, no two alike"
        )
    if experiment.max_seeds is not None and len(seeds) > experiment.max_seeds:
        raise GatesError(
            f"{len(seeds)} seeds need as many test timelines, the world has "
            f"{experiment.max_seeds}: take fewer seeds or set num_tests"
        )
