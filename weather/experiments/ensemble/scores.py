"""Score every method on the ERA5 ensemble sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.evidence import (
    Bar,
    Interval,
    Resamples,
    Row,
    Scores,
    compare,
    moments,
    root,
    root_ratio,
)
from weather.baselines.assimilator import Assimilator
from weather.experiments.departures import figures
from weather.experiments.ensemble.cases import analyze_case, case_departures, case_errors
from weather.experiments.ensemble.methods import ensemble_methods
from weather.experiments.ensemble.sample import TASKS, Case, EnsembleSample, EnsembleTask, Task
from weather.experiments.experiment import Example, Load, Work, classical
from weather.experiments.method import Method, Settings, built
from weather.experiments.several import joined
from weather.metrics import DepartureSums
from weather.observations.gridded import GriddedObservations
from weather.progress import Tick, no_tick

REFERENCE = "background"  # what all others are compared with
SUMS = ("assimilated", "withheld")
Sums = tuple[DepartureSums | None, DepartureSums | None]
"""Departures from assimilated and from withheld observations."""


class EnsembleScores:
    """Score every method on every test case.

    Args:
        source: The sample.
        densities: Fractions of grid points observed.
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
        self.departures: dict[tuple[str, str], Sums] = {}

    def methods(self, task: Task) -> list[Method]:
        """Return the classical methods of a task."""
        return ensemble_methods(self.source, task)

    def works(self) -> list[Work]:
        """Return every method on every task; the networks of a form are scored together."""
        short: tuple[tuple[str, str | int], ...] = ()
        if self.cases is not None:
            short = (("first", self.cases),)
        seeds = (*short, ("seeds-", "+".join(map(str, self.seeds))))
        works = []
        for kind in TASKS:
            count = len(self.source.cases(kind)[: self.cases])
            for density in self.densities:
                task = EnsembleTask(kind, density).name
                methods = [Work(m.name, task, count, short) for m in self.methods(kind)]
                forms = [Work(f, task, count * len(self.seeds), seeds) for f in self.forms]
                works += methods + forms
        return works

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the errors of a method on a task, and its departures, by name."""
        errors, departures = self.analyze(self._task(work.task), work.method, tick)
        found = {"errors": errors}
        for name, sums in zip(SUMS, departures, strict=True):
            if sums is not None:
                found |= sums.tensors(f"{name}.")
        return found

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep what :meth:`compute` returned."""
        key = work.task, work.method
        self.errors[key] = found["errors"]
        sums = (DepartureSums.from_tensors(found, f"{name}.") for name in SUMS)
        self.departures[key] = (next(sums), next(sums))

    def _task(self, name: str) -> EnsembleTask:
        tasks = (EnsembleTask(kind, density) for kind in TASKS for density in self.densities)
        return next(task for task in tasks if task.name == name)

    def analyze(self, task: EnsembleTask, name: str, tick: Tick = no_tick) -> tuple[Tensor, Sums]:
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
        return torch.stack(errors).mean(0), (departures.assimilated, departures.withheld)

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
        """Return RMSE and ratio to the background, with intervals over members, and differences.

        Only two times exist, and ``n`` counts them: the intervals speak of other members at these
        times, not of other weather, and the p of a difference is at least that of a sign test over
        the times. The other rows are departures from the observations, see
        :func:`weather.experiments.departures.figures`, in every sixth case.
        """
        rows = []
        for kind in TASKS:
            times = self._times(kind)
            for density in self.densities:
                task = EnsembleTask(kind, density).name
                errors = {method: e for (name, method), e in self.errors.items() if name == task}
                scores = {m: self._errors(own, errors[REFERENCE]) for m, own in errors.items()}
                rows += [
                    row._replace(n=times, p=max(row.p, 2.0 ** (1 - times)))
                    for row in compare(scores, self._draws(kind), task=task, reference=REFERENCE)
                    if not row.versus or row.metric.startswith("rmse")
                ]
                for method in errors:
                    rows += self._departure_rows(task, method)
        return rows

    def _errors(self, own: Tensor, base: Tensor) -> Scores:
        """Return RMSE and ratio of every channel from square errors (cases, C)."""
        labels = self.channels.labels
        pairs = torch.stack((own, base), -1).unbind(1)
        return joined(
            moments(pair, root_ratio, f"ratio_{label}")
            if ratio
            else moments(pair[:, 0], root, f"rmse_{label}")
            for ratio in (False, True)
            for label, pair in zip(labels, pairs, strict=True)
        )

    def _departure_rows(self, task: str, method: str) -> list[Row]:
        return [
            Row(method, task, f"{stem}_{label}", value)
            for stem, values in figures(*self.departures[task, method]).items()
            for label, value in zip(self.channels.labels, values, strict=True)
        ]

    def bars(self) -> list[Bar]:
        """Return what must hold at the largest density."""
        dense = max(self.densities)
        bars = []

        def beats(method: str, task: Task) -> Bar:
            worst = max(ratio.value for ratio in self._ratio(task, dense, method, REFERENCE))
            label = f"{method} over background, worst field, {EnsembleTask(task, dense).name}"
            return Bar(label, worst, "<=", 1.0)

        bars.append(beats("oi", "persistence"))
        upper = max(r.high for r in self._ratio("persistence", dense, "adas_increment", REFERENCE))
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
