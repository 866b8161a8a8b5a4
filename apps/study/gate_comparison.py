"""``gates study gates``: every routing gate of the core on the same pairs of digits."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from matplotlib.figure import Figure

from apps.study.digit_training import (
    ACCURACY,
    SECONDS,
    SECONDS_A_STEP,
    TASK_ACCURACY,
    UNROUTED,
    Comparison,
    Method,
    Training,
)
from apps.study.study_run import Flags, StudyRun, open_study
from harness.command.verbs import Place
from harness.evidence import Bar, Row
from harness.figures.style import colors_of, dress, head, new_figure, place
from harness.report.page import Page
from studies.digits.gate_recipes import RECIPES
from studies.digits.two_digit_network import TASKS

TASK, DONE, REFERENCE = "test pairs", "what gates do", "SoftmaxGate"
LEAST, MANY, TICKS = 0.8, 1.0, (5, 10, 20, 50, 100)  # accuracy; unrouted pairs, errors, percent
METHODS = {
    name: Method(name, recipe.options, {n: TASKS * w for n, w in recipe.losses.items()})
    for name, recipe in RECIPES.items()
}  # losses are means over gates, next to the sum of the cross-entropies of their tasks
VARIANTS = {
    "ReMoEGate-published": METHODS["ReMoEGate"]._replace(options={}),
    "SoftMoEGate-published": METHODS["SoftMoEGate"]._replace(options={"num_slots": 64}),
    "SwitchGate-unlimited": METHODS["SwitchGate"]._replace(
        options={"capacity_factor": None, "eval_capacity_factor": None}
    ),
    "one-expert": METHODS["DenseToSparseGate"]._replace(
        options={"stages": {"shared_steps": 10**9, "annealing": 0.4}}
    ),
}
"""Further rows without a bar: two recipes as published, for much longer training runs, a gate that
drops nothing, and one that never leaves its first phase, in which all pairs share an expert."""
EVERY = {**METHODS, **VARIANTS}
BALANCED, EVALUATED = "test pairs, balanced in evaluation", ("BaseLayerGate", "SinkhornGate")
SLOW = {"BaseLayerGate": 15.0}  # over the time of most gates
NOTE = (
    "Every gate has the loss that it was published with and the same learning rate; nothing is "
    "tuned, but λ of ReMoEGate grows by 2 % a step from 0.001 and the scale of SoftMoEGate begins "
    "at 10, because the published 20 % from 1e-8 and 1 are for longer runs: these are further "
    "rows, as are SwitchGate without a capacity and a gate that sends every pair to the same "
    "expert, so that nothing is chosen. Gates that balance training batches choose freely "
    "in evaluation, as published; what they reach if they balance 512 test pairs, too, has another "
    "table. Active experts, load CV and FLOPs are means over "
    "both gates, seeds and test pairs; FLOPs count an expert once that both gates use. Intervals "
    "are over test glyphs and seeds."
)


def compare_gates(
    place: Place, flags: Flags, training: Training, seeds: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Train every gate of the core on pairs of digits and compare what they reach and cost.

    Args:
        place: Filled in by the command line.
        flags: Filled in by the command line.
        training: Filled in by the command line.
        seeds: Seeds of every gate, separated by commas.
    """
    settings = training.settings()
    trainings = len(seeds) * (len(EVERY) + sum(SLOW.values()))
    run = open_study(
        place, "gates", flags, methods=EVERY, seeds=seeds, settings=settings,
        minutes=trainings * training.steps * SECONDS_A_STEP / 60,
    )  # fmt: skip
    compared = Comparison(run, EVERY, seeds)
    pieces = compared.obtain()
    rows = compared.rows(TASK, REFERENCE) + compared.gate_rows(pieces, DONE)
    compared.networks = {
        n: seed_networks for n, seed_networks in compared.networks.items() if n in EVALUATED
    }
    for network in chain.from_iterable(compared.networks.values()):
        network.gates.train()
    run.finish(
        rows + compared.rows(BALANCED), _bars(rows), seeds=seeds, data=compared.data(),
        headline=_headline(rows), notes=[NOTE, *_unrouted(rows)],
    )  # fmt: skip


