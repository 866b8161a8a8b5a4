"""A twin world as an experiment: what is tuned and scored on a few timelines, without bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from harness.files import Data
from weather.baselines.assimilator import Climatology, FreeRun, InverseDistance, Persistence
from weather.baselines.covariance import DenseCovariance, SampleCovariance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.experiment import (
    DENSITIES,
    Load,
    Method,
    Score,
    Setting,
    Settings,
    TunedExperiment,
    shown,
)
from weather.experiments.twin.scenarios import OsseTask, fixed_tasks
from weather.experiments.twin.twin_cycles import TwinCycles
from weather.experiments.twin.twin_scores import INTERPOLATION, TwinScores
from weather.experiments.twin.world import TwinWorld
from weather.plots import cycle_figures
from weather.progress import Progress, silent

QUICK_CYCLES = 30
FORMS: tuple[str, ...] = ("adas_increment", "ungated")
MEMBERS = 20


class TwinExperiment(TunedExperiment):
    """Tasks, methods, tuning and scores of a world, see `..experiment.Experiment`.

    Args:
        world: Nature, forecast models and observation errors.
    """

    forms = tuned = FORMS
    reference = INTERPOLATION
    base: tuple[str, ...] = ("free_run",)
    decisive = ("world",)
    pictures_file = "cycles.safetensors"
    notes: tuple[str, ...] = (
        "Lost timelines count as climatology. In the perfect model the free run is the truth of 24 "
        "hours before, as it starts there, and not an independent trajectory of the model.",
        "Optimal interpolation takes its covariances from day differences, while networks train on "
        "recorded backgrounds with their truths: the two were not given the same data.",
    )

    def __init__(self, world: TwinWorld) -> None:
        self.world = world
        self.grid, self.channels = world.grid, world.channels
        self._covariance: dict[float, DenseCovariance | SampleCovariance] = {}

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, their ratio to interpolation, and lost timelines."""
        return shown(self.channels, "rmse") | {"over_oi", "lost"}

    @property
    def max_cycles(self) -> int:
        """Cycles of a timeline."""
        return self.world.cycles

    @property
    def observation_error(self) -> Tensor:
        """Standard deviation (C,) of the observation error in the twin world."""
        return self.world.error_sd

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[OsseTask]:
        """Return every density with the perfect model, then with the imperfect one."""
        return fixed_tasks(densities)

    def methods(self, task: str) -> list[Method]:  # noqa: ARG002
        """Return the classical methods, the same for all tasks, the free run first."""
        grid = self.world.grid
        return [
            Method("free_run", lambda _: FreeRun()),
            Method("persistence", lambda _: Persistence()),
            Method("climatology", lambda _: Climatology(self.world.climatology())),
            Method(
                "inverse_distance",
                lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
                {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
            ),
            Method(
                "inverse_distance_of_observations",
                lambda s: InverseDistance(grid, of="observations", power=s["power"]),
                {"power": (1.0, 6.0)},
            ),
            Method(
                INTERPOLATION,
                self._optimal_interpolation,
                {"scale": (0.01, 0.4), "length_km": (1000.0, 4000.0)},
            ),
            Method(
                "letkf",
                lambda s: LETKF(grid, MEMBERS, localization_km=s["length_km"],
                                inflation=1 + s["excess"], relaxation=s["relaxation"]),
                {
                    "length_km": (500.0, 4000.0),
                    "excess": (0.005, 0.5),  # of the inflation over 1
                    "relaxation": (0.1, 0.95),
                },
                members=MEMBERS,
            ),
        ]  # fmt: skip

    def _optimal_interpolation(self, setting: Setting) -> OptimalInterpolation:
        length = setting["length_km"]
        if length not in self._covariance:  # only one is kept, of 150 MB at T21
            self._covariance = {length: self.world.background_covariance(length)}
        return OptimalInterpolation(self._covariance[length], scale=setting["scale"])

    def store(self, folder: Path) -> Path:  # noqa: ARG002
        """Return the path of the nature run; it may be missing."""
        return self.world.path

    def make_truth(self, progress: Progress = silent) -> None:
        """Run nature, or the rest of it, where it is missing."""
        self.world.make(progress)

    def data(self) -> list[Data]:
        """Return the nature run."""
        return [Data.of(self.world.path.name, "truth", self.world.path)]

    def training_objects(self) -> list[str]:
        """Return short hashes of the members for training and validation, which chooses weights."""
        return self.world.objects("training", "validation")

    def test_objects(self) -> list[str]:
        """Return short hashes of the test members."""
        return self.world.objects("test")

    def scorer(self, cycles: int) -> Score:
        """Return the function that scores a method by ``cycles`` cycles of the tuning timelines."""
        return TwinCycles(self.world, cycles).score

    def pooled(self, scores: Sequence[float]) -> float:
        """Return the geometric mean of the scores over the tasks."""
        return statistics.geometric_mean(scores)

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> TwinScores:
        """Return the evaluation on the test timelines, quickly on 30 cycles of them."""
        runs = TwinCycles(self.world, min(QUICK_CYCLES, self.world.cycles) if quick else None)
        return TwinScores(runs, self.tasks(densities), self.methods, load, seeds, forms, settings)

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return the error of every method over the cycles, one figure per task."""
        caption = (
            "Median over timelines and their range, {task}; next to each name the median of the "
            "last tenth of the cycles."
        )
        return cycle_figures(pictures, self.channels, self.world.hours, caption)
