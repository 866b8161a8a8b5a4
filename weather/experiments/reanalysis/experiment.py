"""A user's store as an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from harness.files import Data, short_digest
from weather.baselines.assimilator import Assimilator
from weather.experiments.experiment import Checks, Fit, Load, Trial, shown
from weather.experiments.method import OPTIMIZER_BOX, Method, Setting, Settings, choice_name
from weather.experiments.reanalysis.cases import REFERENCE, DensityTask, ReanalysisCases
from weather.experiments.reanalysis.scores import ReanalysisScores, mean_squares
from weather.models.adas.forms import COMPARED
from weather.plots import analysis_figure

QUICK_CASES = 3


class ReanalysisExperiment(ReanalysisCases):
    """Tasks, methods, tuning and scores of a store, see :class:`~..experiment.Experiment`."""

    reference = REFERENCE
    base = (REFERENCE,)
    forms = ("adas_increment",)
    decisive = (
        "background", "lead_hours", "variables", "levels", "validation", "held_out", "gap_days",
        "error_sd", "max_cases",
    )  # fmt: skip
    pictures_file = "example.safetensors"
    attribution = ""
    max_seeds: int | None = None
    max_cycles: int | None = None
    notes: tuple[str, ...] = (
        "Scores are of times that nothing was trained or tuned on. Times follow each other: "
        "intervals draw blocks of five days, which n counts.",
        "Observations are simulated from the store, at grid points and with independent errors.",
    )

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: the ratio to the background, of all fields and of the main ones."""
        surface = {f"ratio_{label}" for label in self.channels.labels[: len(self.channels.surface)]}
        main = shown(self.channels, "ratio") - (surface if self.channels.upper else set())
        return main | {"ratio", f"rmse_{self.field}", f"ratio_{self.field}"}

    @property
    def field(self) -> str:
        """Label of z500 if there is such a channel, else of the first one."""
        return "z500" if "z500" in self.channels.labels else self.channels.labels[0]

    def background_error(self, task: str) -> None:
        """Return None: the network was trained on these backgrounds."""

    def store(self, folder: Path) -> Path:  # noqa: ARG002
        """Return the user's store."""
        return Path(self.store_path)

    def data(self) -> list[Data]:
        """Return the stores."""
        return self.sources

    def digest(self) -> list[Data]:
        """Return the same: their content decides what is trained and scored."""
        return self.sources

    def training_objects(self) -> list[str]:
        """Return the days for training, and those that choose weights."""
        return self._days(self.periods.training, self.periods.validation)

    def test_objects(self) -> list[str]:
        """Return the held-out days."""
        return self._days(self.periods.held_out)

    def _days(self, *positions: np.ndarray) -> list[str]:
        days = np.unique(self.times[np.concatenate(positions)].astype("datetime64[D]"))
        return [short_digest({"store": self.identity["store"], "day": str(day)}) for day in days]

    # --- tuning and scores

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,
        *,
        cycles: int = 0,  # noqa: ARG002
    ) -> dict[str, Trial]:
        """Return what is tuned on times that validate; a form of Adas by the worst of its tasks."""
        tasks = self.tasks(densities)
        found = {
            choice_name(method.name, task.name): Trial(
                method.box, partial(self._trial, task, method)
            )
            for task in tasks
            for method in self.methods(task.name)
            if method.box
        }
        for form in COMPARED:
            found[form] = Trial(OPTIMIZER_BOX, partial(self._network_trial, tasks, fit, form))
        return found

    def _trial(self, task: DensityTask, method: Method, setting: Setting) -> float:
        return self.tuning_score(task, method.build(setting))

    def _network_trial(
        self, tasks: Sequence[DensityTask], fit: Fit, form: str, setting: Setting
    ) -> float:
        network = fit(form, setting)
        return max(self.tuning_score(task, network) for task in tasks)

    def tuning_score(self, task: DensityTask, assimilator: Assimilator) -> float:
        """Return what tuning minimizes: the mean RMSE over the background error."""
        errors = mean_squares(self, task.density, assimilator, self.cases(tuning=True))
        return float((errors.mean(0).sqrt() / self.background_sd).mean())

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> ReanalysisScores:
        """Return the evaluation on held-out times, or on three of them."""
        cases = self.cases()[:: max(1, len(self.cases()) // QUICK_CASES)] if quick else self.cases()
        return ReanalysisScores(self, densities, load, seeds, forms, settings, cases)

    def checks(self, scores: ReanalysisScores) -> Sequence[Checks]:  # noqa: ARG002
        """Nothing more."""
        return ()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return a map panel of the main field for each method, with its caption."""
        channel = self.channels.labels.index(self.field)
        variable, level = list(self.channels)[channel]
        return [
            (
                f"{method}, last of the held-out times",
                analysis_figure(
                    pictures["truth"][channel],
                    pictures["background"][channel],
                    pictures[method][channel],
                    self.grid,
                    variable=variable,
                    level=level,
                    observed=pictures["observed"].bool(),
                    title=f"{method}: {self.field}",
                ),
            )
            for method in (*self.forms, "oi")
            if method in pictures
        ]
