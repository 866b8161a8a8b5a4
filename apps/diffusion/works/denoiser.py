"""Losses without a model, as a piece of work: what a linear denoiser of the styles predicts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from apps.diffusion.works.losses import seed_of
from apps.diffusion.works.pictures import images_of
from apps.diffusion.works.tasks import Bench, combinations
from diffusion.data.concepts import rows_of, style
from diffusion.evaluation.fusion import fixed_draws
from diffusion.evaluation.linear_denoiser import LinearDenoiser
from harness.experiment import Job, Piece


def denoiser_losses(
    piece: Piece, job: Job, base_folder: Path, drawings_folder: str | None = None
) -> dict[str, Tensor]:
    """Return losses as :func:`apps.diffusion.works.losses.losses` does, with the same noise.

    It knows the mean and the covariance of drawings in the styles of a combination: those drawings
    that adapters of styles are trained on, of no subject. It has no prompt and no network.

    Args:
        piece: With ``group``, ``part``, ``times`` and ``most``.
        job: Ticks once a combination.
        base_folder: Of the base, whose autoencoder makes the latents.
        drawings_folder: Of the drawings.
    """
    bench = Bench.load(base_folder, drawings_folder)
    group = combinations(piece["group"])
    tasks = bench.tasks(group, piece["part"], piece["most"])
    found = torch.full((len(group), piece["most"]), torch.nan)
    for place, (one, task) in enumerate(zip(group, tasks, strict=True)):
        rows = rows_of(bench.drawings, style(one.styles[0]), "adapter")
        seen = images_of(bench.drawings, rows, one.styles)
        denoiser = LinearDenoiser.of(bench.base.latents(seen))
        losses = [
            (denoiser.velocity(at.x, float(at.t[0])) - at.target).square().flatten(1).mean(1)
            for at in fixed_draws(task.latents, piece["times"], seed_of(one.name))
        ]
        found[place, : len(task.latents)] = torch.stack(losses).mean(0)
        job.tick()
    return {"losses": found}
