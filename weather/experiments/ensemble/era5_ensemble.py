"""The ERA5 ensemble sample as an experiment, and the scores of every method on its cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from matplotlib.figure import Figure
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
from harness.files import Data
from weather.baselines.assimilator import Assimilator
from weather.cycle import CycleStep
from weather.data.axes import to_dataset
from weather.data.shipped import ATTRIBUTION, sample_data
from weather.data.writing import write_wb2
from weather.experiments.ensemble.ensemble_sample import (
    TASKS,
    TEST_TIMES,
    TRAINING_TIMES,
    Case,
    EnsembleSample,
    EnsembleTask,
    Task,
    ensemble_methods,
    gates_by_time,
    kind_of,
)
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
from weather.metrics import Departures, DepartureSums, departure_rows, joined, withheld_points
from weather.models.adas.presets import COMPARED
from weather.observations.gridded import GriddedObservations
from weather.plots import analysis_figure
from weather.progress import Progress, Tick, no_tick, silent


def analyze_case(
    source: EnsembleSample, task: Task, case: Case, density: float, method: Assimilator
) -> Tensor:
    """Return the analysis (C,H,W) of one case, the mean if the method is an ensemble."""
    observations = GriddedObservations.stack([source.observe_case(task, case, density)])
    return method.analyse(_background(case, method), observations)[0].mean(0)


def _background(case: Case, method: Assimilator) -> Tensor:
    """Return the background (1,M,C,H,W) of a method with M members."""
    return (case.background[None] if method.members == 1 else case.ensemble)[None]


def case_errors(
    source: EnsembleSample,
    task: Task,
    density: float,
    method: Assimilator,
    *,
    tuning: bool = False,
    cases: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the mean square error (N,C) of the analysis of every case, or the first ``cases``."""
    squares = []
    for case in source.cases(task, tuning=tuning)[:cases]:
        analysis = analyze_case(source, task, case, density, method)
        squares.append(source.grid.area_mean((analysis - case.truth).square()))
        tick()
    return torch.stack(squares)


def case_departures(
    source: EnsembleSample,
    task: Task,
    density: float,
    method: Assimilator,
    *,
    cases: int | None = None,
    every: int = 6,
) -> Departures:
    """Return the departures from assimilated and withheld observations in every sixth case."""
    departures = Departures(withheld_points(source.grid, 11)[None])
    for case in source.cases(task)[:cases][::every]:
        observations = GriddedObservations.stack([source.observe_case(task, case, density)])
        background = _background(case, method)
        departures.add(
            CycleStep(background, method.analyse(background, observations), observations), method
        )
    return departures


def worst_case(errors: Tensor, background_sd: Tensor) -> float:
    """Return the largest error of any case, the mean over channels of RMSE over deviation."""
    return float((errors.sqrt() / background_sd).mean(1).max())


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
        short: tuple[tuple[str, str | int], ...]
        short = () if self.cases is None else (("first", self.cases),)
        seeds = (*short, ("seeds-", "+".join(map(str, self.seeds))))
        works = []
        for kind in TASKS:
            count = len(self.source.cases(kind)[: self.cases])
            for density in self.densities:
                task = EnsembleTask(kind, density).name
                works += [Work(m.name, task, count, short) for m in self.methods(kind)]
                works += [Work(f, task, count * len(self.seeds), seeds) for f in self.forms]
        return works

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the errors of a method on a task, and its departures, by name."""
        tasks = (EnsembleTask(kind, density) for kind in TASKS for density in self.densities)
        task = next(task for task in tasks if task.name == work.task)
        errors, departures = self.analyze(task, work.method, tick)
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
            members = [built(self.settings, classical(self.methods(task.kind), name), task.name)]
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
        :func:`weather.metrics.figures`, in every sixth case.
        """
        rows = []
        for kind in TASKS:
            # Times are the units that are independent of each other.
            times = len({case.time for case in self.source.cases(kind)[: self.cases]})
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
                    rows += departure_rows(
                        method, task, self.channels.labels, self.departures[task, method]
                    )
                cases = list(self.source.cases(kind)[: self.cases])
                rows += gates_by_time(task, cases, self.source.times, errors, self.channels.labels)
        return rows

    def _errors(self, own: Tensor, base: Tensor) -> Scores:
        """Return RMSE and ratio of every channel from square errors (cases, C)."""
        pairs = torch.stack((own, base), -1).unbind(1)
        return joined(
            moments(pair, root_ratio, f"ratio_{label}")
            if ratio
            else moments(pair[:, 0], root, f"rmse_{label}")
            for ratio in (False, True)
            for label, pair in zip(self.channels.labels, pairs, strict=True)
        )

    def bars(self) -> list[Bar]:
        """Return what must hold at the largest density."""
        dense = max(self.densities)
        bars = []

        def beats(method: str, task: Task) -> Bar:
            worst = max(ratio.value for ratio in self._ratio(task, dense, method, REFERENCE))
            name = EnsembleTask(task, dense).name
            return Bar(f"{method} over background, worst field, {name}", worst, "<=", 1.0)

        bars.append(beats("oi", "persistence"))
        upper = to_oi = math.nan
        note = "" if "adas_increment" in self.forms else UNMEASURED
        if not note:
            ratios = [
                self._ratio("persistence", dense, "adas_increment", other)
                for other in (REFERENCE, "oi")
            ]
            upper = max(ratio.high for ratio in ratios[0])
            to_oi = max(ratio.value for ratio in ratios[1])
        name = EnsembleTask("persistence", dense).name
        bars += [
            Bar(f"adas_increment over background, worst upper end, {name}", upper, "<=", 1.0,
                note=note),
            Bar(f"adas_increment over oi, worst field, {name}", to_oi, "<=", 1.25, note=note),
        ]  # fmt: skip
        bars += [beats("oi", "ensemble"), beats("letkf", "ensemble")]
        return bars

    def pictures(self) -> dict[str, Tensor]:
        """Return the fields of the last case of ``persistence``, analyzed by OI and by Adas."""
        task, case, sd = self._last()
        seen = self.source.observe_case(task.kind, case, task.density).mask.any(0).float()
        assimilators = {
            "oi": built(self.settings, classical(self.methods(task.kind), "oi"), task.name)
        }
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


