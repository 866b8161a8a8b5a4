"""Scores of every method, computed piece by piece, and what the report shows of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from apps.weather.networks import Networks, work_piece
from core_gates.monitor.hooks import GateMonitor
from harness.evidence import Row
from harness.experiment import Arrays, Job, Piece, Run
from harness.experiment.scores import read_scores
from harness.report.gates import save_gates
from harness.report.page import Page
from weather.experiments.experiment import (
    Checks,
    Experiment,
    Scores,
    Settings,
    choice_name,
    load_pictures,
    save_pictures,
    shown,
)
from weather.models.adas.presets import FORMS
from weather.plots import channel_unit, scorecard_figure, units_note

CYCLES = "cycles"
DEPARTURES = ("ob_rms", "oa_rms", "withheld_rmse")
METRICS = """
Errors are root mean squares against the known truth, weighted by area. `ratio` is the error over
that of the background; below 1 the observations helped. `lost` counts the timelines that lost the
truth; they are scored as the free run.

`crossed`: the networks of all seeds on the timelines of all seeds. `redrawn`: the observing network
changes in every cycle. `corrupted`: half of the reports have five times their errors, and the error
of the analysis is divided by that of an analysis without this half; `declared`: the larger errors
are stated, `denied`: the usual ones are, `forced`: the confidence in this half is set to one.
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
            setting = dict(settings.get(choice_name(work.method, work.task), {}))
            start = networks.start(work.method) if work.method in FORMS else None
            self.works[work_piece(run, experiment, work, setting, start)] = work

    def compute(self, piece: Piece, job: Job) -> dict[str, Tensor]:
        """Return the tensors of a piece."""
        return self.checks.compute(self.works[piece], job.tick)

    def obtain(self, run: Run) -> None:
        """Compute what is missing, and let the work take all of it."""
        store = run.store(CYCLES, Arrays())
        ticks = {piece: work.ticks for piece, work in self.works.items()}
        found = run.obtain(store, self.works, self.compute, ticks=ticks.__getitem__, scoring=True)
        for piece in found:
            self.checks.take(self.works[piece], store.load(piece))


def score(
    run: Run,
    experiment: Experiment,
    scores: Scores,
    networks: Networks,
    settings: Settings,
) -> Path:
    """Score every method, keep what figures are drawn from, and write the scores.

    Bars and checks only if all methods take part in a full evaluation.

    Args:
        run: Where everything is kept.
        experiment: Truth and methods.
        scores: The evaluation.
        networks: Networks of the forms.
        settings: Tuned settings of the classical methods.
    """
    Computing(run, experiment, scores, networks, settings).obtain(run)
    save_pictures(run.folder / experiment.pictures_file, scores.pictures())
    rows, full = scores.rows(), not run.quick and not run.only
    bars = scores.bars() if full else []
    for check in experiment.checks(scores) if full else ():
        Computing(run, experiment, check, networks, settings).obtain(run)
        rows, bars = rows + check.rows(), bars + check.bars()
    if scores.forms:
        network, background, observations, background_sd = scores.example()
        with GateMonitor(network) as monitor:
            network.analyse(background, observations, background_sd)
            save_gates(monitor, run.folder)
    return run.finish(
        rows,
        bars,
        seeds=scores.seeds,
        data=experiment.data(),
        headline=_headline(rows, experiment, scores.forms),
        notes=(units_note(experiment.channels), *experiment.notes),
        metrics=experiment.headline,
    )


def _headline(rows: Sequence[Row], experiment: Experiment, forms: Sequence[str]) -> str:
    """Return an error on the first task: of the network, the best other method and references."""
    metric, task = f"rmse_{experiment.field}", rows[0].task
    found = {row.method: row.value for row in rows
             if (row.metric, row.task, row.versus) == (metric, task, "")}  # fmt: skip
    others = {name: value for name, value in found.items() if name not in FORMS}
    best = min(others, key=others.__getitem__)
    names = dict.fromkeys([*forms[:1], best, experiment.reference, *experiment.base])
    figures = ", ".join(f"{name} {found[name]:.3g}" for name in names if name in found)
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
    pictures = load_pictures(folder / experiment.pictures_file)
    page.section("What the metrics mean").text(METRICS)
    rows = [row for row in scores.rows if not row.versus]
    if card := scorecard(rows, experiment):
        page.figure(card, "The same errors at a glance: blue is better than the reference.")
    departures = shown(experiment.channels, *DEPARTURES)
    if found := [row for row in rows if row.metric in departures]:
        page.section("Departures from the observations").text(DEPARTED)
        page.scores(scores._replace(rows=found, bars=()))
    figures = experiment.figures(pictures)
    if figures:
        page.section("Analyses").text(experiment.attribution)
    for caption, figure in figures:
        page.figure(figure, caption)
    page.text(GATED)


def scorecard(rows: list[Row], experiment: Experiment) -> Figure | None:
    """Return the errors of the main field by method and task; None without the reference."""
    label, reference = experiment.field, experiment.reference
    found = {(row.method, row.task): row.value for row in rows if row.metric == f"rmse_{label}"}
    complete = [task for method, task in found if method == reference]
    methods = list(dict.fromkeys(method for method, _ in found))
    if not complete:
        return None
    values = np.array([[found.get((m, t), np.nan) for t in complete] for m in methods])
    title = f"RMSE of {label} in {channel_unit(experiment.channels, label)}"
    return scorecard_figure(methods, complete, values, reference=reference, title=title)
