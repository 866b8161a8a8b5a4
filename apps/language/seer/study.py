"""What block gates cost: loss over dense of prompts, next to rules and gates as sparse as they."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from apps.language.diagnose import opened
from apps.language.seer.calibrate import calibration_tokens, mean_errors
from apps.language.seer.distill import Distillation, Recipe, digest_of, model_with_gates
from core_gates.errors import GatesError
from core_gates.ops import block_sparse_attention
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, Scores, compare, moments
from harness.experiment import Arrays, Job, Piece
from harness.files import Data
from language.corpus import read_corpus
from language.seer.attach import Attend, BlockGate, Kind
from language.seer.attention import AttentionInputs, attend_to_all
from language.seer.block_files import load_block_gates
from language.seer.budgets import CHOOSERS, UNTRAINED, Budgets
from language.seer.calibration import budgets_of, check_density
from language.seer.recording import attending
from language.seer.rivals import (
    BY_SUM,
    GATE,
    SCORES,
    SINK_MEAN_POOL,
    SINK_WINDOW,
    Score,
    attention_mass,
    chosen,
    kept_mass,
    scores_by,
    with_first,
)

FIGURES = "figures"
MASS, LOSS = "attention_mass", "loss_increase_nats"
RULES, UNIFORM = "rules with budgets", "gate, uniform"
VERSION = 3
NOTE = (
    "Loss is that of the whole text in nats per token, less that of the model that reads "
    "everything. The gate of a prompt is one of three choosers of a head, next to mean keys and "
    "nearness; budgets of blocks and choosers were calibrated on training files. 'rules with "
    "budgets' are the same without gates, calibrated by themselves: what gates add is the "
    "difference to them, and not to the methods with equally many blocks in every head, of which "
    "'gate, uniform' is one. All read the first block and their own. The oracle knows the "
    "attention. Attention mass is the fraction of the attention of the base in the blocks that are "
    "read; methods with more of it may lose more. Intervals are over documents and seeds."
)
Choose = Callable[[BlockGate, AttentionInputs], Tensor]
"""Returns the kept blocks."""

DIGITS = "0123456789"  # of a seed, after the name of a method


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Args:
        held_out: Sequences of test documents.
        fractions: Fractions of the blocks that methods read.
        calibration: Training documents that budgets are calibrated on.
    """

    held_out: int = 16
    fractions: tuple[float, ...] = (0.176, 0.284)
    calibration: int = 6

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            GatesError: One is.
        """
        fits = self.fractions and all(0 < fraction <= 1 for fraction in self.fractions)
        if min(self.held_out, self.calibration) < 1 or not fits:
            raise GatesError(
                f"--held_out is {self.held_out}, --fractions {[*self.fractions]} and --calibration"
                f" {self.calibration}, expected numbers from 1 and fractions up to 1"
            )


@dataclass(frozen=True)
class Bars:
    """What gates for prompts must reach, with each of the fractions; null is no bar.

    Args:
        most_loss: Most nats over dense.
        most_over_rule: Most nats over sink-mean-pool, the simplest good rule.
        most_over_rules_with_budgets: Most nats over rules with budgets, upper end of the interval.
    """

    most_loss: tuple[float | None, ...] = ()
    most_over_rule: tuple[float | None, ...] = ()
    most_over_rules_with_budgets: tuple[float | None, ...] = ()


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
    """Distill gates where they are missing, calibrate budgets, and compare losses with rivals.

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
    measured.check()
    if not kinds:
        raise GatesError("--kinds is empty, expected prefill or decode")
    for fraction in measured.fractions:
        check_density(fraction, -(-recipe.context // recipe.block_size))
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
    held = _held_out(made, corpus, measured.held_out)
    rows = rows_of([*held], _figures(made, corpus, held, measured), measured)
    run.finish(
        rows, bars_of(rows, measured, bars), seeds=seeds, headline=headline(rows, measured),
        data=[Data.of(pretrained.folder.name, "model", pretrained.folder)], notes=[NOTE],
    )  # fmt: skip


def _held_out(made: Distillation, corpus: Sequence[str], most: int) -> dict[str, list[int]]:
    """Return the beginnings of test documents, by name.

    Raises:
        GatesError: There are too few.
    """
    texts = read_corpus(corpus).part("test")
    held = made.sequences(texts, most)
    if len(held) < most:
        raise GatesError(
            f"{len(held)} of {len(texts)} test documents have {made.recipe.context} tokens,"
            f" --held_out is {most}: lower it, or give more and longer ones by --corpus"
        )
    return held


def _figures(
    made: Distillation, corpus: Sequence[str], held: Mapping[str, Sequence[int]], measured: Measured
) -> list[dict[str, Tensor]]:
    """Return the figures of every held-out sequence, which are measured where they are missing."""
    run, store = made.run, made.run.store(FIGURES, Arrays())
    paths, tested = made.obtain(), [digest_of(ids) for ids in held.values()]
    settings = {"gates": [piece.fingerprint for piece in made.pieces], "version": VERSION}
    settings |= {"fractions": [*measured.fractions]}
    tokens = calibration_tokens(made.found, corpus, made.recipe.context, measured.calibration)
    settings["calibration"] = digests = [digest_of(ids) for ids in tokens]
    if leaked := set(tested) & set(digests):
        raise GatesError(
            f"{len(leaked)} held-out sequences are those of training documents, too: give other"
            " texts by --corpus"
        )
    pieces = [
        Piece(made.kind, None, {"n": n}, {**made.base, **settings, "tokens": digest_of(ids)})
        for n, ids in enumerate(held.values())
    ]
    for piece in made.pieces:
        made.gates.load(piece, tested=tested)  # refuses gates that learned from one of them
    budgets = [
        _budgets(made, tokens, path, measured.fractions) for path in paths if store.missing(pieces)
    ]
    work = partial(measure, place=made.place, tokens=[*held.values()], paths=paths, budgets=budgets)
    run.obtain(store, pieces, work, scoring=True)
    return [store.load(piece) for piece in pieces]


def _budgets(
    made: Distillation, tokens: Sequence[Sequence[int]], path: Path, fractions: Sequence[float]
) -> dict[str, list[Budgets]]:
    """Return budgets for each fraction, with the gates of a file and with rules alone."""
    model = model_with_gates(made.place, "prefill", made.recipe.block_size)
    load_block_gates(model, path)
    errors = mean_errors(model, tokens, CHOOSERS)
    return {
        name: [budgets_of(errors, model, fraction, choosers) for fraction in fractions]
        for name, choosers in ((GATE, CHOOSERS), (RULES, UNTRAINED))
    }


def measure(
    piece: Piece, job: Job, place: str, tokens: Sequence[Sequence[int]], paths: Sequence[Path],
    budgets: Sequence[Mapping[str, Sequence[Budgets]]],
) -> dict[str, Tensor]:  # fmt: skip
    """Return attention mass of one held-out sequence by layer, and losses of a prompt.

    A name is that of the figure, the method with the number of a seed, and the fraction.
    """
    del job
    model: Any = model_with_gates(place, piece["kind"], piece["block_size"])
    trained = [copies(load_block_gates(model, path)) for path in paths]
    sequence, figures = torch.tensor(tokens[int(piece.keys["n"])]), dict[str, list[float]]()
    methods = methods_of(piece, trained, budgets)

    def attend(gate: BlockGate, seen: AttentionInputs) -> Tensor:
        """Return the output of a layer, dense, after measuring what every method keeps there."""
        mass = attention_mass(gate, seen)
        for (name, fraction), choose in methods.items():
            kept = kept_mass(mass, choose(gate, seen))
            figures.setdefault(f"{MASS}/{name}/{fraction}", []).append(kept)
        return attend_to_all(seen)

    dense = nats(model, sequence, attend)
    for (name, fraction), choose in methods.items():
        more = nats(model, sequence, partial(_sparse, choose=choose)) - dense
        figures[f"{LOSS}/{name}/{fraction}"] = [more]
    return {name: torch.tensor(values) for name, values in figures.items()}


def methods_of(
    piece: Piece, trained: Sequence[Mapping[str, Any]],
    budgets: Sequence[Mapping[str, Sequence[Budgets]]],
) -> dict[tuple[str, float], Choose]:  # fmt: skip
    """Return what chooses blocks, by name and fraction; gates have the number of a seed."""
    methods: dict[tuple[str, float], Choose] = {}
    for place, fraction in enumerate(piece["fractions"]):
        scores: dict[str, Score] = {n: SCORES[n] for n in (SINK_WINDOW, SINK_MEAN_POOL, BY_SUM)}
        for seed, gates in enumerate(trained):
            scores[f"{UNIFORM}{seed}"] = partial(with_first, partial(scores_by, gates=gates))
            for name, made in budgets[seed].items():
                choose = partial(_by_budgets, budgets=made[place], gates=gates)
                methods[f"{name}{seed}", fraction] = choose
        for method, score in scores.items():
            methods[method, fraction] = partial(_equally, score=score, fraction=fraction)
    return methods


def _equally(gate: BlockGate, seen: AttentionInputs, score: Score, fraction: float) -> Tensor:
    return chosen(score(gate, seen), fraction)


def _by_budgets(
    gate: BlockGate, seen: AttentionInputs, budgets: Budgets, gates: Mapping[str, Any]
) -> Tensor:
    return budgets.choose(gate.name, partial(scores_by, gate, seen, gates), seen)


def _sparse(gate: BlockGate, seen: AttentionInputs, choose: Choose) -> Tensor:
    mask, size = choose(gate, seen), gate.gate.block_size
    return block_sparse_attention(seen.q, seen.k, seen.v, mask, size, scale=seen.scale)


def copies(gates: Mapping[str, BlockGate]) -> dict[str, Any]:
    """Return copies of gates, by layer."""
    return {name: copy.deepcopy(gate.gate) for name, gate in gates.items()}


def nats(model: Any, sequence: Tensor, attend: Attend) -> float:
    """Return the cross-entropy of a sequence (T,) in nats per token of a model that attends so.

    The logits are those of the model itself, which may scale them.
    """
    with torch.inference_mode(), attending(model, attend):
        logits = model(sequence.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        return float(F.cross_entropy(logits, sequence[1:]))


def rows_of(
    names: Sequence[str], figures: Sequence[Mapping[str, Tensor]], measured: Measured
) -> list[Row]:
    """Return losses and masses of all methods, and what the others have more than gates.

    Args:
        names: Held-out documents.
        figures: Of each, see `measure`.
        measured: What was measured.
    """
    draws, rows = Resamples.clusters(names), list[Row]()
    for fraction in measured.fractions:
        for metric in (LOSS, MASS):
            scores: dict[str, list[Scores]] = {}
            for key in figures[0]:
                figure, name, of = key.split("/")
                if (figure, of) == (metric, str(fraction)):
                    values = [float(text_figures[key].mean()) for text_figures in figures]
                    scores.setdefault(name.rstrip(DIGITS), []).append(moments(values, name=metric))
            rows += compare(scores, draws, task=task_of(fraction), reference=GATE)
    return rows


def task_of(fraction: float) -> str:
    """Return the name of rows with a fraction of the blocks."""
    return f"prompts, {fraction:.0%} of the blocks"


def bars_of(rows: Sequence[Row], measured: Measured, wanted: Bars) -> list[Bar]:
    """Return the bars of gates for prompts, from their rows."""
    bars = []
    for place, fraction in enumerate(measured.fractions):
        task = task_of(fraction)
        own, gaps = losses_of(rows, task)
        rule, rules = gaps[SINK_MEAN_POOL], gaps[RULES]
        for name, value, bar in (
            ("nats over dense", own.value, wanted.most_loss),
            (f"nats over {SINK_MEAN_POOL}", -rule.value, wanted.most_over_rule),
            (f"nats over {RULES}, upper end of the interval", -rules.low,
             wanted.most_over_rules_with_budgets),
        ):  # fmt: skip
            if place < len(bar) and (most := bar[place]) is not None:
                bars.append(Bar(f"{task}: {name}", value, "<=", most, "nats"))
    return bars


def losses_of(rows: Sequence[Row], task: str) -> tuple[Row, dict[str, Row]]:
    """Return the loss of gates with budgets, and what other methods lose more, by method."""
    losses = [row for row in rows if (row.task, row.metric) == (task, LOSS)]
    own = next(row for row in losses if row.method == GATE and not row.versus)
    return own, {row.method: row for row in losses if row.versus}


def headline(rows: Sequence[Row], measured: Measured) -> str:
    """Return a sentence for each fraction, on the losses of gates and of what needs no training."""
    said = []
    for fraction in measured.fractions:
        own, gaps = losses_of(rows, task_of(fraction))
        said.append(
            f"With {fraction:.0%} of the blocks of prompts, gates with budgets lose"
            f" {own.value:.3f} nats [{own.low:.3f}, {own.high:.3f}] over dense, next to {RULES}"
            f" {_less(gaps[RULES])}, next to {SINK_MEAN_POOL} {_less(gaps[SINK_MEAN_POOL])}."
        )
    return " ".join(said)


def _less(gap: Row) -> str:
    """Return what gates lose more than a method."""
    return f"{-gap.value:+.3f} [{-gap.high:+.3f}, {-gap.low:+.3f}]"
