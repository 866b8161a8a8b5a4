"""What the verbs ask of a source of problems: its methods, its units, its store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from core_gates.errors import GatesError
from weather.experiments.ensemble.methods import ensemble_methods
from weather.experiments.ensemble.source import TASKS, Era5EnsembleSource, Task
from weather.experiments.method import Method
from weather.experiments.twin.methods import TwinMethods
from weather.experiments.twin.recording import load_recording
from weather.experiments.twin.source import TwinSource
from weather.training.stream import ProblemSource

ERA5_STORE = "era5_ensemble.zarr"
DENSITIES = (0.1, 0.01)
MAX_SEED = 2**32  # what Lightning and NumPy take


def twin_of(source: ProblemSource) -> TwinSource:
    """Return the source as a twin experiment.

    Raises:
        GatesError: It is another source, which has no tasks and no truth to be scored against.
    """
    if not isinstance(source, TwinSource):
        raise GatesError(
            f"data.source is {type(source).__name__}, expected TwinSource or Era5EnsembleSource: "
            "a source of your own can be used with fit only"
        )
    return source


def tasks_of(source: ProblemSource, densities: Sequence[float] = DENSITIES) -> list[str]:
    """Return the names of the tasks, the default one first."""
    if isinstance(source, Era5EnsembleSource):
        return [f"{task}/{density:.3g}" for task in TASKS for density in densities]
    return [f"{density:.3g}/{model}" for model in ("perfect", "error") for density in densities]


def era5_task(name: str) -> Task:
    """Return the kind of an ERA5 task from its name, such as ``persistence/0.1``."""
    return next((task for task in TASKS if name.startswith(task)), TASKS[0])


def methods_of(source: ProblemSource, task: str) -> list[Method]:
    """Return the classical methods that can be used for a task."""
    if isinstance(source, Era5EnsembleSource):
        return ensemble_methods(source, era5_task(task))
    return TwinMethods(twin_of(source).world).all()


def background_sd(source: ProblemSource, task: str) -> Tensor:
    """Return the standard deviation (C,) of the background error in a task."""
    if isinstance(source, Era5EnsembleSource):
        return source.task_background_sd[era5_task(task)]
    return source.background_sd


def error_sd(source: ProblemSource) -> Tensor:
    """Return the standard deviations (C,) of the errors of simulated observations."""
    if isinstance(source, Era5EnsembleSource):
        return source.error_sd["persistence"]
    return twin_of(source).world.error_sd


def store_of(source: ProblemSource, folder: Path) -> Path:
    """Return the store that ``prepare`` wrote.

    Args:
        source: Twin experiment or ERA5 sample.
        folder: Run folder.

    Raises:
        GatesError: There is none yet.
    """
    if isinstance(source, Era5EnsembleSource):
        path = folder / ERA5_STORE
    else:
        path = twin_of(source).world.path
    if not path.exists():
        raise GatesError(f"{path} does not exist: run `gates weather prepare`, or give --truth")
    return path


def check_prepared(source: ProblemSource) -> None:
    """Refuse a nature run or a recording that is there and not that of the configuration.

    Raises:
        GatesError: It is damaged or belongs to another world.
    """
    if isinstance(source, TwinSource):
        if source.world.path.exists():
            source.world.prepare()
        if source.path.exists():
            load_recording(source.path, source.origin)


def check_densities(densities: Sequence[float]) -> None:
    """Refuse shares of grid points that are no shares, or not told apart by the names of tasks.

    Raises:
        GatesError: There are none, or one is not a share, or two have one name.
    """
    names = {f"{density:.3g}" for density in densities}
    shares = all(0 < density <= 1 for density in densities)  # false for NaN
    if not densities or not shares or len(names) < len(densities):
        raise GatesError(
            f"--densities {list(densities)} are no shares of grid points: give one or more numbers "
            "above 0 and up to 1, no two alike"
        )


def check_tuning(source: ProblemSource, trials: int, cycles: int, trial_steps: int) -> None:
    """Refuse a budget of tuning that is nothing, or longer than a twin world.

    Raises:
        GatesError: A number is too small or too large.
    """
    for name, value in (("trials", trials), ("cycles", cycles), ("trial_steps", trial_steps)):
        if value < 1:
            raise GatesError(f"--{name} must be at least 1, found {value}")
    if isinstance(source, TwinSource) and cycles > source.world.cycles:
        raise GatesError(
            f"--cycles {cycles} is more than the {source.world.cycles} cycles of the world: take "
            "fewer or set cycles of the world"
        )


def check_seeds(source: ProblemSource, seeds: Sequence[int]) -> None:
    """Refuse seeds that are none, and more than a twin world has timelines to test on.

    Raises:
        GatesError: There is no seed, one is out of range or given twice, or there are too many.
    """
    valid = all(0 <= seed < MAX_SEED for seed in seeds)
    if not seeds or not valid or len(set(seeds)) < len(seeds):
        raise GatesError(
            f"--seeds {list(seeds)} are no seeds: give one or more numbers from 0 to "
            f"{MAX_SEED - 1}, no two alike"
        )
    tests = len(source.world.members["test"]) if isinstance(source, TwinSource) else len(seeds)
    if len(seeds) > tests:
        raise GatesError(
            f"{len(seeds)} seeds need as many test timelines, the world has {tests}: take fewer "
            "seeds or set num_tests"
        )
