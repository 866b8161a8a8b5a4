"""``gates weather evaluate`` and ``tune``: methods scored, and their settings chosen before."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NoReturn

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from apps.weather.networks import (
    BUDGET,
    Networks,
    Training,
    fitted,
    load_trained,
    optimizers_of,
    without_training,
    work_piece,
    world_alone,
)
from core_gates.errors import GatesError
from core_gates.monitor.hooks import GateMonitor
from harness.evidence import Row
from harness.experiment import Arrays, Choice, Figures, Job, Piece, Run
from harness.experiment.run import CHOICES
from harness.experiment.scores import read_scores
from harness.report.page import Page
from harness.report.sections import save_gates
from weather.experiments.experiment import (
    SWITCHES,
    Borrowing,
    Checks,
    Concluding,
    Experiment,
    Fit,
    Scores,
    Setting,
    Settings,
    Trial,
    choice_name,
    load_pictures,
    save_pictures,
    shown,
)
from weather.experiments.osse.osse_experiment import OsseExperiment
from weather.experiments.osse.osse_scores import costs, place_of
from weather.experiments.osse.rivals import DAMPED, TAPERED
from weather.models.adas.analysis import AdasAnalysis
from weather.models.adas.presets import FORMS
from weather.operations.analyses import Kept
from weather.plots import channel_unit, cost_figure, scorecard_figure, units_note

DEPARTURES = ("ob_rms", "oa_rms", "withheld_rmse")
METRICS = """
Errors are root mean squares against the known truth, weighted by area. `ratio` is the error over
that of the background; below 1 the observations helped. `lost` counts the timelines that lost the
truth; a note says what they count as.
"""
DEPARTED = """
Root mean squares of observation minus background (`ob_rms`), of observation minus analysis
(`oa_rms`), and of withheld observations minus an analysis made without them (`withheld_rmse`). All
contain the observation errors, in the units of the fields.
"""
GATED = """
The gates below are those of the increment form, or of the first form that was scored, during one
analysis at the largest density. A value below 0.1 counts as closed, one above 0.9 as open.
"""
COST = "To the lower left is better; bars are 95 % intervals over timelines, orange are networks."


class Computing:
    """Computes the pieces of some work, in whatever process.

    Args:
        run: Whose configuration they have.
        experiment: Truth and methods.
        checks: The work.
        networks: Networks of the forms.
        settings: Tuned settings of the classical methods.
    """

    def __init__(
        self,
        run: Run,
        experiment: Experiment,
        checks: Checks,
        networks: Networks,
        settings: Settings,
    ) -> None:
        self.checks = checks
        self.works = {}
        for work in checks.works():
            setting = dict(settings.get(choice_name(work.method, work.chosen_for or work.task), {}))
            start = networks.start(work.method) if work.method in FORMS else None
            self.works[work_piece(run, experiment, work, setting, start)] = work

    def compute(self, piece: Piece, job: Job) -> dict[str, Tensor]:
        """Return the tensors of a piece."""
        return self.checks.compute(self.works[piece], job.tick)

    def obtain(self, run: Run) -> None:
        """Compute what is missing, and let the work take all of it."""
        store = run.store("cycles", Arrays())
        ticks = {piece: work.ticks for piece, work in self.works.items()}
        obtained = run.obtain(
            store, self.works, self.compute, ticks=ticks.__getitem__, scoring=True
        )
        for piece in obtained:
            self.checks.take(self.works[piece], store.load(piece))


def score(
    run: Run,
    experiment: Experiment,
    scores: Scores,
    networks: Networks,
    settings: Settings,
    untrained: Sequence[Row] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Score every method, keep what figures are drawn from, and write the scores.

    Bars and checks only if all methods take part in a full evaluation.

    Args:
        run: Where everything is kept.
        experiment: Truth and methods.
        scores: The evaluation.
        networks: Networks of the forms.
        settings: Tuned settings of the classical methods.
        untrained: Rows of the networks that are missing.
        notes: What a reader must know of this run.
    """
    Computing(run, experiment, scores, networks, settings).obtain(run)
    save_pictures(run.folder / experiment.pictures_file, scores.pictures())
    rows, full = [*scores.rows(), *untrained], not run.quick and not run.only
    bars = scores.bars() if full else []
    for check in experiment.checks(scores) if full else ():
        Computing(run, experiment, check, networks, settings).obtain(run)
        rows, bars = rows + check.rows(), bars + check.bars()
    example = scores.example() if scores.forms else None
    if example is not None:
        network, background, observations, background_sd = example
        with GateMonitor(network) as monitor:
            network.analyze(background, observations, background_sd)
            save_gates(monitor, run.folder)
    return run.finish(
        rows,
        bars,
        seeds=scores.seeds,
        data=experiment.data(),
        headline=scores.conclusion(rows)
        if isinstance(scores, Concluding)
        else _headline(rows, experiment, scores.forms),
        notes=(units_note(experiment.channels), *experiment.notes, *notes),
        metrics=experiment.headline,
    )


