"""What block gates cost: loss over dense of prompts, next to rules and gates as sparse as they."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from apps.language.diagnose import PAGE, beginnings, opened
from apps.language.seer.calibrate import calibration_tokens, mean_errors
from apps.language.seer.distill import Distillation, Recipe, digest_of, model_with_gates
from apps.language.seer.loss_figure import loss_figure
from apps.language.seer.prompt_losses import DENSE, LOSS, MASS, RULES, SECONDS, MadeBudgets, measure
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, Scores, compare, moments
from harness.experiment import Arrays, Piece, Run, read_scores
from harness.files import Data
from harness.report.page import Page
from language.corpus import read_corpus
from language.seer.attach import Kind
from language.seer.block_files import load_block_gates
from language.seer.budgets import CHOOSERS, UNTRAINED
from language.seer.calibration import budgets_of, check_density
from language.seer.rivals import GATE, SINK_MEAN_POOL

FIGURES, SPEED = "figures", "as fast as the model as it comes"
VERSION = 4
NOTE = (
    "Loss is that of the whole text in nats per token, less that of the model that reads "
    "everything; seconds are medians of the CPU time of all layers, gates included. The gate of a "
    "prompt is one of three choosers of a head, next to mean keys and nearness; budgets of blocks "
    "and choosers were calibrated on training files, and are scaled for other lengths. 'rules with "
    "budgets' are the same without gates, calibrated by themselves: what gates add is the "
    "difference to them, and not to the methods with equally many blocks in every head, of which "
    "'gate, uniform' is one. All read the first block and their own. The oracle knows the "
    "attention. Attention mass is the fraction of the attention of the base in the blocks that are "
    "read; methods with more of it may lose more. Intervals are over documents and seeds."
)
DIGITS = "0123456789"  # of a seed, after the name of a method


class Prompts(NamedTuple):
    """Prompts of one length, of which a fraction of the blocks is read.

    Attributes:
        length: Tokens.
        fraction: Of the blocks.
        held_out: Test documents that they are the beginnings of.
    """

    length: int
    fraction: float
    held_out: int

    @property
    def task(self) -> str:
        """Name of their rows."""
        return f"prompts of {self.length:,} tokens, {self.fraction:.0%} of the blocks"


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Args:
        fractions: Fractions of the blocks that methods read.
        lengths: Tokens of prompts, a number for each fraction.
        held_out: Test documents, a number for each fraction.
        calibration: Training documents that budgets are calibrated on.
    """

    fractions: tuple[float, ...] = (0.176, 0.284)
    lengths: tuple[int, ...] = (1024, 1024)
    held_out: tuple[int, ...] = (16, 16)
    calibration: int = 6

    def prompts(self, context: int) -> list[Prompts]:
        """Return what is measured, one for each fraction.

        Args:
            context: Tokens of the prompts that gates learned from.

        Raises:
            GatesError: Values are out of range, or not as many as fractions.
        """
        many = len(self.fractions)
        fits = many == len(self.lengths) == len(self.held_out) > 0
        if not fits or min(*self.held_out, self.calibration) < 1 or min(self.lengths) < context:
            raise GatesError(
                f"--held_out is {[*self.held_out]}, --lengths {[*self.lengths]}, --fractions"
                f" {[*self.fractions]} and --calibration {self.calibration}, expected numbers from"
                f" 1 and lengths from {context}, equally many"
            )
        return [*map(Prompts, self.lengths, self.fractions, self.held_out)]


@dataclass(frozen=True)
class Bars:
    """What gates for prompts must reach, with each of the fractions; null is no bar.

    Args:
        most_loss: Most nats over dense.
        most_over_rule: Most nats over sink-mean-pool, the simplest good rule.
        most_over_rules_with_budgets: Most nats over rules with budgets, upper end of the interval.
        least_speed: Least CPU seconds of the model as it comes, of those with gates.
    """

    most_loss: tuple[float | None, ...] = ()
    most_over_rule: tuple[float | None, ...] = ()
    most_over_rules_with_budgets: tuple[float | None, ...] = ()
    least_speed: tuple[float | None, ...] = ()


