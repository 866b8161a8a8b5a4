"""Tune and evaluate on the ERA5 ensemble sample."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from apps.weather.training import Networks
from apps.weather.tuning import OPTIMIZER_BOX, Tuner, built
from harness.evidence import Bar, Interval, Resamples, Row, moments, root, root_ratio
from harness.runs.processes import Tick, in_processes
from harness.runs.ticker import ticking
from weather.baselines.assimilator import Assimilator
from weather.experiments.departures import Departures, figures
from weather.experiments.ensemble.cases import case_departures, case_errors, worst_case
from weather.experiments.ensemble.methods import ensemble_methods
from weather.experiments.ensemble.source import TASKS, Era5EnsembleSource, Task
from weather.experiments.method import Method, Settings
from weather.experiments.tuning import Setting
from weather.models.adas.forms import COMPARED


def task_name(task: Task, density: float) -> str:
    """Return the name of a task in settings and tables, such as ``persistence/0.1``."""
    return f"{task}/{density:.3g}"


def tune_ensemble(
    source: Era5EnsembleSource,
    densities: tuple[float, ...],
    networks: Networks,
    tuner: Tuner,
    trial_steps: int,
) -> None:
    """Tune every method on cases of the training period."""
    for task in TASKS:
        for method in ensemble_methods(source, task):
            for density in densities if method.box else ():
                name = f"{method.name}/{task_name(task, density)}"
                score = partial(_score, source, task, density, method)
                tuner.tune(name, method.box, score)
    for form in COMPARED:

        def worst(setting: Setting, form: str = form) -> float:
            analysis = networks.fit(form, 0, setting, trial_steps)
            scores = []
            for task in TASKS:
                sd = source.task_background_sd[task]
                for density in densities:
                    expecting = analysis.expecting(sd)
                    errors = case_errors(source, task, density, expecting, tuning=True)
                    scores.append(worst_case(errors, sd))
            return max(scores)

        tuner.tune(form, OPTIMIZER_BOX, worst)


def _score(
    source: Era5EnsembleSource, task: Task, density: float, method: Method, setting: Setting
) -> float:
    errors = case_errors(source, task, density, method.build(setting), tuning=True)
    return worst_case(errors, source.task_background_sd[task])


class EnsembleScores:
    """Score every method on every test case.

    Args:
        source: The sample.
        densities: Shares of grid points observed.
        networks: Trained networks.
        seeds: Seeds of the networks.
        forms: Forms of Adas.
        settings: Tuned settings of the classical methods.
        cases: Number of cases, all if None.
    """

    def __init__(
        self,
        source: Era5EnsembleSource,
        densities: tuple[float, ...],
        networks: Networks,
        seeds: tuple[int, ...],
        forms: tuple[str, ...],
        settings: Settings,
        cases: int | None = None,
    ) -> None:
        self.source, self.densities = source, densities
        self.channels = source.channels
        self.networks, self.settings = networks, settings
        self.seeds, self.forms, self.cases = seeds, forms, cases
        self.errors: dict[tuple[str, str], Tensor] = {}
        self.departures: dict[tuple[str, str], Departures] = {}

    def methods(self, task: Task) -> list[Method]:
        """Return the classical methods of a task."""
        return ensemble_methods(self.source, task)

    def run(self) -> None:
        """Analyze every case with every method on all cores."""
        jobs = [
            (task, density, name)
            for task in TASKS
            for density in self.densities
            for name in (*(method.name for method in self.methods(task)), *self.forms)
        ]
        analyses = [
            len(self.source.cases(task)[: self.cases])
            * (len(self.seeds) if name in self.forms else 1)
            for task, _, name in jobs
        ]
        with ticking("analyzing", sum(analyses)) as tick:
            for (task, density, name), (errors, departures) in zip(
                jobs, in_processes(self._analyze, jobs, tick), strict=True
            ):
                key = task_name(task, density), name
                self.errors[key], self.departures[key] = errors, departures

    def _analyze(
        self, task: Task, density: float, name: str, tick: Tick
    ) -> tuple[Tensor, Departures]:
        """Return the mean square errors of a method, and its departures.

        The errors of a form are means over its seeds, the departures those of the first.
        """
        if name in self.forms:
            sd = self.source.task_background_sd[task]
            members: list[Assimilator] = [
                self.networks.load(name, seed).expecting(sd) for seed in self.seeds
            ]
        else:
            method = next(m for m in self.methods(task) if m.name == name)
            members = [built(self.settings, method, task_name(task, density))]
        errors = [
            case_errors(self.source, task, density, one, cases=self.cases, tick=tick)
            for one in members
        ]
        departures = case_departures(self.source, task, density, members[0], cases=self.cases)
        return torch.stack(errors).mean(0), departures

    def _draws(self, task: Task) -> Resamples:
        return Resamples.clusters(case.member for case in self.source.cases(task)[: self.cases])

    def _ratio(self, task: Task, density: float, method: str, base: str) -> list[Interval]:
        """Return the RMSE of a method over that of another, for every channel."""
        name = task_name(task, density)
        own, other = self.errors[name, method], self.errors[name, base]
        draws = self._draws(task)
        return [
            draws.intervals(moments(pairs, root_ratio))["value"]
            for pairs in torch.stack((own, other), -1).unbind(1)
        ]

    def rows(self) -> list[Row]:
        """Return RMSE and ratio to the background, with intervals clustered by member.

        Only two times exist: the intervals speak of other members at these times, not of other
        weather. The other rows are departures from the observations, see
        :func:`weather.experiments.departures.figures`, in every sixth case.
        """
        rows = []
        labels = self.source.channels.labels
        for task in TASKS:
            for density in self.densities:
                name = task_name(task, density)
                for (key, method), errors in self.errors.items():
                    if key != name:
                        continue
                    ratios = self._ratio(task, density, method, "background")
                    for channel, label in enumerate(labels):
                        rmse = moments(errors[:, channel], root)
                        interval = self._draws(task).intervals(rmse)["value"]
                        rows.append(Row(method, name, f"rmse_{label}", *interval))
                    rows += [
                        Row(method, name, f"ratio_{label}", *ratio)
                        for label, ratio in zip(labels, ratios, strict=True)
                    ]
                    rows += self._departure_rows(name, method)
        return rows

    def _departure_rows(self, task: str, method: str) -> list[Row]:
        found = self.departures[task, method]
        return [
            Row(method, task, f"{stem}_{label}", value)
            for stem, values in figures(found.assimilated, found.withheld).items()
            for label, value in zip(self.source.channels.labels, values, strict=True)
        ]

    def bars(self) -> list[Bar]:
        """Return what must hold at the largest density."""
        dense = max(self.densities)
        bars = []

        def beats(method: str, task: Task) -> Bar:
            worst = max(ratio.value for ratio in self._ratio(task, dense, method, "background"))
            label = f"{method} over background, worst field, {task_name(task, dense)}"
            return Bar(label, worst, "<=", 1.0)

        bars.append(beats("oi", "persistence"))
        upper = max(
            r.high for r in self._ratio("persistence", dense, "adas_increment", "background")
        )
        name = task_name("persistence", dense)
        bars.append(
            Bar(f"adas_increment over background, worst upper end, {name}", upper, "<=", 1.0)
        )
        to_oi = max(r.value for r in self._ratio("persistence", dense, "adas_increment", "oi"))
        bars.append(Bar(f"adas_increment over oi, worst field, {name}", to_oi, "<=", 1.25))
        bars += [beats("oi", "ensemble"), beats("letkf", "ensemble")]
        return bars