QUICK_CASES = 3
STORE = "era5_ensemble.zarr"


class EnsembleExperiment(EnsembleSample):
    """Tasks, methods, tuning and scores of the sample, see :class:`~..experiment.Experiment`."""

    forms = COMPARED
    reference = REFERENCE
    base = (REFERENCE,)
    decisive = ("seed",)
    pictures_file = "example.safetensors"
    attribution = ATTRIBUTION
    field = "z500"
    max_cycles: int | None = None
    notes: tuple[str, ...] = (
        "The ERA5 sample has two test times, which n counts. Intervals are over the nine members "
        "at these times: they speak of other members, not of other weather.",
    )

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, and their ratios to those of the background."""
        return shown(self.channels, "rmse", "ratio")

    @property
    def observation_error(self) -> Tensor:
        """(C,) of ``persistence``."""
        return self.error_sd["persistence"]

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[EnsembleTask]:
        """Return both kinds at every density."""
        return [EnsembleTask(kind, density) for kind in TASKS for density in densities]

    def methods(self, task: str) -> list[Method]:
        """Return the classical methods for a task."""
        return ensemble_methods(self, kind_of(task))

    def background_error(self, task: str) -> Tensor:
        """Return the standard deviations (C,) of the background error in the training period."""
        return self.task_background_sd[kind_of(task)]

    def store(self, folder: Path) -> Path:
        """Return where :meth:`make` writes the sample."""
        return folder / STORE

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Write the sample as a WeatherBench-2 store."""
        states = self.fields.transpose(0, 1)  # (T,N,C,H,W)
        dataset = to_dataset(states, self.channels, self.grid, times=self.times)
        yield write_wb2(dataset, self.store(folder), overwrite=True)

    def make_truth(self, progress: Progress = silent) -> None:
        """Nothing: the sample ships with the package."""

    def check(self) -> None:
        """Nothing: the sample ships with the package."""

    def data(self) -> list[Data]:
        """Return the shipped sample."""
        return sample_data()

    def digest(self) -> list[Data]:
        """Return the same: its content decides what is trained and scored."""
        return sample_data()

    def training_objects(self) -> list[str]:
        """Return all members at the times of training."""
        return self.objects(TRAINING_TIMES)

    def test_objects(self) -> list[str]:
        """Return all members at the times of testing."""
        return self.objects(TEST_TIMES)

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,
        *,
        cycles: int = 0,  # noqa: ARG002
        settings: Settings = MappingProxyType({}),  # noqa: ARG002
    ) -> dict[str, Trial]:
        """Return what is tuned on cases of the training period.

        A form of Adas is tuned once, by the worst of its tasks.
        """
        found = {
            choice_name(method.name, task.name): Trial(
                method.box, partial(self._trial, task, method)
            )
            for kind in TASKS
            for method in ensemble_methods(self, kind)
            for task in (EnsembleTask(kind, density) for density in densities)
            if method.box
        }
        tasks = self.tasks(densities)
        for form in COMPARED:
            found[form] = Trial(OPTIMIZER_BOX, partial(self._network_trial, tasks, fit, form))
        return found

    def _trial(self, task: EnsembleTask, method: Method, setting: Setting) -> float:
        return self.tuning_score(task, method.build(setting))

    def _network_trial(
        self, tasks: Sequence[EnsembleTask], fit: Fit, form: str, setting: Setting
    ) -> float:
        network = fit(form, setting)
        return max(
            self.tuning_score(task, network.expecting(self.background_error(task.name)))
            for task in tasks
        )

    def tuning_score(self, task: EnsembleTask, assimilator: Assimilator) -> float:
        """Return what tuning minimizes: the worst case's mean RMSE over the background error."""
        errors = case_errors(self, task.kind, task.density, assimilator, tuning=True)
        return worst_case(errors, self.task_background_sd[task.kind])

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> EnsembleScores:
        """Return the evaluation on all test cases, or on three."""
        return EnsembleScores(
            self, densities, load, seeds, forms, settings, QUICK_CASES if quick else None
        )

    def checks(self, scores: EnsembleScores) -> Sequence[Checks]:  # noqa: ARG002
        """Nothing more."""
        return ()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return a map panel of 500 hPa geopotential for each method, with its caption."""
        channel = self.channels.index("geopotential", 500)
        return [
            (
                f"{method}, 2 January 2017 12 UTC, member 9 is the truth",
                analysis_figure(
                    pictures["truth"][channel],
                    pictures["background"][channel],
                    pictures[method][channel],
                    self.grid,
                    variable="geopotential",
                    level=500,
                    observed=pictures["observed"].bool(),
                    title=f"{method}: geopotential at 500 hPa",
                ),
            )
            for method in ("adas_increment", "oi")
            if method in pictures
        ]
