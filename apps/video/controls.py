"""Controls of a comparison: what must hold if its figures mean anything.

Labels in random order cannot be predicted, and a planted leak is noticed. A simulated feed also has
the rates that its world should have, and estimates of another policy on its logs hold the truth.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

from apps.video.comparison import Findings, train
from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from harness.experiment import Figures, Job, Piece, Run, Store
from harness.files import sha256
from recsys.data.datamodule import TableDataModule
from recsys.data.readers.open_bandit import OpenBandit, Policy
from recsys.experiments import (
    CLICK_RATE,
    DISTANCE,
    EFFECTIVE,
    Chance,
    Contest,
    Places,
    chance_bars,
    chance_rows,
    chances,
    cross_bars,
    cross_estimates,
    cross_rows,
    data_of,
    probabilities,
    ranker_of,
    source_of,
)
from video_multitask.simulated_controls import (
    COVERAGE,
    ESTIMATED,
    LOGS,
    ROWS,
    TRUTH_ROWS,
    Redrawn,
    rate_bars,
    rate_rows,
    rates_of,
    redraw,
    redrawn_bars,
    redrawn_rows,
)
from video_multitask.sources.simulated import SimulatedFeed

CONTROLS = "controls"
PERMUTED, LEAK, OFF_POLICY = "permuted_labels", "planted_leak", "off_policy"
EPOCHS = 2
SHOWN = (DISTANCE, COVERAGE, CLICK_RATE, EFFECTIVE)
OPEN_BANDIT = "../shared/data/recsys/open_bandit_all.parquet"

_SOURCE = "data.source."
_ARGUMENTS = f"{_SOURCE}init_args."
_REDRAWN = "redrawn."
_POLICIES: tuple[Policy, ...] = ("random", "bts")


def control_rows_and_bars(
    run: Run, contest: Contest, data: TableDataModule, *, places: Places, open_bandit: Path
) -> Findings:
    """Return the rows and bars of controls; what exists of their results is not made again.

    The source must be able to permute its labels before anything is computed of them, and to plant
    a leak: its arguments ``permuted`` and ``leak``.

    Args:
        run: Keeps results, one piece per control in the store ``controls``.
        contest: Whose reference is trained on permuted labels.
        data: The rows of the configuration.
        places: Where files are, by dotted name.
        open_bandit: Open Bandit log; a note tells where it is absent.

    Raises:
        GatesError: The source of the configuration has no controls.
    """
    source = source_of({**run.settings, **places})
    if not (hasattr(source, "permuted") and hasattr(source, "leak")):
        raise GatesError(
            f"data.source {type(source).__name__} cannot permute its labels or plant a leak, which "
            "the controls need: leave out --controls"
        )
    store = run.store(CONTROLS, Figures())
    parts = [_labels(run, store, contest, data, places)]
    if isinstance(source, SimulatedFeed):
        tables = data.tables
        rates = rates_of(tables.train.vstack(tables.validation).vstack(tables.test))
        parts = [
            Findings(rate_rows(rates, group=CONTROLS), rate_bars(rates)),
            *parts,
            _redrawn(run, store),
            _open_bandit(open_bandit),
        ]
    return Findings(
        [row for part in parts for row in part.rows],
        [bar for part in parts for bar in part.bars],
        [note for part in parts for note in part.notes],
        SHOWN,
    )


def score_control(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Train the network of a piece and return AUC, standard error and positives of every task."""
    weights = train(piece, job, places)
    data = data_of({**piece.settings, **places}, piece.seed or 0)
    test = data.batch("test")
    predicted = probabilities(ranker_of(piece.settings, weights, data), test)
    return {
        f"{field} {chance.task}": getattr(chance, field)
        for chance in chances(test, predicted, data.schema.task_names)
        for field in ("auc", "error", "positives")
    }


def estimate_uniform(piece: Piece, job: Job) -> dict[str, Any]:
    """Redraw the logs of a piece's world, and return their estimates for a uniform policy."""
    options = {
        name.removeprefix(_REDRAWN): value
        for name, value in piece.settings.items()
        if name.startswith(_REDRAWN)
    }
    feed = source_of(piece.settings)
    assert isinstance(feed, SimulatedFeed)
    return redraw(feed.world(), tick=job.tick, **options).figures()


def _labels(
    run: Run, store: Store[Any], contest: Contest, data: TableDataModule, places: Places
) -> Findings:
    """Train the reference on labels in random order, without and with a leak of the first."""
    label_settings: dict[str, Any] = {}
    if contest.methods:
        label_settings = contest.settings(contest.reference, run.settings, data.schema)
    epochs = min(EPOCHS, run.settings.get("trainer.max_epochs") or EPOCHS)
    label_settings |= {"trainer.max_epochs": epochs, f"{_ARGUMENTS}permuted": True}
    seed, leaked = run.settings.get("seed", 0), data.schema.task_names[0]
    pieces = [
        run.piece(PERMUTED, seed, **label_settings),
        run.piece(LEAK, seed, **{**label_settings, f"{_ARGUMENTS}leak": leaked}),
    ]
    rows: list[Row] = []
    bars: list[Bar] = []
    notes: list[str] = []
    for piece in run.obtain(store, pieces, partial(score_control, places=places), ticks=epochs):
        chances_of_tasks = _chances(store.load(piece), data.schema.task_names)
        name = piece.method.replace("_", " ")
        if piece.method == LEAK:
            chances_of_tasks = [chance for chance in chances_of_tasks if chance.task == leaked]
            name = f"{name} of {leaked}"
        rows += chance_rows(name, chances_of_tasks, group=CONTROLS)
        bars += chance_bars(name, chances_of_tasks, "<=" if piece.method == PERMUTED else ">=")
        if lacking := [chance.task for chance in chances_of_tasks if math.isnan(chance.auc)]:
            notes.append(f"{name}: no AUC of {', '.join(lacking)}, whose test rows lack a class")
    return Findings(rows, bars, notes)


def _redrawn(run: Run, store: Store[Any]) -> Findings:
    """Estimate the uniform policy from redrawn logs of the world."""
    source = {n: value for n, value in run.settings.items() if n.startswith(_SOURCE)}
    options = {"tasks": ESTIMATED, "logs": LOGS, "rows": ROWS, "truth_rows": TRUTH_ROWS}
    named = {f"{_REDRAWN}{name}": value for name, value in options.items()}
    piece = Piece(OFF_POLICY, settings={**source, **named})
    for made in run.obtain(store, [piece], estimate_uniform, ticks=LOGS, unit="logs"):
        redrawn = Redrawn.of(store.load(made))
        return Findings(redrawn_rows(redrawn, group=CONTROLS), redrawn_bars(redrawn))
    return Findings()


def _open_bandit(path: Path) -> Findings:
    """Estimate the click rates of two real policies from each other's log, if it is there."""
    if not path.is_file():
        return Findings(notes=[f"off-policy estimates on real logs are left out: no file {path}"])
    estimates = cross_estimates({name: OpenBandit(str(path), name).log() for name in _POLICIES})
    note = f"Open Bandit: {path.name}, sha256 {sha256(path)[:16]}"
    return Findings(cross_rows(estimates, group=CONTROLS), cross_bars(estimates), [note])


def _chances(figures: dict[str, float], tasks: tuple[str, ...]) -> list[Chance]:
    """Return what `score_control` has found of every task."""
    return [
        Chance(t, figures[f"auc {t}"], figures[f"error {t}"], int(figures[f"positives {t}"]))
        for t in tasks
    ]
