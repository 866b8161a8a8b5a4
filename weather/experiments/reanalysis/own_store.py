"""A user's store as an experiment: its held-out times, and the scores of every method on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, Scores, compare, moments, root, root_ratio
from harness.files import Data, short_digest
from weather.baselines.assimilator import Assimilator, FreeRun, InverseDistance
from weather.baselines.covariance import HomogeneousCovariance, has_equal_steps
from weather.baselines.optimal_interpolation import IterativeInterpolation
from weather.cycle import CycleStep
from weather.data.climatology import read_climatology
from weather.experiments.experiment import (
    DENSITIES,
    OPTIMIZER_BOX,
    UNMEASURED,
    Checks,
    Example,
    Fit,
    Load,
    Method,
    Setting,
    Settings,
    Trial,
    Work,
    built,
    choice_name,
    classical,
    shown,
)
from weather.experiments.reanalysis.store_data import CLIMATOLOGY, ReanalysisData
from weather.metrics import Departures, DepartureSums, departure_rows, joined, withheld_points
from weather.models.adas.presets import COMPARED
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.plots import analysis_figure
from weather.progress import Tick, no_tick
from weather.training.stream import generator

REFERENCE = "background"  # what all others are compared with
TUNING_CASES = 4
TOLERANCE = 1e-3  # of optimal interpolation: its errors are those of 1e-5 to four digits
PAIR_BYTES, MOST_PAIRS = 64 * 2**20, 64  # of background errors that covariances are estimated from
TABLE_BYTES = 2**30  # of the correlations between rows


class DensityTask(NamedTuple):
    """A density of observations on the held-out times."""

    density: float

    @property
    def name(self) -> str:
        """Name in settings and tables, such as ``0.1``."""
        return f"{self.density:.3g}"


class Case(NamedTuple):
    """A time to be scored: its position in the store, and that of its background."""

    truth: int
    background: int


class ReanalysisCases(ReanalysisData):
    """Tasks, cases and classical methods of a store."""

    max_cases: int

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[DensityTask]:
        """Return a task for every density."""
        return [DensityTask(density) for density in densities]

    def cases(self, *, tuning: bool = False) -> list[Case]:
        """Return held-out times, evenly spaced; for tuning, four times that validate."""
        truths, backgrounds = self.pairs("validation" if tuning else "held_out")
        count = min(len(truths), TUNING_CASES if tuning else self.max_cases)
        chosen = np.linspace(0, len(truths) - 1, count).round().astype(int)
        pairs = zip(truths[chosen].tolist(), backgrounds[chosen].tolist(), strict=True)
        return [Case(*pair) for pair in pairs]

    def observe_case(self, case: Case, density: float) -> GriddedObservations:
        """Return the observations (C,H,W) of a case: the same for every method."""
        draw = generator(20, case.truth, round(density * 1e6))
        return observe(
            self.truth[case.truth],
            drawn_network(self.grid, density, draw),
            self.observation_error,
            generator=draw,
        )

    def climatology(self, case: Case) -> Tensor:
        """Return the climatology (C,H,W) of the time of a case."""
        return read_climatology(self.paths[CLIMATOLOGY], self.channels, self.times[case.truth])

    def methods(self, task: str) -> list[Method]:  # noqa: ARG002
        """Return the classical methods, the same for all tasks; the background comes first.

        Optimal interpolation needs longitudes of equal steps and a table of H H W numbers, and is
        left out where that exceeds a gigabyte.
        """
        grid = self.grid
        found = [
            Method(REFERENCE, lambda _: FreeRun()),
            Method(
                "inverse_distance",
                lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
                {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
            ),
        ]
        if has_equal_steps(grid) and 8 * grid.shape[0] ** 2 * grid.shape[1] <= TABLE_BYTES:
            box = {"length_km": (300.0, 3000.0), "scale": (0.3, 3.0)}
            found.append(Method("oi", self._interpolation, box))
        return found

    def _interpolation(self, setting: Setting) -> Assimilator:
        return IterativeInterpolation(
            self.covariance.with_length(setting["length_km"]),
            scale=setting["scale"],
            tolerance=TOLERANCE,
        )

    @cached_property
    def covariance(self) -> HomogeneousCovariance:
        """Covariance of background errors of training times, evenly spaced."""
        truths, backgrounds = self.pairs("training")
        frame = 4 * self.channels.num_channels * self.grid.shape[0] * self.grid.shape[1]
        count = min(len(truths), MOST_PAIRS, max(2, PAIR_BYTES // frame))
        chosen = np.linspace(0, len(truths) - 1, count).round().astype(int)
        errors = torch.stack(
            [
                self.truth[int(truths[number])] - self.backgrounds[int(backgrounds[number])]
                for number in chosen
            ]
        )
        return HomogeneousCovariance.from_samples(errors, self.grid, length_km=1000.0)


CLIMATE = "climatology"
BLOCK = np.timedelta64(5, "D")
DEPARTURE_CASES = 6
SUMS = ("assimilated", "withheld")


def analyze_case(
    source: ReanalysisCases, density: float, method: Assimilator, case: Case
) -> Tensor:
    """Return the analysis (C,H,W) of a case."""
    observations = GriddedObservations.stack([source.observe_case(case, density)])
    return method.analyse(source.backgrounds[case.background][None, None], observations)[0, 0]


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
        density = next(
            one.density for one in self.source.tasks(self.densities) if one.name == work.task
        )
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
            departures.add(
                CycleStep(background, method.analyse(background, observations), observations),
                method,
            )
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
                rows += departure_rows(
                    method,
                    task.name,
                    self.source.channels.labels,
                    self.departures[task.name, method],
                )
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
        if not self.forms:
            bars += [
                Bar(f"networks over background, all fields, {task.name}", math.nan, "<=", 1.0,
                    note=UNMEASURED)
                for task in self.source.tasks(self.densities)
            ]  # fmt: skip
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
        settings: Settings = MappingProxyType({}),  # noqa: ARG002
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
