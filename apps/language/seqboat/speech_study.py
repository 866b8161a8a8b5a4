"""Spoken digits or words: SeqBoat next to one label, a regression and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apps.language.seqboat.pieces import (
    DATA,
    LOGITS,
    MODEL,
    RATE,
    Places,
    Study,
    as_large,
    data_of,
    density_rows,
    hits,
    module_of,
    score,
    scored,
    size_of,
    train,
)
from core_gates.errors import GatesError
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Job, Piece, Run
from language.seqboat.listops import majority
from language.seqboat.speech import SpeechData, read_speech
from language.seqboat.speech_rivals import regression, spectrograms

SEQBOAT, CONVOLUTION, SPECTROGRAM, MAJORITY = "seqboat", "convolution", "spectrogram", "majority"
ACCURACY = "accuracy"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
NETWORK = "language.seqboat.speech_rivals.ConvolutionNetwork"
TRIAL_EPOCHS = 10
NOTE = (
    "All hear the same samples, cut at the same length. Seqboat and convolution share front end, "
    "shifts and gains, optimizer, epochs and about their number of weights, {:,} and {:,}. The "
    "learning rate of each, and the strength of the regression on the log spectrogram, has the "
    "smallest loss of five on {chosen}. Majority always gives the most frequent training label."
)
OF_DIGITS = "recordings 45 to 49 of all speakers; those of the training speakers choose the epoch"
OF_WORDS = "15 in 100 recordings of each word, which choose the epoch, too"
OF_SPEAKERS = (
    "Each speaker is left out once: all their recordings test, and none trains a network or "
    "chooses its epoch. Intervals are over speakers."
)


class SpeechStudy(Study):
    """Methods of one configuration on recordings, by recording or by speaker.

    Args:
        run: Keeps what is trained and scored.
        data: The recordings.
        seeds: Of every method that is trained by gradient descent.
        speakers: Whether one speaker at a time is left out.

    Raises:
        GatesError: The data are no recordings, or name no speakers to be left out.
    """

    kind, needs = SpeechData, "speech needs recordings"

    def __init__(self, run: Run, data: object, seeds: Sequence[int], *, speakers: bool) -> None:
        super().__init__(run, data, seeds, "fit" if speakers else "test")
        names = sorted({one.speaker for one in read_speech(self.data.folder, self.data.rate)})
        if speakers and len(names) < 2:
            raise GatesError(
                f"{self.data.folder} has recordings of one speaker alone: give those of another "
                "one, or leave out --speakers"
            )
        self.held_out: Sequence[str | None] = names if speakers else [self.data.held_out]
        self.parts = {name: self._data(name) for name in self.held_out}
        for one in self.parts.values():
            one.setup("test")

    def finish(self) -> Path:
        """Make what is missing, compare, and write ``scores.json``."""
        run, work = self.run, partial(trial, places=self.places)
        methods = {SEQBOAT: {}, CONVOLUTION: convolution_settings(run.settings), SPECTROGRAM: {}}
        spaces: dict[str, list[dict[str, Any]]] = {
            SEQBOAT: [{RATE: rate} for rate in RATES],
            CONVOLUTION: [{RATE: rate} for rate in RATES],
            SPECTROGRAM: [{"strength": strength} for strength in STRENGTHS],
        }
        epochs = min(TRIAL_EPOCHS, run.settings.get("trainer.max_epochs") or 1)
        shorter: dict[str, Any] = {"trainer.max_epochs": epochs}
        choices = run.tune(
            spaces, work, trials=len(RATES), own=methods, ticks=epochs, unit="epochs", **shorter
        )
        made: dict[str, list[list[Mapping[str, Tensor]]]] = {}
        for method, choice in choices.items():
            networks = method != SPECTROGRAM
            pieces = [
                self._piece(method, seed, name, {**methods[method], **choice.setting})
                for seed in (self.seeds if networks else [None])
                for name in self.held_out
            ]
            every = self.scores_of(
                pieces,
                score if networks else score_regression,
                ticks="epochs" if networks else None,
            )
            count = len(self.held_out)
            made[method] = [every[n : n + count] for n in range(0, len(every), count)]
        return self._compare(made)

    def _piece(
        self, method: str, seed: int | None, speaker: str | None, settings: Mapping[str, Any]
    ) -> Piece:
        keys: dict[str, str | int | float] = {} if speaker is None else {"without-": speaker}
        merged = {**self.run.settings, **settings, f"{DATA}held_out": speaker, "seed": seed}
        kept = {name: value for name, value in merged.items() if value is not None}
        return Piece(method, seed, keys, kept)

    def _compare(self, made: Mapping[str, Sequence[Sequence[Mapping[str, Tensor]]]]) -> Path:
        tests = [data.part("test") for data in self.parts.values()]
        firsts = [majority(data.part("train"), data.part("test")) for data in self.parts.values()]
        labels, right = [part.labels for part in tests], {MAJORITY: [np.concatenate(firsts)]}
        for method, seeds in made.items():
            right[method] = [
                np.concatenate([hits(s[LOGITS], y) for s, y in zip(some, labels, strict=True)])
                for some in seeds
            ]
        by_speaker = len(self.held_out) > 1
        units = [
            str(speaker) if by_speaker else name
            for speaker, part in zip(self.held_out, tests, strict=True)
            for name in part.names
        ]
        scores = {m: [moments(one, name=ACCURACY) for one in every] for m, every in right.items()}
        task = "speakers never heard" if by_speaker else "recordings never heard"
        rows = compare(
            scores, Resamples.clusters(units), task=task,
            reference=SEQBOAT if SEQBOAT in scores else None,
        )  # fmt: skip
        if by_speaker:
            places = np.array(units)
            rows += [
                Row(m, f"speaker {s}", ACCURACY, fmean(one[places == s].mean() for one in every))
                for m, every in right.items()
                for s in self.held_out
            ]
        rows += density_rows(SEQBOAT, [s for some in made.get(SEQBOAT, ()) for s in some])
        chosen = OF_WORDS if "/" in tests[0].names[0] else OF_DIGITS
        others = (dict[str, Any](), convolution_settings(self.run.settings))
        sizes = [size_of({**self.run.settings, **own}) for own in others]
        notes = [NOTE.format(*sizes, chosen=chosen), *[OF_SPEAKERS] * by_speaker]
        return self.finish_with(rows, headline(rows, task), notes)

    def _data(self, speaker: str | None) -> SpeechData:
        data: SpeechData = data_of({**self.run.settings, f"{DATA}held_out": speaker}, self.places)
        return data


def convolution_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs in a configuration whose SeqBoat becomes a convolutional network.

    It gets as many layers as come nearest to the same number of weights.
    """
    kept = (f"{MODEL}init_args.front.", f"{MODEL}init_args.outputs", f"{MODEL}init_args.dropout")
    own = {n: None for n in settings if n.startswith(MODEL) and not n.startswith(kept)}
    own[f"{MODEL}class_path"] = NETWORK  # type: ignore[assignment]
    return as_large(settings, own, f"{MODEL}init_args.num_layers")


