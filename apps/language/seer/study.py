"""Which blocks of keys hold the attention: distilled gates next to rivals that know less."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apps.language.diagnose import opened
from apps.language.seer.distill import Distillation, Recipe, digest_of, model_with_gates
from core_gates.attention.seer.decode import DecodeAttnGate, block_density
from core_gates.attention.seer.gate import AttnGate, gate_distillation_loss
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, Scores, compare, moments
from harness.experiment import Arrays, Job, Piece, Store
from harness.files import Data
from language.corpus import read_corpus
from language.scoring import ratio
from language.seer.attach import Attend, BlockGate, Kind, block_gates
from language.seer.attention import AttentionInputs, attend_to_all
from language.seer.block_files import load_block_gates
from language.seer.distillation import SKIPPED
from language.seer.recording import attending, logits_of, read, record, rows_of
from language.seer.rivals import (
    BY_SUM,
    GATE,
    ORACLE,
    STATIC,
    Score,
    attend_to,
    attention_map,
    attention_mass,
    chosen,
    kept_mass,
    scores_by,
    scores_of,
    static_scores,
)

FIGURES, MAPS, DENSE, START = "figures", "maps", "dense", "start"
MASS, KL, LOSS = "attention_mass", "row_kl", "loss_increase_nats"
OF_ORACLE, OF_MOST = "mass_of_oracle", "mass_of_oracle_by_sum"
UNTRAINED = "untrained gate"
VERSION = 2
NOTE = (
    "Attention mass is the fraction of the attention of the base that lies in the chosen blocks, "
    "averaged over queries, heads and layers; every method chooses equally many, its own block "
    "among them. Two oracles are known only after attention: that by the largest attention in a "
    "block, from which gates learn, and that by the sum, which no method exceeds. The static map "
    "is the mean attention between blocks on the sequences that gates learn from, by layer and "
    "head: it knows where blocks lie and not what is in them. Intervals are over documents and "
    "seeds of the gates."
)


@dataclass(frozen=True)
class Measured:
    """What is measured.

    Args:
        held_out: Sequences of test documents.
        fraction: Fraction of the blocks that methods choose, of which the mass is compared.
        loss_fraction: Fraction of the blocks of prompts with which the loss is measured; 0 for
            none.
    """

    held_out: int = 16
    fraction: float = 0.2
    loss_fraction: float = 0.75

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            GatesError: One is.
        """
        fits = 0 < self.fraction <= 1 and 0 <= self.loss_fraction <= 1
        if self.held_out < 1 or not fits:
            raise GatesError(
                f"--held_out is {self.held_out}, --fraction {self.fraction} and --loss_fraction"
                f" {self.loss_fraction}, expected a number from 1 and fractions up to 1"
            )


