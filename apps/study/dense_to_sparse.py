"""``gates study dense-to-sparse``: when and how the gate of EvoMoE hardens; activation gates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from apps.study.digit_training import (
    ACCURACY,
    SECONDS_A_STEP,
    Comparison,
    Method,
    Training,
)
from apps.study.gate_comparison import METHODS
from apps.study.study_run import Flags, StudyRun, open_study
from core_gates.errors import GatesError
from core_gates.routing.collect import update_gates
from harness.command.verbs import Place
from harness.evidence import Bar, Row
from harness.experiment import Run
from harness.figures.style import colors_of, dress, head, new_figure, place
from harness.files import Data
from harness.report.page import Page

TASK, DONE, BEFORE, BEFORE_DONE, HARDENED = (
    "test pairs", "what gates do", "before hardening", "what gates do before hardening",
    "the same weights, hardened",
)  # fmt: skip
LABELS = {BEFORE: "one step before hardening", HARDENED: HARDENED, TASK: "at the end"}
REFERENCE = "gumbel-0.3-at-0.4"
ACTIVATIONS = ("identity", "tanh", "sigmoid", "gelu")
NOTE = (
    "A name such as gumbel-0.3-at-0.4 is a way of weighing, the last temperature, and the fraction "
    "of the training after which the gate hardens. Before hardening is the same training, stopped "
    "one step earlier; what hardening costs is the difference between these weights with and "
    "without it. Intervals are over test glyphs and seeds."
)


def dense_to_sparse(
    place: Place,
    flags: Flags,
    training: Training,
    seeds: tuple[int, ...] = (0, 1, 2),
    temperatures: tuple[float, ...] = (1.0, 0.3, 0.1),
    hardening: tuple[float, ...] = (0.4, 0.8),
    threshold: float = 0.001,
) -> None:
    """Compare how dense-to-sparse gates cool and harden, and activation gates of each kind.

    Args:
        place: Filled in by the command line.
        flags: Filled in by the command line.
        training: Filled in by the command line.
        seeds: Seeds of every method, separated by commas.
        temperatures: Last temperatures, after 2.
        hardening: Fractions of the training after which gates harden.
        threshold: Weight that an expert must exceed, below 1 over the number of experts.
    """
    settings = training.settings()
    if not temperatures or not all(0 < temperature < np.inf for temperature in temperatures):
        raise GatesError(f"--temperatures is {list(temperatures)}, expected positive numbers")
    if not hardening or not all(2 <= part * training.steps < training.steps for part in hardening):
        raise GatesError(
            f"--hardening is {list(hardening)}, expected fractions of the training below 1, two "
            "steps at least"
        )
    if not 0 <= threshold < 1 / training.experts:
        raise GatesError(
            f"--threshold is {threshold:g}, expected less than 1 over {training.experts} experts, "
            "at which every expert may be closed"
        )
    hard = hardening_methods(temperatures, hardening, threshold)
    methods = {**hard, **activation_methods()}
    trainings = len(seeds) * (len(methods) + len(hard) * float(np.mean(hardening)))
    run = open_study(
        place, "dense-to-sparse", flags, methods=methods, seeds=seeds, settings=settings,
        minutes=trainings * training.steps * SECONDS_A_STEP / 60,
    )  # fmt: skip
    rows, data = _rows(run, methods, hard, seeds)
    run.finish(rows, _bars(rows, hard), seeds=seeds, data=data, notes=[NOTE],
               headline=_headline(rows))  # fmt: skip


def hardening_methods(
    temperatures: Sequence[float], hardening: Sequence[float], threshold: float
) -> dict[str, Method]:
    """Return dense-to-sparse gates of every kind by name."""
    return {
        f"{combine}-{end:g}-at-{part:g}": Method(
            "DenseToSparseGate",
            {"combine": combine, "threshold": threshold, "stages": {"annealing": part, "end": end}},
            METHODS["DenseToSparseGate"].losses,
            k=1,
        )
        for combine in ("gumbel", "softmax")
        for end in temperatures
        for part in hardening
    }


def activation_methods() -> dict[str, Method]:
    """Return activation gates, whose temperature follows a schedule or is learned."""
    cooling = {"start": 2.0, "end": 0.3, "num_steps": 0.4, "shape": "exponential"}
    taus: dict[str, dict[str, Any]] = {
        "scheduled": {"tau": cooling},
        "learned": {"tau": 1.0, "learn_tau": True},
    }
    return {
        f"{activation}-{how}": Method("ActivationGate", {"activation": activation, **tau}, {})
        for activation in ACTIVATIONS
        for how, tau in taus.items()
    }


def _rows(
    run: Run, methods: dict[str, Method], hard: dict[str, Method], seeds: Sequence[int]
) -> tuple[list[Row], list[Data]]:
    """Return the rows of the ends of all training runs, and of those one step before hardening.

    The latter are scored as they are, and with the same weights hardened.
    """
    ends = Comparison(run, methods, seeds)
    pieces = ends.obtain()
    rows = ends.rows(TASK, REFERENCE) + ends.gate_rows(pieces, DONE)
    steps = run.settings["steps"]
    stopped = {
        name: method._replace(stop=round(method.options["stages"]["annealing"] * steps) - 1)
        for name, method in hard.items()
    }
    early = Comparison(run, stopped, seeds)
    pieces = early.obtain(keys={"stage": "dense"})
    if early.networks:
        rows += early.rows(BEFORE) + early.gate_rows(pieces, BEFORE_DONE, kept=False)
        for network in (
            network for seed_networks in early.networks.values() for network in seed_networks
        ):
            update_gates(network)
        rows += early.rows(HARDENED)
    return rows, ends.data()


def _bars(rows: Sequence[Row], hard: dict[str, Method]) -> list[Bar]:
    active = [
        abs(row.value - 1)
        for row in rows
        if row.task == DONE and row.metric == "active experts" and row.method in hard
    ]
    name = "hardened gates: largest distance of active experts from 1"
    return [Bar(name, max(active), "<=", 0.0)] if active else []


def _headline(rows: Sequence[Row]) -> str:
    accuracy = {(r.method, r.task): r.value for r in rows if r.metric == ACCURACY and not r.versus}
    falls = {
        method: value - accuracy[method, BEFORE]
        for (method, task), value in accuracy.items()
        if task == HARDENED
    }
    if not falls:
        return ""
    least, most = min(falls, key=falls.__getitem__), max(falls, key=falls.__getitem__)
    return (
        f"Hardening alone changes accuracy by {100 * falls[least]:+.1f} points ({least}) to "
        f"{100 * falls[most]:+.1f} ({most})."
    )


def draw(page: Page, run: StudyRun) -> None:
    """Add accuracies before and after hardening to the report.

    Args:
        page: The report.
        run: Of the study.
    """
    rows = run.rows
    accuracies = [r for r in rows if r.metric == ACCURACY and not r.versus and r.task in LABELS]
    page.section("Before and after hardening").figure(
        hardening_figure(accuracies),
        "Mean accuracy of both tasks with its interval. Activation gates do not harden.",
        name="hardening",
        table=(Row._fields, [list(row) for row in accuracies]),
    )


def hardening_figure(rows: Sequence[Row]) -> Figure:
    """Draw accuracies of every method before and after hardening.

    Args:
        rows: Of the tasks of `LABELS`.
    """
    names = list(dict.fromkeys(row.method for row in rows))[::-1]
    figure = new_figure(7.0, 1.5 + 0.24 * len(names))
    axes = place(figure, 1.9, 0.6, 4.4, 0.24 * len(names))
    colors = colors_of(LABELS)
    for (task, label), shift in zip(LABELS.items(), (0.22, 0.0, -0.22), strict=True):
        task_rows = [row for row in rows if row.task == task]
        lines = [names.index(row.method) + shift for row in task_rows]
        ends = [
            [row.value - row.low for row in task_rows],
            [row.high - row.value for row in task_rows],
        ]
        axes.errorbar([row.value for row in task_rows], lines, xerr=np.nan_to_num(np.array(ends)),
                      fmt="o", ms=4, lw=1.2, color=colors[task], label=label)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0),
                borderaxespad=0.2)  # fmt: skip
    dress(axes, x="mean accuracy")
    head(figure, "Before and after hardening")
    return figure