def _headline(rows: Sequence[Row], experiment: Experiment, forms: Sequence[str]) -> str:
    """Return an error on the first task: of the network, the best other method and references."""
    metric, task = f"rmse_{experiment.field}", rows[0].task
    values = {row.method: row.value for row in rows
             if (row.metric, row.task, row.versus) == (metric, task, "")}  # fmt: skip
    others = {name: value for name, value in values.items() if name not in FORMS}
    best = min(others, key=others.__getitem__)
    names = dict.fromkeys([*forms[:1], best, experiment.reference, *experiment.base])
    figures = ", ".join(f"{name} {values[name]:.3g}" for name in names if name in values)
    unit = channel_unit(experiment.channels, experiment.field)
    return f"{metric} on {task}: {figures} ({unit})."


def add_to_page(page: Page, folder: Path, experiment: Experiment) -> None:
    """Add what the metrics mean, the scorecard, departures from observations, and pictures.

    Args:
        page: The report.
        folder: The run folder, with what ``evaluate`` left in it.
        experiment: Of the configuration.

    Raises:
        GatesError: A file of the run folder is damaged.
    """
    scores = read_scores(folder / "scores.json", "weather")
    page.section("What the metrics mean").text(METRICS)
    rows = [row for row in scores.rows if not row.versus]
    if card := scorecard(rows, experiment):
        page.figure(card, "The same errors at a glance: blue is better than the reference.")
    for task, points in costs(scores.rows).items():
        title = f"Error and cost of an analysis {place_of(task)}"
        error, cost = f"error over that of {DAMPED}", "CPU time of one analysis over that of oi"
        figure = cost_figure(points, title=title, cost=cost, error=error)
        page.figure(figure, COST, name="error over cost")
    if departures := [row for row in rows if row.metric in shown(experiment.channels, *DEPARTURES)]:
        page.section("Departures from the observations").text(DEPARTED)
        page.scores(scores._replace(rows=departures, bars=()))
    figures = experiment.figures(load_pictures(folder / experiment.pictures_file))
    if figures:
        page.section("Analyses").text(experiment.attribution)
    for caption, figure in figures:
        page.figure(figure, caption)
    page.text(GATED)


def scorecard(rows: list[Row], experiment: Experiment) -> Figure | None:
    """Return the errors of the main field by method and task; None without the reference."""
    label, reference = experiment.field, experiment.reference
    cells = {(row.method, row.task): row.value for row in rows if row.metric == f"rmse_{label}"}
    complete = [task for method, task in cells if method == reference]
    methods = list(dict.fromkeys(method for method, _ in cells))
    if not complete:
        return None
    values = np.array([[cells.get((m, t), np.nan) for t in complete] for m in methods])
    title = f"RMSE of {label} in {channel_unit(experiment.channels, label)}"
    return scorecard_figure(methods, complete, values, reference=reference, title=title)


SEED = 0  # of the trials
MAX_SEED = 2**32  # what Lightning and NumPy take


@dataclass(frozen=True)
class Budget:
    """How long every method is tuned.

    Args:
        trials: Trials of every method.
        densities: Fractions of grid points observed in the trials of networks.
        cycles: Cycles of a trial in a twin world.
        trial_steps: Training steps of a trial of a network.
    """

    trials: int = 8
    densities: tuple[float, ...] = (0.1, 0.01)
    cycles: int = 160
    trial_steps: int = 300


