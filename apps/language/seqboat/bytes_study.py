"""Bytes: SeqBoat next to a decoder of its size, counts that learn from the text, and PPMd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apps.language.byte_scores import (
    BASELINES,
    DECODER,
    METRIC,
    NOTE,
    ORDERS,
    SEQBOAT,
    TASK,
    TOLD_MORE,
    bits_of,
    rival_pieces,
    score_rival,
    scored,
    weighed,
)
from apps.language.seqboat.activation_figure import add_picture
from apps.language.seqboat.pieces import (
    MODEL,
    RATE,
    Places,
    Study,
    as_large,
    data_of,
    density_of,
    density_rows,
    module_of,
    size_of,
    train,
    trained_model,
)
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Arrays, Job, Piece, Store
from harness.report.page import Page
from language.data import LanguageDataModule
from language.scoring import bits_per_byte, ratio
from language.seqboat.sequence_model import recorded

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)
TRIAL_STEPS, VALIDATED = 200, 10  # of 10 batches of validation windows, a trial reads one
HEAD, UNIT = 32, 8  # features of a head; of the networks, a number that processors like
STEPS, ARGUMENTS = "trainer.max_steps", f"{MODEL}init_args."
SHOWN = 64  # bytes of a picture
CAPTION = "The first bytes of a test file; the probability is the mean of that of the next byte."
EQUAL = (
    "SeqBoat and decoder have {:,} and {:,} weights, the same windows in the same order, optimizer "
    "and steps. The learning rate of each has the smallest loss of {} on validation windows, after "
    "{} steps. Both know half a window at least, and nothing before the window."
)


class BytesStudy(Study):
    """SeqBoat of bytes on files that it has not seen."""

    kind, needs = LanguageDataModule, "bytes needs a corpus"

    def finish(self) -> Path:
        """Make what is missing, compare, and write ``scores.json``."""
        run, places, documents = self.run, self.places, scored(self.data)[0]
        own = {SEQBOAT: {}, DECODER: decoder_settings(run.settings, self.data.context)}
        few = min(TRIAL_STEPS, max(1, run.settings.get(STEPS) or 1))
        shorter: dict[str, Any] = {STEPS: few}
        choices = run.tune(
            {method: [{RATE: rate} for rate in RATES] for method in own},
            partial(trial, places=places),
            trials=len(RATES), own=own, ticks=few, unit="steps", **shorter,
        )  # fmt: skip
        pieces = [
            Piece(method, seed, settings={**run.settings, **own[method], **choice.setting,
                                          "seed": seed})
            for method, choice in choices.items()
            for seed in self.seeds
        ]  # fmt: skip
        made = self.scores_of(pieces, score, ticks="steps", parts=len(documents))
        rivals = rival_pieces(run.settings["data.digest"], self.data.context)
        for piece in rivals:
            run.obtain(
                run.store(BASELINES, Arrays()), [piece], partial(score_rival, places=places),
                scoring=True,
            )  # fmt: skip
        bits = bits_of(run, rivals, pieces)
        rows = compare(
            {m: [moments(one, ratio, name=METRIC) for one in some] for m, some in bits.items()},
            Resamples.clusters([document.name for document in documents]),
            task=TASK, reference=SEQBOAT if SEQBOAT in bits else None,
        )  # fmt: skip
        rows += density_rows(SEQBOAT, [one for one in made if SEQBOAT in one])
        sizes = [size_of({**run.settings, **some}) for some in own.values()]
        notes = [NOTE, EQUAL.format(*sizes, len(RATES), few), *weighed(bits)]
        return self.finish_with(rows, headline(rows), notes)

    def add_to(self, page: Page) -> None:
        """Add the first bytes of a test file, with those that attend in each layer."""
        document, seed = scored(self.data)[0][0], self.seeds[0]
        x = self.data.shards.tokenizer.encode(document.text)[:SHOWN]
        for choice in self.run.chosen([SEQBOAT], budget=[STEPS]).values():
            settings = {**self.run.settings, **choice.setting, "seed": seed}
            add_picture(
                page, self, Piece(SEQBOAT, seed, settings=settings), x,
                [repr(bytes([byte]))[2:-1] for byte in x], "text", CAPTION,
                lambda chances: (
                    f"{document.name}: the first {len(x)} bytes",
                    chances[np.arange(len(x) - 1), x[1:]].mean(),
                ),
            )  # fmt: skip


def decoder_settings(settings: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return what differs in a configuration whose SeqBoat becomes a decoder.

    It has as many blocks as SeqBoat has layers, and networks that make it as large.
    """
    dim = settings[f"{ARGUMENTS}front.init_args.dim"]
    heads = max(1, dim // HEAD)
    arguments = {
        "vocab_size": settings[f"{ARGUMENTS}outputs"], "dim": dim,
        "num_layers": settings.get(f"{ARGUMENTS}num_layers", 4), "num_heads": heads,
        "num_kv_heads": heads // 2 or 1, "context": context, "qk_norm": True,
        "tie_embeddings": True,
    }  # fmt: skip
    own = dict.fromkeys(name for name in settings if name.startswith(MODEL))
    own |= {f"{ARGUMENTS}{name}": value for name, value in arguments.items()}
    own[f"{MODEL}class_path"] = "language.decoder.Decoder"
    return as_large(settings, own, f"{ARGUMENTS}hidden_dim", UNIT)


def trial(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Return the bits per token of one setting on validation windows."""
    model = module_of(piece.settings).model
    model.load_state_dict(train(piece, job, places, ticks="steps"))
    batches = [*data_of(piece.settings, places).val_dataloader()][::VALIDATED]
    with torch.no_grad():
        nats = [
            F.cross_entropy(model.eval()(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten())
            for some in batches
        ]
    return {"score": float(torch.stack(nats).mean()) / math.log(2)}


def score(piece: Piece, job: Job, places: Places, weights: Store[Any]) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of every scored document, and the density of the layers."""
    data = data_of(piece.settings, places)
    model: Any = trained_model(piece, weights, data)
    bits = []
    with recorded(model) as passes:
        for document in scored(data)[0]:
            bits.append(bits_per_byte(model, data.shards.tokenizer, [document],
                                      context=data.context))  # fmt: skip
            job.tick()
    return {piece.method: torch.from_numpy(np.concatenate(bits)), **density_of(passes)}


def headline(rows: Sequence[Row]) -> str:
    """Return a sentence on who needs fewer bits than SeqBoat, and who more."""
    value = {r.method: r.value for r in rows if r.metric == METRIC and not r.versus}
    if SEQBOAT not in value:
        return "SeqBoat is not trained."
    groups: dict[str, list[str]] = {"fewer": [], "more": [], "about as many": []}
    for row in rows:
        if row.versus == SEQBOAT and row.method not in ORDERS[:-1]:
            kind = "about as many" if not row.significant else "fewer" if row.high < 0 else "more"
            told = ", told more" * (row.method in TOLD_MORE)
            groups[kind].append(f"{row.method} ({value[row.method]:.3f}{told})")
    said = [f"{kind}: {', '.join(some)}" for kind, some in groups.items() if some]
    return f"SeqBoat needs {value[SEQBOAT]:.3f} bits per byte; {'; '.join(said)}."
