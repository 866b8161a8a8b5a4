"""Which blocks of keys hold the attention: distilled gates next to rivals that learn nothing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apps.language.diagnose import opened
from apps.language.distill import Distillation, Recipe, digest_of, model_with_gates
from core_gates.attention.seer.decode import DecodeAttnGate, block_density
from core_gates.attention.seer.gate import AttnGate, gate_distillation_loss
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece, Run, Store
from harness.files import Data
from language.corpus import read_corpus
from language.scoring import ratio
from language.seer.attach import BlockGate, Kind
from language.seer.attention import Seen
from language.seer.block_files import load_block_gates
from language.seer.distillation import SKIPPED
from language.seer.recording import logits_of, read, record, rows_of
from language.seer.rivals import (
    GATE,
    ORACLE,
    SCORES,
    attend_to,
    attention_mass,
    chosen,
    scores_of,
)

FIGURES = "figures"
MASS, OF_ORACLE, KL, LOSS = "attention_mass", "mass_of_oracle", "row_kl", "loss_increase_nats"
UNTRAINED = "untrained gate"
VERSION = 1
NOTE = (
    "Attention mass is the fraction of the attention of the base that lies in the chosen blocks, "
    "averaged over queries, heads and layers; every method chooses equally many, its own block "
    "among them. The oracle chooses by the largest attention in a block, which is known only after "
    "attention. Intervals are over documents."
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
    quick: bool = False,
    shipped: bool = True,
    overwrite: bool = False,
) -> None:
    """Distill gates where they are missing, and compare the blocks that they choose with rivals.

    Args:
        place: Filled in by the command line.
        model: See ``distill``.
        recipe: Filled in by the command line.
        measured: Filled in by the command line.
        bars: Filled in by the command line.
        kinds: Kinds of gates, ``prefill`` and ``decode``.
        corpus: Files, folders, or ``python``, of whose training and test documents the beginnings
            are read.
        quick: A quick run: nothing is trained, and there are no bars.
        shipped: Use gates that ship with the package where their settings agree.
        overwrite: Replace what was made with other settings.
    """
    recipe.check()
    measured.check()
    if not kinds or (unknown := set(bars.above) - set(scores_of("decode"))):
        what = f"--above names {', '.join(unknown)}" if kinds else "--kinds is empty"
        raise GatesError(
            f"{what}, expected prefill or decode, and {', '.join(scores_of('decode'))}"
        )
    run = Run(
        place.run_folder.path, app="language", config_path=place.config_path, package="language",
        shipped=shipped, overwrite=overwrite, quick=quick, seeds=(recipe.seed,),
        command=place.command,
    )  # fmt: skip
    found = opened(place, model)
    rows: list[Row] = []
    met: list[Bar] = []
    said, data = [], [Data.of(found.folder.name, "model", found.folder)]
    for kind in kinds:
        made = Distillation(run, found, model, corpus, kind, recipe)
        held = made.sequences(read_corpus(corpus).part("test"), measured.held_out)
        if len(held) < measured.held_out:
            raise GatesError(
                f"{len(held)} test documents have {recipe.context} tokens, --held_out is"
                f" {measured.held_out}: lower it, or give longer ones by --corpus"
            )
        figures = _figures(made, held, measured)
        own = rows_of_kind(kind, [*held], figures, measured)
        rows, met = rows + own, met + bars_of_kind(kind, own, bars)
        said.append(headline(kind, own))
    run.finish(rows, met, seeds=(recipe.seed,), data=data, headline=" ".join(said), notes=[NOTE])


def _figures(
    made: Distillation, held: Mapping[str, Sequence[int]], measured: Measured
) -> list[dict[str, Tensor]]:
    """Return the figures of every held-out sequence, which are measured where they are missing."""
    run, store = made.run, made.run.store(FIGURES, Arrays())
    if run.quick and made.gates.missing([made.piece]):
        raise GatesError("no gates are distilled yet and a quick run trains nothing: drop --quick")
    made.obtain()
    settings = {"gates": made.piece.fingerprint, "fraction": measured.fraction, "version": VERSION}
    settings["loss_fraction"] = measured.loss_fraction if made.kind == "prefill" else 0.0
    pieces = [
        Piece(made.kind, None, {"n": n}, {**made.base, **settings, "tokens": digest_of(one)})
        for n, one in enumerate(held.values())
    ]
    work = partial(
        measure, place=made.place, tokens=[*held.values()], gates=made.gates, trained=made.piece
    )
    run.obtain(store, pieces, work, scoring=True)
    return [store.load(piece) for piece in pieces]


def measure(
    piece: Piece, job: Job, place: str, tokens: Sequence[Sequence[int]], gates: Store[Any],
    trained: Piece,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the figures of one held-out sequence, by layer; loss by method."""
    del job
    model: Any = model_with_gates(place, piece["kind"], piece["block_size"])
    path = gates.load(trained, tested=[digest_of(one) for one in tokens])
    untrained = fresh_gates(load_block_gates(model, path), trained["seed"])
    sequence = torch.tensor(tokens[int(piece.keys["n"])])
    found: dict[str, list[float]] = {}

    def attend(gate: BlockGate, seen: Seen) -> Tensor:
        out, own = record(gate, seen)
        for name, one in ((KL, gate.gate), (f"{KL}.start", untrained[gate.name])):
            found.setdefault(name, []).append(row_kl(one, own))
        mass = attention_mass(gate, seen)
        torch.manual_seed(1000 * int(piece.keys["n"]) + gate.layer)  # of the random rival
        for name, score in scores_of(gate.kind).items():
            mask = chosen(gate, score(gate, seen), piece["fraction"], len(sequence))
            found.setdefault(name, []).append(kept_mass(mass, mask))
        rows = None
        if gate.kind == "decode":
            rows = rows_of(len(sequence)) // gate.gate.block_size
        found.setdefault("density", []).append(float(block_density(mask, rows)))
        return out

    states = read(model, sequence, attend)
    figures = {name: torch.tensor(values) for name, values in found.items()}
    if fraction := piece["loss_fraction"]:
        dense = nats(model, states, sequence)
        losses = [
            nats(model, read(model, sequence, partial(_sparse, score=score, fraction=fraction)),
                 sequence)
            for score in SCORES.values()
        ]  # fmt: skip
        figures["loss"] = torch.tensor([dense, *losses])
    return figures


