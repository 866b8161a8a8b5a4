"""Score every method on the held-out times of a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, Scores, compare, moments, root, root_ratio
from weather.baselines.assimilator import Assimilator
from weather.cycle import CycleStep
from weather.experiments.departures import Departures, figures, withheld_points
from weather.experiments.experiment import Example, Load, Work, classical
from weather.experiments.method import Settings, built
from weather.experiments.reanalysis.cases import REFERENCE, Case, ReanalysisCases
from weather.experiments.several import joined
from weather.metrics import DepartureSums
from weather.observations.gridded import GriddedObservations
from weather.progress import Tick, no_tick

CLIMATE = "climatology"
BLOCK = np.timedelta64(5, "D")
DEPARTURE_CASES = 6
SUMS = ("assimilated", "withheld")


def analyze_case(
    source: ReanalysisCases, density: float, method: Assimilator, case: Case
) -> Tensor:
    """Return the analysis (C,H,W) of a case."""
    observations = GriddedObservations.stack([source.observe_case(case, density)])
    background = source.backgrounds[case.background]
    return method.analyse(background[None, None], observations)[0, 0]


def mean_squares(
    source: ReanalysisCases,
    density: float,
    method: Assimilator | None,
    cases: Sequence[Case],
    tick: Tick = no_tick,
) -> Tensor:
    """Return the mean square errors (N,C) of analyses; of the climatology without a method."""
    squares = []
    for case in cases:
        if method is None:
            analysis = source.climatology(case)
        else:
            analysis = analyze_case(source, density, method, case)
        squares.append(source.grid.area_mean((analysis - source.truth[case.truth]).square()))
        tick()
    return torch.stack(squares)


class ReanalysisScores:
    """Score every method on every held-out time.

    Args:
        source: The store.
        densities: Fractions of grid points observed.
        load: Returns the trained network of a form and seed.
        seeds: Seeds of the networks.
        forms: Forms of Adas.
        settings: Tuned settings of the classical methods.
        cases: The times.
    """

    def __init__(
        self,
        source: ReanalysisCases,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        cases: Sequence[Case],
    ) -> None:
        self.source, self.densities, self.cases = source, tuple(densities), list(cases)
        self.load, self.settings = load, settings
        self.seeds, self.forms = tuple(seeds), tuple(forms)
        self.errors: dict[tuple[str, str], Tensor] = {}
        self.departures: dict[tuple[str, str], tuple[DepartureSums | None, ...]] = {}

    def works(self) -> list[Work]:
        """Return every method on every task; the networks of a form are scored together."""
        count, works = len(self.cases), []
        scope: tuple[tuple[str, str | int], ...] = (("times", count),)
        seeds = (*scope, ("seeds-", "+".join(map(str, self.seeds))))
        for task in self.source.tasks(self.densities):
            names = [method.name for method in self.source.methods(task.name)]
            works += [Work(name, task.name, count, scope) for name in (*names, CLIMATE)]
            works += [Work(f, task.name, count * len(self.seeds), seeds) for f in self.forms]
        return works

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the errors of a method on a task, and its departures, by name."""
        density = self._density(work.task)
        members = self._members(work.method, work.task)
        errors = [mean_squares(self.source, density, one, self.cases, tick) for one in members]
        found = {"errors": torch.stack(errors)}
        if members[0] is not None:
            departures = self._departed(density, members[0])
            for name in SUMS:
                found |= getattr(departures, name).tensors(f"{name}.")
        return found

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Keep what :meth:`compute` returned."""
        key = work.task, work.method
        self.errors[key] = found["errors"]
        self.departures[key] = tuple(DepartureSums.from_tensors(found, f"{name}.") for name in SUMS)

    def _density(self, task: str) -> float:
        tasks = self.source.tasks(self.densities)
        return next(one.density for one in tasks if one.name == task)

    def _members(self, name: str, task: str) -> list[Assimilator | None]:
        if name == CLIMATE:
            return [None]
        if name in self.forms:
            return [self.load(name, seed) for seed in self.seeds]
        return [built(self.settings, classical(self.source.methods(task), name), task)]

    def _departed(self, density: float, method: Assimilator) -> Departures:
        departures = Departures(withheld_points(self.source.grid, 21)[None])
        for case in self.cases[:: max(1, len(self.cases) // DEPARTURE_CASES)]:
            observations = GriddedObservations.stack([self.source.observe_case(case, density)])
            background = self.source.backgrounds[case.background][None, None]
            analysis = method.analyse(background, observations)
            departures.add(CycleStep(background, analysis, observations), method)
        return departures

    def _draws(self) -> Resamples:
        """Draw blocks of five days: what follows each other closely is not independent."""
        times = self.source.times[[case.truth for case in self.cases]]
        return Resamples.clusters(((times - times[0]) // BLOCK).tolist())

    def rows(self) -> list[Row]:
        """Return errors, ratios to the background, and paired differences from it.

        ``ratio`` pools all channels: the root of the mean, over channels, of the mean square error
        in units of the mean square background error of the training period, over that of the
        background.
        """
        rows, draws = [], self._draws()
        for task in self.source.tasks(self.densities):
            errors = {m: e for (name, m), e in self.errors.items() if name == task.name}
            scores = {
                method: [self._scores(one, errors[REFERENCE][0]) for one in own]
                for method, own in errors.items()
            }
            rows += [
                row
                for row in compare(scores, draws, task=task.name, reference=REFERENCE)
                if not row.versus or row.metric == "ratio" or row.metric.startswith("rmse")
            ]
            for method in errors:
                rows += self._departure_rows(task.name, method)
        return rows

    def _scores(self, own: Tensor, base: Tensor) -> Scores:
        """Return pooled ratio, RMSE and ratio of every channel from square errors (N,C)."""
        labels = self.source.channels.labels
        variance = self.source.background_sd.square()
        pooled = torch.stack([(errors / variance).mean(1) for errors in (own, base)], -1)
        pairs = torch.stack((own, base), -1).unbind(1)
        each = [moments(p, root_ratio, f"ratio_{label}") for label, p in zip(labels, pairs)]  # noqa: B905
        each += [moments(p[:, 0], root, f"rmse_{label}") for label, p in zip(labels, pairs)]  # noqa: B905
        return joined([moments(pooled, root_ratio, "ratio"), *each])

    def _departure_rows(self, task: str, method: str) -> list[Row]:
        found = self.departures[task, method]
        return [
            Row(method, task, f"{stem}_{label}", value)
            for stem, values in figures(*found).items()
            for label, value in zip(self.source.channels.labels, values, strict=True)
        ]

    def bars(self) -> list[Bar]:
        """Return what must hold at every density: all help, and the network surely does."""
        draws, bars = self._draws(), []
        for task in self.source.tasks(self.densities):
            base = self.errors[task.name, REFERENCE][0]
            for method in (*self.forms, "oi"):
                own = self.errors.get((task.name, method))
                if own is None:
                    continue
                ratio = draws.intervals([self._scores(one, base) for one in own])["ratio"]
                name = f"{method} over background, all fields, {task.name}"
                bars.append(Bar(name, ratio.value, "<=", 1.0))
                if method in self.forms:
                    upper = ratio.high if np.isfinite(ratio.high) else ratio.value
                    bars.append(Bar(f"{name}, upper end", upper, "<=", 1.0))
        return bars

    def pictures(self) -> dict[str, Tensor]:
        """Return the fields of the last time at the largest density, and its analyses."""
        density, case = max(self.densities), self.cases[-1]
        task = self.source.tasks([density])[0].name
        names = [m.name for m in self.source.methods(task) if m.name == "oi"]
        methods = {name: self._members(name, task)[0] for name in (*self.forms[:1], *names)}
        found = {
            name: analyze_case(self.source, density, method, case)
            for name, method in methods.items()
            if method is not None
        }
        return {
            "truth": self.source.truth[case.truth],
            "background": self.source.backgrounds[case.background],
            "observed": self.source.observe_case(case, density).mask.any(0).float(),
            **found,
        }

    def example(self) -> Example:
        """Return the same time, analyzed by the first form."""
        observed = self.source.observe_case(self.cases[-1], max(self.densities))
        return Example(
            self.load(self.forms[0], self.seeds[0]),
            self.source.backgrounds[self.cases[-1].background][None, None],
            GriddedObservations.stack([observed]),
        )
