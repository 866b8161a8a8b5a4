"""Score every method on the ERA5 ensemble sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.evidence import Bar, Interval, Resamples, Row, moments, root, root_ratio
from weather.baselines.assimilator import Assimilator
from weather.experiments.departures import Departures, figures
from weather.experiments.ensemble.cases import analyze_case, case_departures, case_errors
from weather.experiments.ensemble.methods import ensemble_methods
from weather.experiments.ensemble.sample import TASKS, Case, EnsembleSample, EnsembleTask, Task
from weather.experiments.experiment import Example, Load, classical
from weather.experiments.method import Method, Settings, built
from weather.observations.gridded import GriddedObservations
from weather.progress import Each, Progress, Tick, in_turn, no_tick, silent

Found = tuple[Tensor, Departures]
"""Mean square errors (N,C) of a method on the cases of a task, and its departures."""


class EnsembleScores:
    """Score every method on every test case.

    Args:
        source: The sample.
        densities: Shares of grid points observed.
        load: Returns the trained network of a form and seed.
        seeds: Seeds of the networks.
        forms: Forms of Adas.
        settings: Tuned settings of the classical methods.
        cases: Number of cases, all if None.
    """

    def __init__(
        self,
        source: EnsembleSample,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        cases: int | None = None,
    ) -> None:
        self.source, self.densities = source, densities
        self.channels = source.channels
        self.load, self.settings, self.cases = load, settings, cases
        self.seeds, self.forms = tuple(seeds), tuple(forms)
        self.errors: dict[tuple[str, str], Tensor] = {}
        self.departures: dict[tuple[str, str], Departures] = {}

    def methods(self, task: Task) -> list[Method]:
        """Return the classical methods of a task."""
        return ensemble_methods(self.source, task)

    def jobs(self) -> list[tuple[EnsembleTask, str]]:
        """Return every task with every method."""
        return [
            (EnsembleTask(kind, density), name)
            for kind in TASKS
            for density in self.densities
            for name in (*(method.name for method in self.methods(kind)), *self.forms)
        ]

    def run(self, each: Each = in_turn, progress: Progress = silent) -> None:
        """Analyze every case with every method.

        Args:
            each: Does one job after the other, or on all cores.
            progress: Tells how far it is.
        """
        jobs = self.jobs()
        analyses = [
            len(self.source.cases(task.kind)[: self.cases])
            * (len(self.seeds) if name in self.forms else 1)
            for task, name in jobs
        ]
        with progress("analyzing", sum(analyses)) as tick:
            for (task, name), found in zip(jobs, each(self.analyze, jobs, tick), strict=True):
                self.take(task, name, found)

    def analyze(self, task: EnsembleTask, name: str, tick: Tick = no_tick) -> Found:
        """Return the mean square errors of a method on a task, and its departures.

        The errors of a form are means over its seeds, the departures those of the first.
        """
        if name in self.forms:
            sd = self.source.task_background_sd[task.kind]
            members: list[Assimilator] = [
                self.load(name, seed).expecting(sd) for seed in self.seeds
            ]
        else:
            method = classical(self.methods(task.kind), name)
            members = [built(self.settings, method, task.name)]
        errors = [
            case_errors(self.source, task.kind, task.density, one, cases=self.cases, tick=tick)
            for one in members
        ]
        departures = case_departures(
            self.source, task.kind, task.density, members[0], cases=self.cases
        )
        return torch.stack(errors).mean(0), departures

    def take(self, task: EnsembleTask, name: str, found: Found) -> None:
        """Keep what :meth:`analyze` returned."""
        self.errors[task.name, name], self.departures[task.name, name] = found

    def _draws(self, task: Task) -> Resamples:
        return Resamples.clusters(case.member for case in self.source.cases(task)[: self.cases])

    def _times(self, task: Task) -> int:
        """Return the number of times, the units that are independent of each other."""
        return len({case.time for case in self.source.cases(task)[: self.cases]})

    def _ratio(self, task: Task, density: float, method: str, base: str) -> list[Interval]:
        """Return the RMSE of a method over that of another, for every channel."""
        name = EnsembleTask(task, density).name
        own, other = self.errors[name, method], self.errors[name, base]
        draws = self._draws(task)
        return [
            draws.intervals(moments(pairs, root_ratio))["value"]
            for pairs in torch.stack((own, other), -1).unbind(1)
        ]

    def rows(self) -> list[Row]:
        """Return RMSE and ratio to the background, with intervals over members.

        Only two times exist, and ``n`` counts them: the intervals speak of other members at these
        times, not of other weather. The other rows are departures from the observations, see
        :func:`weather.experiments.departures.figures`, in every sixth case.
        """
        rows = []
        labels = self.source.channels.labels
        for task in TASKS:
            for density in self.densities:
                name = EnsembleTask(task, density).name
                for (key, method), errors in self.errors.items():
                    if key != name:
                        continue
                    ratios = self._ratio(task, density, method, "background")
                    for channel, label in enumerate(labels):
                        rmse = moments(errors[:, channel], root)
                        found = self._draws(task).intervals(rmse)["value"]
                        rows.append(
                            Row(method, name, f"rmse_{label}", *found[:3], n=self._times(task))
                        )
                    rows += [
                        Row(method, name, f"ratio_{label}", *ratio[:3], n=self._times(task))
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
            label = f"{method} over background, worst field, {EnsembleTask(task, dense).name}"
            return Bar(label, worst, "<=", 1.0)

        bars.append(beats("oi", "persistence"))
        upper = max(
            r.high for r in self._ratio("persistence", dense, "adas_increment", "background")
        )
        name = EnsembleTask("persistence", dense).name
        bars.append(
            Bar(f"adas_increment over background, worst upper end, {name}", upper, "<=", 1.0)
        )
        to_oi = max(r.value for r in self._ratio("persistence", dense, "adas_increment", "oi"))
        bars.append(Bar(f"adas_increment over oi, worst field, {name}", to_oi, "<=", 1.25))
        bars += [beats("oi", "ensemble"), beats("letkf", "ensemble")]
        return bars

    def pictures(self) -> dict[str, Tensor]:
        """Return the fields of the last case of ``persistence``, analyzed by OI and by Adas."""
        task, case, sd = self._last()
        seen = self.source.observe_case(task.kind, case, task.density).mask.any(0).float()
        oi = classical(self.methods(task.kind), "oi")
        assimilators = {"oi": built(self.settings, oi, task.name)}
        if "adas_increment" in self.forms:
            network = self.load("adas_increment", self.seeds[0])
            assimilators["adas_increment"] = network.expecting(sd)
        analyses = {
            name: analyze_case(self.source, task.kind, case, task.density, assimilator)
            for name, assimilator in assimilators.items()
        }
        return {"truth": case.truth, "background": case.background, "observed": seen, **analyses}

    def example(self) -> Example:
        """Return the last case of ``persistence`` at the largest density."""
        task, case, sd = self._last()
        form = "adas_increment" if "adas_increment" in self.forms else self.forms[0]
        observed = self.source.observe_case(task.kind, case, task.density)
        return Example(
            self.load(form, self.seeds[0]),
            case.background[None, None],
            GriddedObservations.stack([observed]),
            sd,
        )

    def _last(self) -> tuple[EnsembleTask, Case, Tensor]:
        task = EnsembleTask("persistence", max(self.densities))
        case = self.source.cases(task.kind)[-1]
        return task, case, self.source.task_background_sd[task.kind]