class Tuning:
    """Tunes the methods of an experiment.

    Args:
        experiment: Whose methods.
        training: Trains networks for a few steps.
        densities: Fractions of grid points observed, for classical methods.
        budget: The same for every method.
    """

    def __init__(
        self,
        experiment: Experiment,
        training: Training,
        densities: Sequence[float],
        budget: Budget,
    ) -> None:
        self.experiment, self.training = experiment, training
        self.densities, self.budget = tuple(densities), budget
        self.settings: Settings = {}

    def classical(self, run: Run) -> dict[str, Choice]:
        """Return the choice of every classical method for every task, then of what builds on it."""
        choices: dict[str, Choice] = {}
        while new := {n: t for n, t in self._trials(self.densities, _refuse).items()
                      if "@" in n and n not in choices}:  # fmt: skip
            before = len(choices)
            counts = {n: t.limited(self.budget.trials)[1] for n, t in new.items()}
            for count in sorted(set(counts.values())):
                choices |= self._search(run, {n: t for n, t in new.items() if counts[n] == count})
                self.settings = settings_of(choices)
            if len(choices) == before:  # the methods that are left take no part
                break
        return choices

    def _search(self, run: Run, trials: Mapping[str, Trial]) -> dict[str, Choice]:
        """Return the choices of methods with equally many trials."""
        limited = {name: trial.limited(self.budget.trials) for name, trial in trials.items()}
        bases = {name: dict(trial.builds_on) for name, trial in trials.items()}
        plain = {name: trial.plain for name, trial in trials.items() if trial.plain}
        return run.tune({name: space for name, (space, _) in limited.items()}, self.trial,
                        trials=next(iter(limited.values()))[1], seed=SEED, own=bases, plain=plain,
                        **{**world_alone(run, self.experiment), **self._cycles()})  # fmt: skip

    def _trials(self, densities: Sequence[float], fit: Fit, cycles: int | None = None) -> Mapping[
        str, Trial]:  # fmt: skip
        cycles = self.budget.cycles if cycles is None else cycles
        return self.experiment.trials(densities, fit, cycles=cycles, settings=self.settings)

    def networks(
        self, run: Run, forms: Sequence[str], seeds: Sequence[int], *, train: bool = True
    ) -> dict[str, Choice]:
        """Tune the training of every form that ``fit`` has not trained; else look it up.

        Forms of which ``fit`` trained a network with the configured optimizer are not tuned.
        """
        configured = fitted(run, forms, seeds)
        if configured:
            names = ", ".join(configured)
            print(f"of `fit`, with the optimizer of the configuration: {names}", flush=True)
        wanted = [form for form in FORMS if form in forms and form not in configured]
        if run.quick or not train:
            return chosen_networks(run, wanted)
        trials = self._trials(self.densities, _refuse)
        steps, densities = self.budget.trial_steps, list(self.budget.densities)
        fixed = {"steps": steps, "densities": densities, **self._cycles()}
        return run.tune({form: trials[form].space for form in wanted}, self.trial,
                        trials=self.budget.trials, seed=SEED, ticks=steps,
                        prepare=self.training.prepare,
                        **{**without_training(run), **fixed})  # fmt: skip

    def trial(self, piece: Piece, job: Job) -> dict[str, float]:
        """Return the score of a setting, NaN where the method refuses it."""

        def fit(form: str, setting: Setting) -> AdasAnalysis:  # noqa: ARG001
            short = {"max_epochs": 1, "limit_val_batches": 0}
            return self.training.fit(piece, job, setting, piece["steps"], **short)

        task, densities = piece.keys.get("task-"), piece.get("densities", self.densities)
        name = choice_name(piece.method, str(task)) if task else piece.method
        trial = self._trials(densities, fit, piece.get("cycles", 0))[name]
        try:
            return {"score": trial.score({axis: piece[axis] for axis in trial.axes})}
        except ValueError:  # beyond the box there are settings that no method takes
            return {"score": math.nan}

    def _cycles(self) -> dict[str, Any]:
        return {} if self.experiment.max_cycles is None else {"cycles": self.budget.cycles}


def chosen_networks(run: Run, forms: Sequence[str]) -> dict[str, Choice]:
    """Return the choices of forms that were tuned before, with whatever budget."""
    return run.chosen(forms, seed=SEED, budget=BUDGET, **without_training(run))


def chosen_methods(run: Run, experiment: Experiment, names: Sequence[str]) -> dict[str, Choice]:
    """Return the choices of classical methods that were tuned before, with whatever budget."""
    return run.chosen(names, seed=SEED, budget=BUDGET, **world_alone(run, experiment))


def borrowed_settings(
    run: Run, experiment: Experiment, densities: Sequence[float]
) -> dict[str, Mapping[str, float]]:
    """Return settings that another configuration has tuned, if the experiment needs some."""
    if not isinstance(experiment, Borrowing):
        return {}
    return settings_of(chosen_methods(run, experiment, experiment.borrowed(densities)))


def settings_of(choices: Mapping[str, Choice]) -> dict[str, Mapping[str, float]]:
    """Return the settings alone."""
    return {name: choice.setting for name, choice in choices.items()}