def _bars(rows: Sequence[Row]) -> list[Bar]:
    """Return the bar of each gate that finds an expert for nearly every pair, and their number."""
    value_of = {(row.method, row.metric): row.value for row in rows if not row.versus}
    names = [name for name in METHODS if (name, ACCURACY) in value_of]
    bars = [Bar("gates compared", len(names), ">=", len(METHODS))]
    for name in names:
        if value_of[name, UNROUTED] <= MANY:
            least = min(value_of[name, task] for task in TASK_ACCURACY)
            bars.append(Bar(f"{name}: accuracy of the worse task", least, ">=", LEAST))
    return bars


def _unrouted(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on the gates that leave pairs without an expert, if there are any."""
    many = [row for row in rows if row.metric == UNROUTED and row.value > MANY]
    named = ", ".join(f"{row.method} {row.value:.0f} %" for row in many)
    return [f"Pairs that the worse of two gates sends to no expert: {named}."] if many else []


def _headline(rows: Sequence[Row]) -> str:
    accuracies = [r for r in rows if r.metric == ACCURACY and not r.versus and r.method in METHODS]
    if not accuracies:
        return ""
    best = max(accuracies, key=lambda row: row.value)
    worst = min(accuracies, key=lambda row: row.value)
    worse = [r.method for r in rows if r.metric == ACCURACY and r.versus and r.significant
             and r.high < 0 and r.method in METHODS]  # fmt: skip
    return (
        f"{len(accuracies)} gates: {best.method} names {best.value:.1%} of the digits, "
        f"{worst.method} {worst.value:.1%}; {len(worse)} are worse than {REFERENCE}."
    )


def draw(page: Page, run: StudyRun) -> None:
    """Add accuracy over cost to the report.

    Args:
        page: The report.
        run: Of the study.
    """
    rows = run.rows
    values = {(r.method, r.metric): r for r in rows if not r.versus and r.task != BALANCED}
    names = [name for name in EVERY if (name, ACCURACY) in values]
    page.section("Accuracy and cost").figure(
        cost_figure([values[name, ACCURACY] for name in names],
                    np.array([values[name, "active experts"].value for name in names])),
        "Mean error of both tasks on a logarithmic axis, with its interval, and the experts that a "
        "gate uses for a pair, evaluated.",
        name="accuracy",
        table=(
            ("gate", "accuracy", "low", "high", "active", "kFLOPs", "CPU seconds"),
            [[name, *values[name, ACCURACY][3:6], values[name, "active experts"].value,
              values[name, "kFLOPs"].value, values[name, SECONDS].value] for name in names],
        ),
    )  # fmt: skip


def cost_figure(accuracies: Sequence[Row], active: np.ndarray) -> Figure:
    """Draw errors with their intervals, and active experts, a line for each gate.

    Args:
        accuracies: Of every gate.
        active: Experts that it uses (N,).
    """
    order = np.argsort([row.value for row in accuracies])
    rows, lines = [accuracies[i] for i in order], np.arange(len(order))
    figure = new_figure(8.2, 1.25 + 0.22 * len(rows))
    left, right = (place(figure, x, 0.55, 2.9, 0.22 * len(rows)) for x in (1.75, 5.0))
    best, errors, worst = 100 - 100 * np.array([[r.high, r.value, r.low] for r in rows]).T
    color = colors_of(["error", "active"])
    left.errorbar(errors, lines, xerr=np.nan_to_num([errors - best, worst - errors]), fmt="o",
                  ms=4, lw=1.2, color=color["error"])  # fmt: skip
    left.set(xscale="log", xticks=TICKS, xticklabels=TICKS)
    left.minorticks_off()
    right.barh(lines, active[order], height=0.6, color=color["active"], label="active")
    left.set_yticks(lines, [row.method for row in rows])
    right.set_yticks(lines, [""] * len(rows))
    dress(left, x="digits with a wrong name, %")
    dress(right, x="active experts")
    for axes in (left, right):
        axes.set_ylim(-0.7, len(rows) - 0.3)
    head(figure, "Every gate on pairs of digits", "the last weights of every training are tested")
    return figure
