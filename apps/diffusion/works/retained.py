"""What is left of each adapter of a pair, as a piece of work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from apps.diffusion.works.losses import (
    MOST,
    RUN,
    TIMES,
    fusion_of,
    note_trained,
    observed_by,
    seed_of,
)
from apps.diffusion.works.pictures import images_of
from apps.diffusion.works.tasks import Bench, combinations
from diffusion.data.concepts import caption_of, rows_of, style, styles_of, subject
from diffusion.evaluation.fusion import fixed_losses
from diffusion.lora_file import load_lora
from diffusion.rivals.registry import make_rival
from harness.experiment import Job, Piece


def retained(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, Tensor]:
    """Return how the loss of the concept of each adapter changes when the other one joins it.

    Returns:
        ``ratios`` (P, 2): logarithm of the loss in the fused model over that with the adapter
        alone, of unseen drawings of the subject, then of the style.
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder, drawings_folder)
    group, model = combinations(piece["group"]), bench.base.transformer
    library = {name: load_lora(file) for name, file in files.items()}
    observed = observed_by(piece, bench, group)
    found = torch.empty(len(group), 2)
    for place, one in enumerate(group):
        adapters = {name: library[name] for name in one.adapters}
        fusion = fusion_of(
            bench, piece["rival"], piece["settings"], adapters, trained.get(piece.name),
            observed[place],
        )  # fmt: skip
        for number, concept in enumerate((subject(one.subject), style(one.styles[0]))):
            rows = rows_of(bench.drawings, concept, "test")[:MOST]
            styles = styles_of(concept)
            latents = bench.base.latents(images_of(bench.drawings, rows, styles))
            text = bench.text.encode(
                [caption_of(str(caption), styles) for caption in bench.drawings.captions[rows]]
            )
            alone = make_rival("sum", model, {concept.name: library[concept.name]})
            own, fused = (
                fixed_losses(
                    model, way, latents, text, steps=TIMES, run=RUN, seed=seed_of(one.name)
                )
                for way in (alone, fusion)
            )
            found[place, number] = (fused.mean() / own.mean()).log()
        job.tick()
    return {"ratios": found}