def edge_notes(choices: Mapping[str, Choice]) -> list[str]:
    """Return which settings lie at an edge of what was searched, where they are no optimum."""
    edges = {n: [e for e in choice.edges if e not in SWITCHES] for n, choice in choices.items()}
    notes = [f"{name} ({', '.join(names)})" for name, names in edges.items() if names]
    return [f"At an edge of what was searched: {'; '.join(notes)}."] if notes else []


class KeptByRun(Kept):
    """What training and tuning left in a run folder or in the package.

    Args:
        run: The run.
        experiment: Its truth and methods.
    """

    def __init__(self, run: Run, experiment: Experiment) -> None:
        super().__init__(run.config, run.settings)
        self.run, self.experiment = run, experiment

    def weights(self, form: str) -> Path | None:
        """Return the weights of the first seed of a form, or None where there are none."""
        if isinstance(self.experiment, OsseExperiment):
            return path if (path := self.experiment.weights(form, 0)).is_file() else None
        choices = {} if fitted(self.run, [form], [0]) else chosen_networks(self.run, [form])
        return Networks(self.run, optimizers_of(self.run, [form], [0], choices), [0]).path(form, 0)

    def read(self, path: Path, analysis: AdasAnalysis) -> None:
        """Read weights or a checkpoint into a network, see `load_trained`."""
        load_trained(path, analysis)

    def chosen(self, name: str) -> Settings:
        """Return the tuned setting of a ``<method>@<task>`` by this name; empty if none is."""
        return settings_of(chosen_methods(self.run, self.experiment, [name]))

    def scored(self, task: str) -> dict[str, float]:
        """Return by method the error on the held-out data of a task, over all channels.

        Of the evaluation in the run folder, else of that which ships; of tapered networks, as here.
        """
        path, shipped = self.run.scores, self.run.store(CHOICES, Figures()).shipped
        path = path if path.is_file() or not shipped else shipped.with_name(path.name)
        errors: defaultdict[str, list[float]] = defaultdict(list)
        wanted = {f"rmse_{label}" for label in self.experiment.channels.labels}
        for row in read_scores(path, "weather").rows if path.is_file() else ():
            if row.task == task and row.metric in wanted and row.value > 0 and not row.versus:
                errors[row.method].append(row.value)
        return {n: geometric_mean(errors.get(f"{n}_tapered") or errors[n])
                for n in errors if n not in TAPERED}  # fmt: skip


def _refuse(form: str, setting: Setting) -> NoReturn:
    raise AssertionError(f"{form} is not to be trained with {setting}")


def check_densities(densities: Sequence[float]) -> None:
    """Refuse densities that are out of range, or that the name of a task does not tell.

    Raises:
        GatesError: There is none, one is out of range or has more than three digits, or two are
            alike.
    """
    names = {f"{density:.3g}" for density in densities}
    shares = all(0 < density <= 1 and float(f"{density:.3g}") == density for density in densities)
    if not densities or not shares or len(names) < len(densities):
        raise GatesError(
            f"--densities {list(densities)} cannot be used: give one or more fractions of the grid "
            "points above 0 and up to 1, of three digits at most, no two alike"
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
    choices = dict.fromkeys([*experiment.forms, *methods])
    if unknown := [name for name in only if name not in choices]:
        raise GatesError(
            f"--only {', '.join(unknown)} is unknown: choose from {', '.join(choices)}"
        )


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


def check_evaluation(
    experiment: Experiment,
    seeds: Sequence[int],
    densities: Sequence[float],
    only: Sequence[str],
    budget: Budget | None,
    train: bool,
) -> None:
    """Refuse seeds, densities, methods, a budget or a training that cannot be.

    Raises:
        GatesError: One of them cannot.
    """
    check_seeds(seeds)
    check_densities(densities)
    check_only(experiment, densities, only)
    if budget is not None:
        check_tuning(experiment, budget)
    if train and not experiment.forms:
        raise GatesError(
            "--train has nothing to train here: the rows of missing networks say how to"
        )


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are out of range or repeated.

    Raises:
        GatesError: There is no seed, one is out of range or given twice.
    """
    valid = all(0 <= seed < MAX_SEED for seed in seeds)
    if not seeds or not valid or len(set(seeds)) < len(seeds):
        raise GatesError(
            f"--seeds {list(seeds)} cannot be used: give one or more numbers from 0 to "
            f"{MAX_SEED - 1}, no two alike"
        )