def _sparse(gate: BlockGate, seen: Seen, score: Any, fraction: float) -> Tensor:
    return attend_to(gate, seen, score(gate, seen), fraction)


def fresh_gates(gates: Mapping[str, BlockGate], seed: int) -> dict[str, Any]:
    """Return copies of gates with the weights that their training began with."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, gate in gates.items():
            made[name] = copy.deepcopy(gate.gate)
            made[name].reset_parameters()
    return made


def row_kl(gate: AttnGate | DecodeAttnGate, own: Mapping[str, Tensor]) -> float:
    """Return the divergence of a row in nats from what a gate should predict."""
    skip = SKIPPED if isinstance(gate, AttnGate) else 0.0
    logits = logits_of(gate, own)
    return float(gate_distillation_loss(logits, own["target"], skip=skip, reduction="row"))


def kept_mass(mass: Tensor, mask: Tensor) -> float:
    """Return the attention in kept blocks, averaged over heads.

    Args:
        mass: Attention (1, H, R, N), which sums to 1 over a head.
        mask: Kept blocks (1, H or K, R, N).
    """
    mask = mask.repeat_interleave(mass.shape[1] // mask.shape[1], 1)
    return float((mass * mask).sum() / mass.shape[1])


def nats(model: Any, states: Tensor, sequence: Tensor) -> float:
    """Return the cross-entropy of a sequence (T,) in nats per token from its last states."""
    with torch.inference_mode():
        logits = model.get_output_embeddings()(states[:-1]).float()
        return float(F.cross_entropy(logits, sequence[1:]))


def rows_of_kind(
    kind: Kind, names: Sequence[str], figures: Sequence[Mapping[str, Tensor]], measured: Measured
) -> list[Row]:
    """Return the rows of one kind of gates.

    Args:
        kind: Of the gates.
        names: Held-out documents.
        figures: Of each, see :func:`measure`.
        measured: What was measured.
    """
    draws = Resamples.clusters(names)
    means = {n: np.array([float(one[n].mean()) for one in figures]) for n in figures[0]}
    methods, task = [*scores_of(kind)], f"{kind}, {measured.fraction:.0%} of the blocks"
    mass = {method: moments(means[method], name=MASS) for method in methods}
    rows = compare(mass, draws, task=task, reference=GATE)
    pairs = {m: np.stack([means[m], means[ORACLE]], 1) for m in methods if m != ORACLE}
    of_oracle = {m: moments(pair, ratio, name=OF_ORACLE) for m, pair in pairs.items()}
    rows += compare(of_oracle, draws, task=task)
    rows.append(Row("all methods", task, "density", float(means["density"].mean())))
    divergence = {GATE: means[KL], UNTRAINED: means[f"{KL}.start"]}
    divergences = {name: moments(values, name=KL) for name, values in divergence.items()}
    rows += compare(divergences, draws, task=f"{kind}, distillation")
    if "loss" in figures[0]:
        losses = np.stack([one["loss"].numpy() for one in figures])
        more = {m: moments(losses[:, i] - losses[:, 0], name=LOSS) for i, m in enumerate(SCORES, 1)}
        named = f"{kind}, loss with {measured.loss_fraction:.0%} of the blocks"
        rows += compare(more, draws, task=named, reference=GATE)
    return rows


def bars_of_kind(kind: Kind, rows: Sequence[Row], wanted: Bars) -> list[Bar]:
    """Return the bars of one kind of gates, from its rows."""
    found = {(row.method, row.metric): row for row in rows if not row.versus}
    bars = []
    if wanted.least_of_oracle is not None:
        of = found[GATE, OF_ORACLE].value
        bars.append(Bar(f"{kind}: mass over that of the oracle", of, ">=", wanted.least_of_oracle))
    for row in rows:
        if row.metric == MASS and row.versus and row.method in wanted.above:
            name = f"{kind}: {row.method} less the gate, upper end of the interval"
            bars.append(Bar(name, row.high, "<=", 0.0))
    if wanted.most_kl is not None:
        start = found[GATE, KL].value / found[UNTRAINED, KL].value
        bars.append(Bar(f"{kind}: row KL over its start", start, "<=", wanted.most_kl))
    if wanted.most_loss is not None and (GATE, LOSS) in found:
        more = found[GATE, LOSS].value
        bars.append(Bar(f"{kind}: increase of the loss", more, "<=", wanted.most_loss, "nats"))
    return bars


def headline(kind: Kind, rows: Sequence[Row]) -> str:
    """Return what gates reach, in a sentence."""
    own = next(r for r in rows if (r.method, r.metric) == (GATE, OF_ORACLE))
    rivals = [r for r in rows if r.metric == OF_ORACLE and r.method != GATE]
    best = max(rivals, key=lambda row: row.value)
    return (
        f"Gates for {kind} hold {own.value:.1%} of the attention that the oracle holds"
        f" [{own.low:.1%}, {own.high:.1%}]; the best rival, {best.method}, {best.value:.1%}."
    )
