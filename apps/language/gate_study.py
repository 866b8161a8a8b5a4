"""Decoders that differ in the gate of their attention alone: trained from scratch and compared."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from apps.language.byte_scores import (
    METRIC,
    PLACES,
    SCORES,
    TASK,
    WEIGHTS,
    Places,
    data_of,
    module_of,
    train_decoder,
)
from core_gates.attention.head_gate import Granularity
from core_gates.attention.output_gate import Position
from core_gates.errors import GatesError
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece, Run, Store
from language.corpus import Document
from language.data import LanguageDataModule
from language.decoder import Decoder
from language.gated.diagnostics import decoder_diagnostics
from language.scoring import bits_per_byte, ratio, scored_part
from language.seer.sparse_decoder import READINGS

OPTIONS = "model.model.init_args"
NONE = "none"
PLACED = tuple(place for place in get_args(Position) if place != NONE)
LETTERS = 2000  # of a held-out document that are scored
BATCH = 16
LARGEST = "largest_activation"
SECONDS = "microseconds of a byte"
TRAINED: dict[str, dict[str, Any]] = {"dense": {"dense_steps": 2**31}, "sparse": {}}
FIGURES = ("first_token_attention", LARGEST, "gate_mean", SECONDS)
NOTE = (
    "Where a gate is added, the networks after attention are narrower, so that all decoders have "
    "about the same number of weights. Seeds, order of the data, steps and learning rates are the "
    "same. Of every held-out document the first 2,000 letters are scored, and attention is "
    "measured on the first {context} tokens."
)

READ_BY_BLOCKS = (
    "dense has read everything in training, sparse few blocks from half of it on; gates learned "
    "alongside both. Seeds, weights at the start, data and steps are the same. Each is read by "
    "several rules, all but 'all' with as many blocks. What pools queries, 'gate' and "
    "'sink-mean-pool', chooses by later bytes of a block, too. Of every held-out document twice "
    "{context} letters are scored; microseconds are those of a processor, of windows of {context}."
)


def gate_options(name: str) -> dict[str, Any]:
    """Return the options of a decoder by the name of its gate, such as ``G1 headwise``.

    A `SparseDecoder` is ``sparse``, or ``dense``: it reads everything while it is trained.

    Raises:
        GatesError: There is no such gate.
    """
    if name in TRAINED:
        return TRAINED[name]
    position, _, granularity = name.partition(" ")
    if position == NONE and not granularity:
        return {"attention_gate": None, "granularity": None}
    if position not in PLACED or granularity not in get_args(Granularity):
        raise GatesError(
            f"--gates names {name!r}, expected {NONE}, {', '.join(TRAINED)}, or one of"
            f" {', '.join(PLACED)} and {' or '.join(get_args(Granularity))}, such as 'G1 headwise'"
        )
    return {"attention_gate": position, "granularity": granularity}


def weights_of(settings: Any) -> tuple[int, int]:
    """Return the number of weights of a decoder, and of those in gates."""
    with torch.device("meta"):
        model = module_of(settings).model
    gates = [part for b in model.blocks for part in (b.self_attn.gate, b.self_attn.attend)]
    inside = sum(p.numel() for gate in gates if gate is not None for p in gate.parameters())
    return sum(p.numel() for p in model.parameters()), inside


def beginnings(data: LanguageDataModule) -> list[Document]:
    """Return the beginnings of the held-out documents that are scored, a context long at least."""
    most = max(LETTERS, 2 * data.context)
    shown = [Document(document.name, document.text[:most]) for document in data.held_out(TASK)]
    documents, _ = scored_part(data.shards.tokenizer, shown, 2 * data.context)
    return documents


def train_gated(piece: Piece, job: Job, places: Places) -> dict[str, Tensor]:
    """Train one decoder, of no family of transformers, and return its state."""
    return train_decoder(piece, job, places)[0].state_dict()


def read_trained(piece: Piece, places: Places, weights: Store[Any]) -> tuple[Decoder, Any]:
    """Return a trained decoder and the data, whose held-out documents it has not seen."""
    data, model = data_of(piece.settings, places), module_of(piece.settings).model
    model.load_state_dict(weights.load(piece, tested=data.shards.part(TASK).objects))
    return model, data


def score_gated(piece: Piece, job: Job, places: Places, weights: Store[Any]) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of every scored document, and figures of attention (N,)."""
    del job
    model, data = read_trained(piece, places, weights)
    documents, tokenizer = beginnings(data), data.shards.tokenizer
    bits = bits_per_byte(model, tokenizer, documents, context=data.context)
    rows = [[tokenizer.end, *tokenizer.encode(document.text).tolist()] for document in documents]
    tokens = torch.tensor([row[: data.context] for row in rows])
    diagnostics = [decoder_diagnostics(model, some) for some in tokens.split(BATCH)]
    layers = {
        name: torch.cat([batch_diagnostics[name] for batch_diagnostics in diagnostics])
        for name in diagnostics[0]
    }
    means = {n: v.amax(1) if n == LARGEST else v.mean(1) for n, v in layers.items()}
    return {METRIC: torch.from_numpy(bits), **means}