def evaluate(
    place: Place,
    model: str,
    recipe: Recipe,
    measured: Measured,
    bars: Bars,
    kinds: tuple[Kind, ...] = ("prefill",),
    corpus: tuple[str, ...] = ("python",),
    seeds: tuple[int, ...] = (0,),
    quick: bool = False,
    shipped: bool = True,
    study: Literal["blocks"] = "blocks",
    overwrite: bool = False,
) -> None:
    """Distill gates where they are missing, calibrate budgets, and compare them with rivals.

    It writes scores and a report with a figure of loss over seconds.

    Args:
        place: Filled in by the command line.
        model: The model whose attention is distilled, see ``distill``; seer.yaml names one.
        recipe: Filled in by the command line.
        measured: Filled in by the command line.
        bars: Filled in by the command line.
        kinds: Kinds of gates that are distilled, of which those for ``prefill`` are measured.
        corpus: Files, folders, or ``python``, of whose training and test documents the beginnings
            are read.
        seeds: Of the gates, which are trained once with each.
        quick: A quick run: nothing is trained, and there are no bars.
        shipped: Use gates that ship with the package where their settings agree.
        study: This one; ``gates language evaluate --help`` lists the others.
        overwrite: Replace what was made with other settings.
    """
    del study
    recipe.check()
    if not kinds:
        raise GatesError("--kinds is empty, expected prefill or decode")
    every = measured.prompts(recipe.context)
    for prompts in every:
        check_density(prompts.fraction, -(-recipe.context // recipe.block_size))
    run = place.run(
        package="language", shipped=shipped, overwrite=overwrite, quick=quick, seeds=seeds
    )
    pretrained = opened(place, model)
    for kind in kinds:
        made = Distillation(run, pretrained, model, corpus, kind, recipe, seeds)
        if run.quick and made.gates.missing(made.pieces):
            raise GatesError(
                "no gates are distilled yet and a quick run trains nothing: drop --quick"
            )
        made.obtain()
    made = Distillation(run, pretrained, model, corpus, "prefill", recipe, seeds)
    held = {length: _held_out(made, corpus, every, length) for length, *_ in every}
    figures = _figures(made, corpus, held, every, measured)
    rows = {
        prompts: rows_of([*held[prompts.length]][: prompts.held_out], figures, prompts)
        for prompts in every
    }
    _finish(run, rows, bars, seeds, Data.of(pretrained.folder.name, "model", pretrained.folder))


def _finish(
    run: Run, rows: Mapping[Prompts, Sequence[Row]], bars: Bars, seeds: Sequence[int], model: Data
) -> None:
    """Write scores and a report."""
    path = run.finish(
        [row for of in rows.values() for row in of], bars_of(rows, bars), seeds=seeds,
        headline=" ".join(sentence(of, prompts) for prompts, of in rows.items()), data=[model],
        notes=[NOTE],
    )  # fmt: skip
    scores = read_scores(path, "language")
    page = Page("Block gates", scores.headline).section("Loss over seconds")
    page.figure(loss_figure(rows), NOTE)
    print(page.section("Scores").scores(scores, units="documents").write(run.folder / PAGE))


def _held_out(
    made: Distillation, corpus: Sequence[str], every: Sequence[Prompts], length: int
) -> dict[str, list[int]]:
    """Return beginnings of test documents with a number of tokens, by name.

    Raises:
        GatesError: There are too few, or the model reads fewer tokens.
    """
    made.found.require_context(length)
    most = max(prompts.held_out for prompts in every if prompts.length == length)
    texts = read_corpus(corpus).part("test")
    names, tokens = beginnings(made.found, texts, length, most)
    if len(names) < most:
        raise GatesError(
            f"{len(names)} of {len(texts)} test documents have {length} tokens, --held_out is"
            f" {most}: lower it, or give more and longer ones by --corpus"
        )
    return dict(zip(names, tokens, strict=True))


def _figures(
    made: Distillation, corpus: Sequence[str], held: Mapping[int, Mapping[str, Sequence[int]]],
    every: Sequence[Prompts], measured: Measured,
) -> dict[tuple[int, int], dict[str, Tensor]]:  # fmt: skip
    """Return figures by length and number of the document; what is missing is measured."""
    run, store, context = made.run, made.run.store(FIGURES, Arrays()), made.recipe.context
    paths, tokens = made.obtain(), {length: [*of.values()] for length, of in held.items()}
    tested = [digest_of(ids[:context]) for of in tokens.values() for ids in of]
    settings = {"gates": [piece.fingerprint for piece in made.pieces], "version": VERSION}
    trained = calibration_tokens(made.found, corpus, context, measured.calibration)
    settings["calibration"] = digests = [digest_of(ids) for ids in trained]
    if leaked := set(tested) & set(digests):
        raise GatesError(
            f"{len(leaked)} held-out sequences are those of training documents, too: give other"
            " texts by --corpus"
        )
    pieces = {}
    for length, n in ((length, n) for length, of in tokens.items() for n in range(len(of))):
        read = [p.fraction for p in every if p.length == length and n < p.held_out]
        own = {"fractions": read, "tokens": digest_of(tokens[length][n])}
        keys = {"tokens": length, "n": n}
        pieces[length, n] = Piece(made.kind, None, keys, {**made.base, **settings, **own})
    for piece in made.pieces:
        made.gates.load(piece, tested=tested)  # refuses gates that learned from one of them
    budgets = [
        _budgets(made, trained, path, measured.fractions)
        for path in paths
        if store.missing(pieces.values())
    ]
    work = partial(measure, place=made.place, tokens=tokens, paths=paths, budgets=budgets)
    run.obtain(
        store, pieces.values(), work, scoring=True, ticks=lambda one: int(one.keys["tokens"]),
        unit="tokens",
    )  # fmt: skip
    return {key: store.load(piece) for key, piece in pieces.items()}


def _budgets(
    made: Distillation, tokens: Sequence[Sequence[int]], path: Path, fractions: Sequence[float]
) -> MadeBudgets:
    """Return budgets by fraction, with the gates of a file and with rules alone."""
    model = model_with_gates(made.place, "prefill", made.recipe.block_size)
    load_block_gates(model, path)
    errors = mean_errors(model, tokens, CHOOSERS)
    return {
        name: {part: budgets_of(errors, model, part, choosers) for part in fractions}
        for name, choosers in ((GATE, CHOOSERS), (RULES, UNTRAINED))
    }


def rows_of(
    names: Sequence[str], figures: Mapping[tuple[int, int], Mapping[str, Tensor]], prompts: Prompts
) -> list[Row]:
    """Return losses, seconds and masses of all methods, and what the others have more than gates.

    Args:
        names: Held-out documents.
        figures: Of each, see `measure`, by length and number of the document.
        prompts: Of which the rows are.
    """
    draws, rows = Resamples.clusters(names), list[Row]()
    of = [figures[prompts.length, n] for n in range(len(names))]
    for metric in (LOSS, SECONDS, MASS):
        scores: dict[str, list[Scores]] = {}
        for key in of[0]:
            figure, name, fraction = key.split("/")
            if (figure, fraction) == (metric, str(prompts.fraction)):
                values = [float(text_figures[key].mean()) for text_figures in of]
                score = medians(values) if metric == SECONDS else moments(values, name=metric)
                scores.setdefault(name.rstrip(DIGITS), []).append(score)
        if scores:
            rows += compare(scores, draws, task=prompts.task, reference=GATE)
    return rows


def medians(values: Sequence[float]) -> Scores:
    """Return the score of `SECONDS`, the median of samples (N,), the lower one of two."""
    order = np.argsort(values)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        below = weights[:, order].cumsum(1)
        return {SECONDS: np.take(values, order)[(2 * below >= below[:, -1:]).argmax(1)]}

    return scores


def bars_of(rows: Mapping[Prompts, Sequence[Row]], wanted: Bars) -> list[Bar]:
    """Return the bars of gates for prompts, from their rows."""
    bars = []
    for place, (prompts, found) in enumerate(rows.items()):
        own, gaps = losses_of(found)
        rule, rules = gaps[SINK_MEAN_POOL], gaps[RULES]
        for name, value, bar in (
            ("nats over dense", own.value, wanted.most_loss),
            (f"nats over {SINK_MEAN_POOL}", -rule.value, wanted.most_over_rule),
            (f"nats over {RULES}, upper end of the interval", -rules.low,
             wanted.most_over_rules_with_budgets),
            (SPEED, speed_of(found), wanted.least_speed),
        ):  # fmt: skip
            if place < len(bar) and (limit := bar[place]) is not None:
                sense: Literal["<=", ">="] = ">=" if name == SPEED else "<="
                unit = "times" if name == SPEED else "nats"
                bars.append(Bar(f"{prompts.task}: {name}", value, sense, limit, unit))
    return bars


def losses_of(rows: Sequence[Row]) -> tuple[Row, dict[str, Row]]:
    """Return the loss of gates with budgets, and what other methods lose more, by method."""
    losses = [row for row in rows if row.metric == LOSS]
    own = next(row for row in losses if row.method == GATE and not row.versus)
    return own, {row.method: row for row in losses if row.versus}


def speed_of(rows: Sequence[Row]) -> float:
    """Return the seconds of the model as it comes, of those with gates."""
    seconds = {row.method: row.value for row in rows if row.metric == SECONDS and not row.versus}
    return seconds[DENSE] / seconds[GATE]


def sentence(rows: Sequence[Row], prompts: Prompts) -> str:
    """Return a sentence on the losses of gates and of what needs no training, and on seconds."""
    own, gaps = losses_of(rows)
    return (
        f"With {prompts.fraction:.0%} of the blocks of prompts of {prompts.length:,} tokens, gates"
        f" with budgets lose {own.value:.3f} nats [{own.low:.3f}, {own.high:.3f}] over dense, next"
        f" to {RULES} {_less(gaps[RULES])}, next to {SINK_MEAN_POOL} {_less(gaps[SINK_MEAN_POOL])},"
        f" and are {speed_of(rows):.2f} times as fast."
    )


def _less(gap: Row) -> str:
    """Return what gates lose more than a method."""
    return f"{-gap.value:+.3f} [{-gap.high:+.3f}, {-gap.low:+.3f}]"
