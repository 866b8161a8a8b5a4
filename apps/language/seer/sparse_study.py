"""Decoders trained with attention to everything, or to few blocks from half of the training on."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.language.byte_scores import METRIC, Places, data_of, module_of
from apps.language.gate_study import OPTIONS, SECONDS, TASK, Figures, GateStudy, beginnings
from core_gates.errors import GatesError
from harness.experiment import Job, Piece, Store
from language.scoring import bits_per_byte
from language.seer.sparse_decoder import READINGS

DENSE, SPARSE = "dense", "sparse"
DENSE_STEPS = f"{OPTIONS}.dense_steps"
NOTE = (
    "dense has read everything in training, sparse few blocks from half of it on; gates learned "
    "beside both. Seeds, weights at the start, data and steps are the same. Every model is read by "
    "each rule, all but 'all' with as many blocks. A rule that pools queries, 'gate' or "
    "'sink-mean-pool', chooses by later bytes of the block of 64, too. Of every held-out document "
    "the first {letters} letters are scored, in windows of {context}, and the seconds are those of "
    "such windows."
)


def score_sparse(piece: Piece, job: Job, places: Places, weights: Store[Any]) -> dict[str, Tensor]:
    """Return bits and bytes (N, 2) of every scored document, and microseconds, by rule."""
    del job
    data = data_of(piece.settings, places)
    model, tokenizer = module_of(piece.settings).model, data.shards.tokenizer
    model.load_state_dict(weights.load(piece, tested=data.shards.part(TASK).objects))
    scores: dict[str, list[Any]] = {}
    for document in beginnings(data):
        for name, reads in READINGS.items():
            for block in model.blocks:
                block.self_attn.attend.reads = reads  # type: ignore[union-attr]
            start = time.process_time()
            bits = bits_per_byte(model, tokenizer, [document], context=data.context, batch_size=1)
            spent = 1e6 * (time.process_time() - start) / len(tokenizer.encode(document.text))
            scores.setdefault(f"{name}/{METRIC}", []).append(bits[0])
            scores.setdefault(f"{name}/{SECONDS}", []).append(spent)
    return {name: torch.from_numpy(np.stack(values)) for name, values in scores.items()}


class SparseStudy(GateStudy):
    """Decoders of a configuration of a `SparseDecoder`, each read by several rules."""

    note, score = NOTE, staticmethod(score_sparse)

    def _settings(self, name: str) -> dict[str, Any]:
        """Return the settings of a decoder that is trained so."""
        settings = dict(self.run.settings)
        if name not in (DENSE, SPARSE):
            raise GatesError(f"--gates names {name!r}, expected {DENSE} or {SPARSE}")
        return settings | ({DENSE_STEPS: settings["trainer.max_steps"]} if name == DENSE else {})

    def _methods(self, scores: Store[Any], trained: Sequence[Piece]) -> Figures:
        """Return figures by training and rule."""
        found = super()._methods(scores, trained)
        return {
            f"{name}, {reading}": [
                {metric: seed[f"{reading}/{metric}"] for metric in (METRIC, SECONDS)}
                for seed in found[name]
            ]
            for name in self.gates
            for reading in READINGS
        }
