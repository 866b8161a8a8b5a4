"""Images of combinations under one way to use several adapters, as pieces of work."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from apps.diffusion.works.losses import fusion_of, note_trained, observed_by, seed_of
from apps.diffusion.works.pictures import images_of
from apps.diffusion.works.tasks import Bench, combinations
from diffusion.data.concepts import rows_of, subject
from diffusion.lora_file import load_lora
from harness.experiment import Job, Piece


def fused_images(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, Tensor]:
    """Return images of the first drawings of each combination, made and true, uint8.

    Args:
        piece: Its method as for losses, with ``group``, ``part``, ``most``, ``steps`` and
            ``guidance``.
        job: Ticks once a combination.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        trained: Name of a piece -> folder of what was trained for it.
        drawings_folder: Of the drawings.

    Returns:
        ``made`` and ``true`` (P · most, 3, H, W), and ``combination`` (P · most,).
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder, drawings_folder)
    group, empty = combinations(piece["group"]), bench.empty()
    library = {name: load_lora(file) for name, file in files.items()}
    made, true, places = [], [], []
    observed = observed_by(piece, bench, group)
    for place, one in enumerate(group):
        rows = rows_of(bench.drawings, subject(one.subject), piece["part"])[: piece["most"]]
        states = bench.text.encode([one.caption(str(c)) for c in bench.drawings.captions[rows]])
        fusion = fusion_of(
            bench,
            piece["rival"],
            piece["settings"],
            {name: library[name] for name in one.adapters},
            trained.get(piece.name),
            observed[place],
        )
        with nullcontext() if fusion is None else fusion:
            images = bench.base.images(
                states,
                empty,
                seeds=[seed_of(one.name) + number for number in range(len(rows))],
                steps=piece["steps"],
                guidance=piece["guidance"],
                before_step=None if fusion is None else fusion.at,
            )
        made.append((images * 255).round().to(torch.uint8))
        wanted = (images_of(bench.drawings, rows, one.styles) + 1) * 127.5
        true.append(wanted.round().clamp(0, 255).to(torch.uint8))
        places += [place] * len(rows)
        job.tick()
    return {"made": torch.cat(made), "true": torch.cat(true), "combination": torch.tensor(places)}