def score_sparse(piece: Piece, job: Job, places: Places, weights: Store[Any]) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of every scored document, and microseconds (N,), by reading."""
    del job
    model, data = read_trained(piece, places, weights)
    found = defaultdict[str, list[Any]](list)
    for document in beginnings(data):
        for name in READINGS:
            for block in model.blocks:
                block.self_attn.attend.reading = name  # type: ignore[union-attr, assignment]
            start, scored = time.process_time(), (model, data.shards.tokenizer, [document])
            found[f"{name}/{METRIC}"] += [
                *bits_per_byte(*scored, context=data.context, batch_size=1)
            ]
            spent = (time.process_time() - start) / len(document.text)
            found[f"{name}/{SECONDS}"].append(1e6 * spent)
    return {name: torch.from_numpy(np.stack(values)) for name, values in found.items()}


class GateStudy:
    """Decoders of a configuration with one gate each, scored on its held-out documents.

    Args:
        run: Keeps what is trained and scored; its settings get the digest of the data.
        data: The corpus, read.
        seeds: Of every decoder.
        gates: Names of gates, the first of which is compared with.

    Raises:
        GatesError: There is no such gate.
    """

    def __init__(
        self, run: Run, data: LanguageDataModule, seeds: Sequence[int], gates: Sequence[str]
    ) -> None:
        run.settings["data.digest"] = [file.sha256 for file in data.digest()] or None
        self.run, self.data, self.seeds, self.gates = run, data, seeds, gates
        self.places = {name: getattr(data, name) for name in PLACES}
        self.settings = {name: self._settings(name) for name in gates}

    def _settings(self, name: str) -> dict[str, Any]:
        """Return the settings of decoders with a gate, as large as those of the configuration."""
        settings = dict(self.run.settings)
        settings |= {f"{OPTIONS}.{n}": value for n, value in gate_options(name).items()}
        hidden, dim = (settings[f"{OPTIONS}.{n}"] for n in ("hidden_dim", "dim"))
        inside = 0 if name in TRAINED else weights_of(settings)[1]
        layers = settings[f"{OPTIONS}.num_layers"]
        settings[f"{OPTIONS}.hidden_dim"] = hidden - round(inside / layers / (3 * dim))
        return settings

    def pieces(self, name: str) -> list[Piece]:
        """Return the decoders with a gate, one a seed."""
        settings = self.settings[name]
        return [Piece(name, seed, settings={**settings, "seed": seed}) for seed in self.seeds]

    def finish(self, *, train: bool) -> Path:
        """Make what is missing, compare, and write ``scores.json``.

        Args:
            train: Whether missing decoders are trained.
        """
        run, gates = self.run, self.gates
        weights, scores = run.store(WEIGHTS, Arrays()), run.store(SCORES, Arrays())
        wanted = [piece for name in gates for piece in self.pieces(name)]
        unscored = scores.missing(wanted)  # the others need no decoder
        trained = run.obtain(
            weights, unscored, partial(train_gated, places=self.places),
            ticks=max(1, run.settings.get("trainer.max_steps") or 0), unit="steps",
            leave_out=not train,
        )  # fmt: skip
        work = score_sparse if TRAINED.keys() & {*gates} else score_gated
        run.obtain(scores, trained, partial(work, places=self.places, weights=weights))
        scored = [piece for piece in wanted if piece not in unscored] + trained
        rows = self._rows(scores_by_method(scores, {n: self.pieces(n) for n in gates}, scored))
        said = [sentence(row) for row in rows if row.versus and row.metric == METRIC]
        note = NOTE if work is score_gated else READ_BY_BLOCKS
        notes = [note.format(context=self.data.context), self._sizes()]
        return run.finish(
            rows, seeds=self.seeds, data=self.data.digest(), headline=" ".join(said), notes=notes
        )

    def _rows(self, scores_of: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> list[Row]:
        """Return every figure, and by how much it differs from that of the first method."""
        draws = Resamples.clusters([document.name for document in beginnings(self.data)])
        first, rows = next(iter(scores_of)), list[Row]()
        for metric in (METRIC, *FIGURES) if scores_of[first] else ():
            transform = ratio if metric == METRIC else None
            scores = {
                name: [
                    moments(seed_scores[metric].numpy(), transform, name=metric)
                    for seed_scores in every
                ]
                for name, every in scores_of.items()
                if every and metric in every[0]
            }
            reference = first if first in scores else None
            rows += compare(scores, draws, task=TASK, reference=reference) if scores else []
        lacking = [name for name, every in scores_of.items() if not every or not rows]
        note = "not compared: training is asked for by --train"
        return rows + [Row(name, TASK, METRIC, np.nan, note=note) for name in lacking]

    def _sizes(self) -> str:
        """Return how many weights each decoder has, and how many of them in gates."""
        sizes = {name: weights_of(self.settings[name]) for name in self.gates}
        listed = [
            f"{name} {every:,}, {inside:,} in gates" for name, (every, inside) in sizes.items()
        ]
        return f"Weights: {'; '.join(listed)}."


def scores_by_method(
    scores: Store[Any], wanted: Mapping[str, Sequence[Piece]], scored: Sequence[Piece]
) -> dict[str, list[Any]]:
    """Return what has been measured, a mapping for each seed, by gate, and by reading if any."""
    found: dict[str, list[Any]] = {}
    for name, pieces in wanted.items():
        every = [scores.load(piece) for piece in pieces if piece in scored]
        readings = dict.fromkeys(key.rpartition("/")[0] for key in (every or [{"": 0}])[0])
        for reading in readings:
            found[f"{name}, {reading}" if reading else name] = [
                {key.removeprefix(f"{reading}/"): of_seed[key] for key in of_seed
                 if key.rpartition("/")[0] == reading}
                for of_seed in every
            ]  # fmt: skip
    return found


def sentence(row: Row) -> str:
    """Return a difference in words."""
    unclear = "" if row.significant else ", not distinguishable"
    return (
        f"{row.method} needs {row.value:+.3f} [{row.low:+.3f}, {row.high:+.3f}] bits per byte next"
        f" to {row.versus}{unclear}."
    )
