"""``gates study comet``: COMET, its permutations, and what they save of the tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from apps.study.digit_training import (
    ACCURACY,
    SECONDS_A_STEP,
    Comparison,
    Method,
    Training,
    trained,
    trial,
)
from apps.study.study_run import Flags, StudyRun, open_study
from core_gates.errors import GatesError
from core_gates.gates import PermutedGate
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, Scores
from harness.experiment import Choice, Figures, Job, Piece, Run
from harness.experiment.tuning import lowest
from harness.figures.style import colors_of, dress, head, new_figure, place
from harness.report.page import Page
from studies.digits.multi_digits import NUM_IDS

TASK, DONE, BEST, SEARCH, EVEN, ADDED = (
    "test pairs", "what gates do", "expected best of n trials", "middle of the search",
    "search at equal learning rates", "error added",
)  # fmt: skip
SPARE, NEAR_SOFTMAX, ABOVE_HASH = 0.05, -0.015, 0.02  # active experts beyond k; accuracies
STARTS, SEARCH_STEPS = (1e-3, 1e-2, 1e-1), 0.1
GAMMAS, ENTROPIES = (0.01, 0.1, 1.0), (1e-3, 1e-2, 5e-2, 1e-1)
RATES, SEARCHES = (5e-4, 5e-3), (0.02, 0.2)
NOTE = (
    "Every method gets as many random settings. Of a sparse method the best on validation pairs is "
    "taken among those with at most k + 0.05 active experts, and trained again with the test "
    "seeds; in the expected best the others count as the worst trial of their method. + is the "
    "permutation search. Intervals are over test glyphs and seeds; those of the expected best are "
    "over trials."
)
NAMES = tuple(f"{n}{s}" for n in ("comet", "topk", "dselect", "hash") for s in ("", "+"))


def methods_of(k: int) -> dict[str, Method]:
    """Return every method by name; a plus is a permutation search around the gates.

    Args:
        k: Experts that a pair may use, but for the hash, which has one.
    """
    sparse = {
        "comet": Method("CometGate", {"k": k}, {}, k=k),
        "topk": Method("TopKGate", {"k": k}, {"balance": 0.01}, k=k),
        "dselect": Method("DSelectKGate", {"k": k}, {"lost_mass": 1.0}, k=k),
        "hash": Method("HashGate", {"num_ids": NUM_IDS}, {}, k=1),
    }
    method_of = {name: sparse[name.rstrip("+")] for name in NAMES}
    for name, method in method_of.items():
        if name.endswith("+"):
            options = {**method.options, "gate": method.gate, "search": {"steps": SEARCH_STEPS}}
            losses = {**method.losses, "permutation_entropy": 1e-4}
            method_of[name] = method._replace(gate="PermutedGate", options=options, losses=losses)
    return {**method_of, "softmax": Method("SoftmaxGate", {}, {})}


def comet(
    place: Place,
    flags: Flags,
    training: Training,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    trials: int = 12,
    k: int = 2,
) -> None:
    """Tune COMET and its rivals alike, with and without permutations, and compare them.

    Args:
        place: Filled in by the command line.
        flags: Filled in by the command line.
        training: Filled in by the command line.
        seeds: Test seeds of every method, separated by commas.
        trials: Random settings of every method.
        k: Trees, selectors or experts of a pair.
    """
    if trials < 1:
        raise GatesError(f"--trials must be at least 1, found {trials}")
    settings, methods = training.settings(), methods_of(k)
    if not 1 <= k <= training.experts:
        raise GatesError(f"--k is {k}, expected 1 to the {training.experts} of --experts")
    trainings = len(methods) * (trials + len(seeds)) + 1
    run = open_study(
        place, "comet", flags, methods=methods, seeds=seeds, settings=settings,
        minutes=trainings * training.steps * SECONDS_A_STEP / 60,
    )  # fmt: skip
    spaces = {name: drawn_settings(name, trials) for name in methods}
    own_settings = {name: method.settings for name, method in methods.items()}
    chosen = run.tune(spaces, trial, trials=trials, choose=best_sparse, own=own_settings)
    compared = Comparison(run, methods, seeds)
    pieces = compared.obtain({name: choice.setting for name, choice in chosen.items()})
    rows = compared.rows(TASK, "softmax") + compared.gate_rows(pieces, DONE)
    rows += trial_rows(chosen) + search_rows(run, methods["topk+"], seeds)
    run.finish(
        rows, _bars(rows, methods), seeds=seeds, data=compared.data(),
        headline=_headline(rows, trials), notes=[NOTE],
    )  # fmt: skip


def drawn_settings(name: str, trials: int) -> list[dict[str, Any]]:
    """Return random settings of a method, independent of each other."""
    generator = np.random.default_rng([[*NAMES, "softmax"].index(name), 17])

    def between(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    settings = []
    for _ in range(trials):
        setting: dict[str, Any] = {"learning_rate": between(*RATES)}
        if name.startswith(("comet", "dselect")):
            setting["gamma"] = float(generator.choice(GAMMAS))
            setting["entropy"] = float(generator.choice(ENTROPIES))
        if name.endswith("+"):
            setting["search_steps"] = between(*SEARCHES)
            setting["search_start"] = float(generator.choice(STARTS))
        settings.append(setting)
    return settings


def best_sparse(figures: Sequence[Mapping[str, float]]) -> int:
    """Return the place of the lowest score among trials that are sparse enough, else the sparsest.

    Raises:
        GatesError: No trial has a score.
    """
    sparse = [i for i, trial_figures in enumerate(figures) if trial_figures["excess"] <= SPARE]
    if not sparse:
        lowest(figures)  # refuses trials without a score
        finite = [
            i for i, trial_figures in enumerate(figures) if not np.isnan(trial_figures["score"])
        ]
        return min(finite, key=lambda i: figures[i]["excess"])
    return sparse[lowest([figures[i] for i in sparse])]


def expected_best(scores: Sequence[float], most: int) -> Scores:
    """Return the expected lowest of n = 1 … ``most`` draws among scores that weigh differently.

    Args:
        scores: Of trials (N,).
        most: Largest n.
    """
    order = np.argsort(scores)
    values = np.asarray(scores, dtype=float)[order]

    def best(weights: np.ndarray) -> dict[str, np.ndarray]:
        parts = weights[:, order] / weights.sum(1, keepdims=True)
        above = np.clip(parts[:, ::-1].cumsum(1)[:, ::-1], 0, 1)  # this one or a worse one
        worse = np.concatenate([above[:, 1:], np.zeros((len(above), 1))], 1)
        return {f"{n} trials": (above**n - worse**n) @ values for n in range(1, most + 1)}

    return best


def trial_rows(chosen: Mapping[str, Choice]) -> list[Row]:
    """Return the expected best error by the number of trials, and how many the search saves.

    A trial with too many active experts, which is not chosen, counts as the worst of its method.
    """
    rows: list[Row] = []
    curves: dict[str, list[float]] = {}
    tried = {name: choice.trials for name, choice in chosen.items() if choice.trials}
    for name, trials in tried.items():
        worst = max(float(trial_figures["score"]) for trial_figures in trials)
        scores = [
            float(trial_figures["score"]) if trial_figures["excess"] <= SPARE else worst
            for trial_figures in trials
        ]
        curve = expected_best(scores, len(scores))
        draws = Resamples.clusters(range(len(scores)))
        rows += [Row(name, BEST, n, *interval) for n, interval in draws.intervals(curve).items()]
        curves[name] = [float(v[0]) for v in curve(np.ones((1, len(scores)))).values()]
    for name, means in curves.items():
        if name.endswith("+") and (plain := curves.get(name[:-1])):
            reached = [float(n) for n, value in enumerate(means, 1) if value <= plain[-1]]
            rows.append(Row(name, f"{BEST}, saved", "trials for the best of all without search",
                            reached[0] if reached else np.nan,
                            note="" if reached else "by no number of trials"))  # fmt: skip
            effect = effect_of_search(tried[name[:-1]], tried[name])
            draws = Resamples.clusters(range(len(plain) + len(means)))
            rows.append(Row(name, EVEN, ADDED, *draws.intervals(effect)[ADDED]))
    return rows


def effect_of_search(
    plain: Sequence[Mapping[str, float]], searched: Sequence[Mapping[str, float]]
) -> Scores:
    """Return the function from weights of trials to what a search adds to the validation error.

    It is the step between two parabolas in the logarithm of the learning rate, which are fitted to
    the errors of all trials and are otherwise the same.

    Args:
        plain: Trials without the search.
        searched: Trials with it.
    """
    both = [
        (np.log(trial_figures["learning_rate"] / RATES[0]), trial_figures["score"])
        for trial_figures in [*plain, *searched]
    ]
    rates, errors = np.array(both).T
    steps = np.arange(len(both)) >= len(plain)
    columns = np.stack([rates**0, rates, rates**2, steps], 1)

    def effect(weights: np.ndarray) -> dict[str, np.ndarray]:
        weighed = weights[:, None] * columns.T
        return {ADDED: (np.linalg.pinv(weighed @ columns) @ weighed @ errors)[:, -1]}

    return effect


def search_rows(run: Run, method: Method, seeds: Sequence[int]) -> list[Row]:
    """Return hardness and doubly stochastic error of the relaxation halfway through the search."""
    store = run.store("searches", Figures())
    stop = max(1, round(SEARCH_STEPS * run.settings["steps"] / 2))
    pieces = [
        run.piece("topk+", seed, {"start": start},
                  **{**method.settings, "search_start": start, "stop": stop})
        for start in STARTS
        for seed in seeds[:3]
    ]  # fmt: skip
    states: dict[float, list[dict[str, float]]] = {}
    for piece in run.obtain(store, pieces, search_state):
        states.setdefault(piece["search_start"], []).append(store.load(piece))
    return [
        Row(f"topk+ from {start:g}", SEARCH, metric,
            float(np.mean([state[metric] for state in start_states])), n=len(start_states))
        for start, start_states in states.items()
        for metric in start_states[0]
    ]  # fmt: skip


def search_state(piece: Piece, job: Job) -> dict[str, float]:
    """Train as far as the middle of the search, and report the permutation of the first gate."""
    gate = trained(piece, job).gates[0]
    assert isinstance(gate, PermutedGate)
    torch.manual_seed(0)
    report = gate.report()
    return {
        "hardness": report["hardness"],
        "doubly stochastic error": max(report["row_error"], report["column_error"]),
    }


def _bars(rows: Sequence[Row], methods: Mapping[str, Method]) -> list[Bar]:
    value_of = {(row.method, row.metric): row.value for row in rows if not row.versus}
    bars = [
        Bar(f"{name}: active experts", value_of[name, "active experts"], "<=", method.k + SPARE)
        for name, method in methods.items()
        if method.k is not None and (name, "active experts") in value_of
    ]
    if {("comet+", ACCURACY), ("softmax", ACCURACY), ("hash", ACCURACY)} <= value_of.keys():
        accuracy = value_of["comet+", ACCURACY]
        near, above = (
            accuracy - value_of["softmax", ACCURACY],
            accuracy - value_of["hash", ACCURACY],
        )
        bars.append(Bar("COMET+ less softmax, accuracy", near, ">=", NEAR_SOFTMAX))
        bars.append(Bar("COMET+ less hash, accuracy", above, ">=", ABOVE_HASH))
    return bars


def _headline(rows: Sequence[Row], trials: int) -> str:
    saved = [row for row in rows if row.task == f"{BEST}, saved"]
    said = ", ".join(
        f"{row.method} {row.value:.0f}" if np.isfinite(row.value) else f"{row.method} never"
        for row in saved
    )
    opening = f"Trials after which a search is as good as {trials} without it"
    return f"{opening}: {said}." if said else ""


def draw(page: Page, run: StudyRun) -> None:
    """Add the expected best error by the number of trials to the report.

    Args:
        page: The report.
        run: Of the study.
    """
    rows = [r for r in run.rows if r.task == BEST]
    curves: dict[str, list[float]] = {}
    for row in rows:
        curves.setdefault(row.method, []).append(row.value)
    if curves:
        page.section("What trials buy").figure(
            trials_curve_figure(curves),
            "Expected lowest error on the validation pairs of n random settings of a method; "
            "dotted: with the permutation search.",
            name="trials-needed",
            table=(Row._fields, [list(row) for row in rows]),
        )


def trials_curve_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the expected best error against the number of trials.

    Args:
        curves: Method -> (n,).
    """
    figure = new_figure(7.4, 3.9)
    axes = place(figure, 0.8, 0.6, 4.6, 2.8)
    colors = colors_of(dict.fromkeys(name.rstrip("+") for name in curves))
    for name, curve in curves.items():
        style = ":" if name.endswith("+") else "-"
        axes.plot(range(1, len(curve) + 1), curve, style, color=colors[name.rstrip("+")], lw=1.8,
                  label=name)  # fmt: skip
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    dress(axes, x="random settings tried", y="expected lowest error")
    head(figure, "What trials buy")
    return figure