@dataclass(frozen=True)
class Bars:
    """What gates must reach.

    Args:
        least_of_oracle: Least mass of gates over that of the oracle; no bar if null.
        above: Methods that gates must hold more mass than, by the paired interval.
        most_kl: Most divergence of a row over that of untrained gates; no bar if null.
        most_loss: Most increase of the loss of prompts in nats per token; no bar if null.
    """

    least_of_oracle: float | None = None
    above: tuple[str, ...] = ()
    most_kl: float | None = None
    most_loss: float | None = None


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
    """Distill gates where they are missing, and compare the blocks that they choose with rivals.

    Args:
        place: Filled in by the command line.
        model: The model whose attention is distilled, see ``distill``; seer.yaml names one.
        recipe: Filled in by the command line.
        measured: Filled in by the command line.
        bars: Filled in by the command line.
        kinds: Kinds of gates, ``prefill`` and ``decode``.
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
    rivals = [STATIC, *scores_of("decode")]
    if not kinds or (unknown := set(bars.above) - set(rivals)):
        what = f"--above names {', '.join(unknown)}" if kinds else "--kinds is empty"
        raise GatesError(f"{what}, expected prefill or decode, and {', '.join(rivals)}")
    run = place.run(
        package="language", shipped=shipped, overwrite=overwrite, quick=quick, seeds=seeds
    )
    pretrained = opened(place, model)
    rows: list[Row] = []
    met: list[Bar] = []
    said, data = [], [Data.of(pretrained.folder.name, "model", pretrained.folder)]
    for kind in kinds:
        made = Distillation(run, pretrained, model, corpus, kind, recipe, seeds)
        texts = read_corpus(corpus).part("test")
        held = made.sequences(texts, measured.held_out)
        if len(held) < measured.held_out:
            raise GatesError(
                f"{len(held)} of {len(texts)} test documents have {recipe.context} tokens,"
                f" --held_out is {measured.held_out}: lower it, or give more and longer ones by"
                " --corpus"
            )
        figures = _figures(made, held, measured)
        kind_rows = rows_of_kind(kind, [*held], figures, measured)
        rows, met = rows + kind_rows, met + bars_of_kind(kind, kind_rows, bars)
        said.append(headline(kind, kind_rows))
    run.finish(rows, met, seeds=seeds, data=data, headline=" ".join(said), notes=[NOTE])


def _figures(
    made: Distillation, held: Mapping[str, Sequence[int]], measured: Measured
) -> list[dict[str, Tensor]]:
    """Return the figures of every held-out sequence, which are measured where they are missing."""
    run, store = made.run, made.run.store(FIGURES, Arrays())
    if run.quick and made.gates.missing(made.pieces):
        raise GatesError("no gates are distilled yet and a quick run trains nothing: drop --quick")
    made.obtain()
    digests, texts = [digest_of(ids) for ids in made.tokens.values()], [*made.tokens.values()]
    mapped = Piece(made.kind, None, settings={**made.base, "sequences": digests})
    maps = run.store(MAPS, Arrays())
    look = partial(make_map, place=made.place, tokens=texts)
    run.obtain(maps, [mapped], look, ticks=len(texts), unit="sequences", scoring=True)
    settings = {"gates": [piece.fingerprint for piece in made.pieces], "version": VERSION}
    settings |= {"fraction": measured.fraction, "map": mapped.fingerprint}
    settings["loss_fraction"] = measured.loss_fraction if made.kind == "prefill" else 0.0
    pieces = [
        Piece(made.kind, None, {"n": n}, {**made.base, **settings, "tokens": digest_of(ids)})
        for n, ids in enumerate(held.values())
    ]
    work = partial(
        measure, place=made.place, tokens=[*held.values()], gates=made.gates, trained=made.pieces,
        maps=maps.load(mapped, tested=[digest_of(ids) for ids in held.values()]),
    )  # fmt: skip
    run.obtain(store, pieces, work, scoring=True)
    return [store.load(piece) for piece in pieces]


def make_map(
    piece: Piece, job: Job, place: str, tokens: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Return the mean attention between blocks over sequences, by layer.

    A kill costs what was read of one sequence.
    """
    model = model_with_gates(place, piece["kind"], piece["block_size"])
    job.note(objects=piece["sequences"])
    maps = []
    for number, ids in enumerate(tokens):
        maps.append(job.part(str(number), Arrays(), partial(maps_of, model, torch.tensor(ids))))
        job.tick()
    return {name: torch.stack([text_maps[name] for text_maps in maps]).mean(0) for name in maps[0]}


def maps_of(model: Any, sequence: Tensor) -> dict[str, Tensor]:
    """Return the attention between blocks of a sequence (T,), by layer."""
    attention_maps = {}

    def attend(gate: BlockGate, seen: AttentionInputs) -> Tensor:
        attention_maps[gate.name] = attention_map(gate, seen)
        return attend_to_all(seen)

    read(model, sequence, attend)
    return attention_maps


