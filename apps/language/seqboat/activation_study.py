"""What activation earns: learned gates next to all tokens, none, and as many at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from apps.language.seqboat.pieces import (
    DENSITY,
    LOGITS,
    Places,
    Study,
    data_of,
    density_rows,
    hits,
    scored,
    trained_model,
)
from harness.evidence import Resamples, Row, compare, moments
from harness.experiment import Job, Piece, Store
from language.seqboat.sequences import SequenceData, SequenceLoader

LEARNED, ALWAYS, NEVER, RANDOM = "learned", "always", "never", "random"
ACCURACY, FLOPS = "accuracy", "MFLOPs of matmuls a sequence"
DENSITIES = "model.model.init_args.densities"
LAYERS = "model.model.init_args.num_layers"
COUNTED = 32  # test sequences, spread over all, whose arithmetic is counted
NOTE = (
    "Every row is trained under its rule, with the same seeds, order, steps and learning rate. "
    "Random activates as many tokens of each layer as learned does on validation. The arithmetic "
    "is that of matmuls; the averages, which are transforms, cost the same in all rows."
)


class ActivationStudy(Study):
    """Models of one configuration that differ in which tokens attend."""

    kind, needs = SequenceData, "activation needs labeled sequences"

    def finish(self) -> Path:
        """Make what is missing, compare, and write ``scores.json``."""
        layers = self.run.settings[LAYERS]
        made = {LEARNED: self._made(LEARNED, None)}
        if made[LEARNED]:
            mean = torch.stack([one["validation"] for one in made[LEARNED]]).mean(0)
            drawn = [round(float(density), 3) for density in mean]
            rules = {ALWAYS: [1.0] * layers, RANDOM: drawn, NEVER: [0.0] * layers}
            made |= {name: self._made(name, densities) for name, densities in rules.items()}
        labels = self.data.part("test").labels
        scores = {
            name: [moments(hits(one[LOGITS], labels), name=ACCURACY) for one in seeds]
            for name, seeds in made.items()
            if seeds
        }
        draws = Resamples.clusters(self.data.part("test").names)
        reference = LEARNED if LEARNED in scores else None
        rows = compare(scores, draws, task="test", reference=reference)
        for name, seeds in made.items():
            rows += density_rows(name, seeds)
            flops = [float(one[FLOPS]) for one in seeds]
            rows += [Row(name, "cost", FLOPS, fmean(flops)) for _ in flops[:1]]
        return self.finish_with(rows, headline(rows), [NOTE])

    def _made(self, name: str, densities: Sequence[float] | None) -> list[Mapping[str, Tensor]]:
        """Return the scores of a row, one a seed; none where they are left out."""
        rule = {} if densities is None else {DENSITIES: list(densities)}
        pieces = [
            Piece(name, seed, settings={**self.run.settings, **rule, "seed": seed})
            for seed in self.seeds
        ]
        return self.scores_of(pieces, score)


def score(piece: Piece, job: Job, places: Places, weights: Store[Any]) -> dict[str, Tensor]:
    """Return logits (N, classes), densities (layers,) of test and validation, and arithmetic ()."""
    del job
    data = data_of(piece.settings, places)
    model = trained_model(piece, weights, data)
    made = scored(model, data, "test")
    made["validation"] = scored(model, data, "validation")[DENSITY]
    part = data.part("test")
    every = max(1, len(part.inputs) // COUNTED)
    few = part._replace(inputs=part.inputs[::every], labels=part.labels[::every])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for batch in SequenceLoader(few, 1):
            model(batch.x)
    made[FLOPS] = torch.tensor(counter.get_total_flops() / len(few.inputs) / 1e6)
    return made


def headline(rows: Sequence[Row]) -> str:
    """Return a sentence on what learned gates gain over each rule."""
    value = {r.method: r.value for r in rows if r.metric == ACCURACY and not r.versus}
    if LEARNED not in value:
        return "Learned gates are not trained."
    gaps = {r.method: r for r in rows if r.metric == ACCURACY and r.versus == LEARNED}
    words = {
        name: "ahead of" if gap.significant and gap.low > 0
        else "below" if gap.significant and gap.high < 0
        else "level with"
        for name, gap in gaps.items()
    }  # fmt: skip
    said = [f"{name} ({value[name]:.3f}) is {how} them" for name, how in words.items()]
    return f"Learned gates have accuracy {value[LEARNED]:.3f}; {', '.join(said)}."
