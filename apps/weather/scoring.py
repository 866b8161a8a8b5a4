"""``gates weather evaluate``: score every method, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from apps.weather.networks import Networks
from apps.weather.pieces import work_piece
from core_gates.monitor.hooks import GateMonitor
from harness.evidence import Row
from harness.experiment import Arrays, Job, Piece, Run
from harness.report.gates import save_gates
from weather.experiments.experiment import Checks, Example, Experiment, Scores
from weather.experiments.method import Settings, choice_name
from weather.experiments.pictures import save_pictures
from weather.models.adas.forms import FORMS
from weather.plots.labels import channel_unit, units_note

CYCLES = "cycles"


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
        _watch_gates(scores.example(), run.folder)
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


def _watch_gates(example: Example, folder: Path) -> None:
    """Keep the gate values of one analysis."""
    network, background, observations, background_sd = example
    with GateMonitor(network) as monitor:
        network.analyse(background, observations, background_sd)
        save_gates(monitor, folder)