def measure(
    piece: Piece, job: Job, place: str, tokens: Sequence[Sequence[int]], gates: Store[Any],
    trained: Sequence[Piece], maps: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Return the figures of one held-out sequence by layer, and losses.

    Attention mass has the name of a method, a number added to that of gates; the divergence of
    gates ``row_kl`` and a number before it, and losses that of ``loss_increase_nats``.
    """
    del job
    model: Any = model_with_gates(place, piece["kind"], piece["block_size"])
    tested = [digest_of(ids) for ids in tokens]
    trained_gates = [
        copies(load_block_gates(model, gates.load(gates_piece, tested=tested)))
        for gates_piece in trained
    ]
    fresh = [copies(block_gates(model), gates_piece["seed"]) for gates_piece in trained]
    methods: dict[str, Score] = {
        **{f"{GATE}{n}": partial(scores_by, gates=seed_gates)
           for n, seed_gates in enumerate(trained_gates)},
        STATIC: partial(static_scores, maps=maps), **scores_of(piece["kind"]),
    }  # fmt: skip
    sequence, figures = torch.tensor(tokens[int(piece.keys["n"])]), dict[str, list[float]]()

    def attend(gate: BlockGate, seen: AttentionInputs) -> Tensor:
        """Return the output of a layer, dense, after measuring what every method keeps there."""
        out, target = record(gate, seen)
        for name, every in ((GATE, trained_gates), (START, fresh)):
            for n, seed_gates in enumerate(every):
                figures.setdefault(f"{KL}.{name}{n}", []).append(
                    row_kl(seed_gates[gate.name], target)
                )
        mass = attention_mass(gate, seen)
        torch.manual_seed(1000 * int(piece.keys["n"]) + gate.layer)  # of the random rival
        for name, score in methods.items():
            mask = chosen(gate, score(gate, seen), piece["fraction"], len(sequence))
            figures.setdefault(name, []).append(kept_mass(mass, mask))
        rows = None
        if gate.kind == "decode":
            rows = rows_of(len(sequence)) // gate.gate.block_size
        figures.setdefault("density", []).append(float(block_density(mask, rows)))
        return out

    figures[f"{LOSS}.{DENSE}"] = [nats(model, sequence, attend)]
    if fraction := piece["loss_fraction"]:
        for name, score in methods.items():
            less = partial(_sparse, score=score, fraction=fraction)
            figures[f"{LOSS}.{name}"] = [nats(model, sequence, less)]
    return {name: torch.tensor(values) for name, values in figures.items()}


def _sparse(gate: BlockGate, seen: AttentionInputs, score: Score, fraction: float) -> Tensor:
    return attend_to(gate, seen, score(gate, seen), fraction)


def copies(gates: Mapping[str, BlockGate], seed: int | None = None) -> dict[str, Any]:
    """Return copies of gates; with a seed, with the weights that their training began with."""
    made = {name: copy.deepcopy(gate.gate) for name, gate in gates.items()}
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for gate in made.values():
                gate.reset_parameters()
    return made


def row_kl(gate: AttnGate | DecodeAttnGate, own: Mapping[str, Tensor]) -> float:
    """Return the mean KL divergence per row, in nats, of a gate from its target."""
    skip = SKIPPED if isinstance(gate, AttnGate) else 0.0
    logits = logits_of(gate, own)
    return float(gate_distillation_loss(logits, own["target"], skip=skip, reduction="row"))


def nats(model: Any, sequence: Tensor, attend: Attend) -> float:
    """Return the cross-entropy of a sequence (T,) in nats per token of a model that attends so.

    The logits are those of the model itself, which may scale them.
    """
    with torch.inference_mode(), attending(model, attend):
        logits = model(sequence.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        return float(F.cross_entropy(logits, sequence[1:]))


def rows_of_kind(
    kind: Kind, names: Sequence[str], figures: Sequence[Mapping[str, Tensor]], measured: Measured
) -> list[Row]:
    """Return the rows of one kind of gates.

    Args:
        kind: Of the gates.
        names: Held-out documents.
        figures: Of each, see `measure`.
        measured: What was measured.
    """
    draws, task = Resamples.clusters(names), f"{kind}, {measured.fraction:.0%} of the blocks"
    means = {
        n: np.array([float(text_figures[n].mean()) for text_figures in figures]) for n in figures[0]
    }
    seeds = sum(name.startswith(f"{KL}.{GATE}") for name in means)

    def every(make: Callable[[str], Scores]) -> dict[str, list[Scores]]:
        gates = [make(f"{GATE}{n}") for n in range(seeds)]
        return {GATE: gates, **{name: [make(name)] for name in (STATIC, *scores_of(kind))}}

    rows = compare(every(lambda m: moments(means[m], name=MASS)), draws, task=task, reference=GATE)
    for oracle, metric in ((ORACLE, OF_ORACLE), (BY_SUM, OF_MOST)):
        of = partial(_of, means, oracle, metric)
        rows += compare(every(of), draws, task=task)
    rows.append(Row("all methods", task, "density", float(means["density"].mean())))
    divergences = {
        name: [moments(means[f"{KL}.{figure}{n}"], name=KL) for n in range(seeds)]
        for name, figure in ((GATE, GATE), (UNTRAINED, START))
    }
    rows += compare(divergences, draws, task=f"{kind}, distillation")
    if f"{LOSS}.{GATE}0" in means:
        more = {n: losses - means[f"{LOSS}.{DENSE}"] for n, losses in means.items()}
        named = f"{kind}, loss with {measured.loss_fraction:.0%} of the blocks"
        rows += compare(every(lambda m: moments(more[f"{LOSS}.{m}"], name=LOSS)), draws,
                        task=named, reference=GATE)  # fmt: skip
    return rows


def _of(means: Mapping[str, np.ndarray], oracle: str, metric: str, method: str) -> Scores:
    return moments(np.stack([means[method], means[oracle]], 1), ratio, name=metric)


def bars_of_kind(kind: Kind, rows: Sequence[Row], wanted: Bars) -> list[Bar]:
    """Return the bars of one kind of gates, from its rows."""
    row_of = {(row.method, row.metric): row for row in rows if not row.versus}
    bars = []
    if wanted.least_of_oracle is not None:
        of = row_of[GATE, OF_ORACLE].value
        bars.append(Bar(f"{kind}: mass over that of the oracle", of, ">=", wanted.least_of_oracle))
    for row in rows:
        if row.metric == MASS and row.versus and row.method in wanted.above:
            name = f"{kind}: {row.method} less the gate, upper end of the interval"
            bars.append(Bar(name, row.high, "<=", 0.0))
    if wanted.most_kl is not None:
        start = row_of[GATE, KL].value / row_of[UNTRAINED, KL].value
        bars.append(Bar(f"{kind}: row KL over its start", start, "<=", wanted.most_kl))
    if wanted.most_loss is not None and (GATE, LOSS) in row_of:
        more = row_of[GATE, LOSS].value
        bars.append(Bar(f"{kind}: increase of the loss", more, "<=", wanted.most_loss, "nats"))
    return bars


def headline(kind: Kind, rows: Sequence[Row]) -> str:
    """Return a sentence on the scores of gates, of a content-free map and of the best rival."""
    share = next(r for r in rows if (r.method, r.metric) == (GATE, OF_ORACLE))
    gaps = {r.method: r for r in rows if (r.metric, r.versus) == (MASS, GATE)}
    best = max(gaps.keys() - {ORACLE, BY_SUM}, key=lambda method: gaps[method].value)
    verdict = "Content adds"
    if gaps[STATIC].high >= 0:
        verdict = "They are not above a map without content:"
    return (
        f"Gates for {kind} hold {share.value:.1%} of the attention that the oracle holds"
        f" [{share.low:.1%}, {share.high:.1%}]. {verdict} {_more(gaps[STATIC])} of all attention,"
        f" next to the static map; from the best rival, {best}, gates differ by"
        f" {_more(gaps[best])}."
    )


def _more(gap: Row) -> str:
    """Return what gates hold more than a method."""
    return f"{-gap.value:+.2%} [{-gap.high:+.2%}, {-gap.low:+.2%}]"