def trial(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Return the cross-entropy, in nats, of one setting on the validation recordings."""
    data = data_of(piece.settings, places)
    if piece.get("strength") is not None:
        fitted = regression(data.part("train"), data.length, piece["strength"])
        chances = fitted.predict_log_proba(spectrograms(data.part("validation"), data.length))
        logits = torch.from_numpy(chances)
    else:
        model = module_of(piece.settings).model
        model.load_state_dict(train(piece, job, places))
        logits = scored(model.eval(), data, "validation")[LOGITS]
    labels = torch.from_numpy(data.part("validation").labels)
    return {"score": float(cross_entropy(logits, labels))}


def score_regression(piece: Piece, job: Job, places: Places, weights: object) -> dict[str, Tensor]:
    """Return the logits (N, classes) of the regression on test recordings."""
    del weights
    data = data_of(piece.settings, places)
    job.note(objects=data.training_objects())
    fitted = regression(data.part("train"), data.length, piece["strength"])
    return {
        LOGITS: torch.from_numpy(
            fitted.predict_log_proba(spectrograms(data.part("test"), data.length))
        )
    }


def headline(rows: Sequence[Row], task: str) -> str:
    """Return a sentence on who is most often right."""
    shown = [r for r in rows if r.task == task and not r.versus and r.metric == ACCURACY]
    gaps = {r.method: r for r in rows if r.task == task and r.versus == SEQBOAT}
    ranked = sorted(shown, key=lambda row: -row.value)
    listed = ", ".join(f"{row.method} {row.value:.3f}" for row in ranked)
    ahead = [n for n, gap in gaps.items() if gap.low > 0 and gap.p < 0.05]
    behind = [n for n, gap in gaps.items() if gap.high < 0 and gap.p < 0.05]
    said = [f"{' and '.join(ahead)} beat SeqBoat"] if ahead else []
    said += [f"SeqBoat beats {' and '.join(behind)}"] if behind else []
    return f"On {task}: {listed}; {'; '.join(said) or 'no difference is clear'}."
