"""Losses of rivals that are fitted on drawings of the very pair, as pieces of work.

Budget: at the sizes of the embedded base LoraHub takes about 2.5 CPU-seconds a pair and ZipLoRA
3.8, the losses of the test drawings included: 5 CPU-minutes for both and all 48 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.diffusion.works.losses import RUN, seed_of
from apps.diffusion.works.tasks import Bench, combinations
from diffusion.data.pairs import Combination
from diffusion.evaluation.fusion import fixed_losses
from diffusion.fusion.data import FusionTask
from diffusion.fusion.protocol import Fusion
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.rivals.distillation import distill, taught
from diffusion.rivals.lora_hub import LoraHub
from diffusion.rivals.zip_lora import ZipLora
from harness.experiment import Arrays, Job, Piece

FITTING: dict[str, dict[str, Any]] = {
    "lora_hub": {"drawings": 5, "times": 4, "evaluations": 20, "regularization": 0.05},
    "zip_lora": {
        "drawings": 5,
        "draws": 50,
        "steps": 50,
        "batch_size": 2,
        "learning_rate": 0.02,
    },
}
"""How they are fitted to a pair.

LoraHub: five examples and the weight of the mean absolute factor as published; half of the 40
evaluations, after which two factors hardly move. ZipLoRA: 50 steps of 2 latents for each adapter at
twice the published rate, in place of 100 steps, which did as well on five training pairs (mean
logarithm of the losses: -.316; 100 steps of 4 latents at the published rate: -.304).
"""


def seen_losses(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, Tensor]:
    """Return the losses of pairs under a rival that is fitted on other drawings of each.

    It is fitted on drawings of the part ``gate``. What is made for a pair survives a kill.

    Args:
        piece: Its ``rival``, ``settings`` as in :data:`FITTING`, ``group`` of pairs, ``part``,
            ``times`` and ``most`` of what losses are of.
        job: Ticks once a pair.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        drawings_folder: Of the drawings.

    Returns:
        ``losses`` (P, most), NaN for no drawing; ``before`` and ``after`` (P,), the objective of
        the fit at its start and its end, for ZipLoRA its mean over the first and the last time that
        all latents are seen; ``factors`` (P, 2) of both adapters, the mean over columns
        for ZipLoRA.
    """
    bench = Bench.load(base_folder, drawings_folder)
    group, most = combinations(piece["group"]), piece["settings"]["drawings"]
    tests = bench.tasks(group, piece["part"], piece["most"])
    seen = bench.tasks(group, "gate", most)
    plain = bench.tasks([one._replace(styles=()) for one in group], "gate", most)
    library = {name: load_lora(file) for name, file in files.items()}

    def make(place: int) -> dict[str, Tensor]:
        one = group[place]
        adapters = {name: library[name] for name in one.adapters}
        shown = dict(zip(one.adapters, (plain[place], seen[place]), strict=True))
        fusion, found = FITS[piece["rival"]](bench, adapters, shown, one, piece["settings"])
        losses = torch.full((piece["most"],), torch.nan)
        losses[: len(tests[place].latents)] = fixed_losses(
            bench.base.transformer,
            fusion,
            tests[place].latents,
            tests[place].text,
            steps=piece["times"],
            run=RUN,
            seed=seed_of(one.name),
        )
        return {"losses": losses, **found}

    parts = []
    for place in range(len(group)):
        parts.append(job.part(str(place), Arrays(), partial(make, place)))
        job.tick()
    return {name: torch.stack([one[name] for one in parts]) for name in parts[0]}


def fitted_hub(
    bench: Bench,
    adapters: Mapping[str, LoraBundle],
    shown: Mapping[str, FusionTask],
    pair: Combination,
    settings: Mapping[str, Any],
) -> tuple[Fusion, dict[str, Tensor]]:
    """Return LoraHub with the factors that suit drawings of the subject in the style best."""
    model, task = bench.base.transformer, list(shown.values())[-1]
    rival = LoraHub(model, adapters, regularization=settings["regularization"])
    noise = seed_of(f"{pair.name}, seen")

    def loss() -> float:
        own = fixed_losses(
            model, rival, task.latents, task.text, steps=settings["times"], run=RUN, seed=noise
        )
        values.append(float(own.mean()))
        return values[-1]

    values: list[float] = []
    with rival:
        rival.search(loss, settings["evaluations"])
        last = loss()
    factors = torch.tensor([*rival.learned.values()])
    after = last + settings["regularization"] * float(factors.abs().mean())
    return rival, figures(values[0], after, factors)


def fitted_zip(
    bench: Bench,
    adapters: Mapping[str, LoraBundle],
    shown: Mapping[str, FusionTask],
    pair: Combination,
    settings: Mapping[str, Any],
) -> tuple[Fusion, dict[str, Tensor]]:
    """Return ZipLoRA with columns that keep what each adapter alone predicts.

    That of the subject teaches on plain drawings of it, that of the style on the same drawings in
    the style, each with their captions.
    """
    rival = ZipLora(bench.base.transformer, adapters)
    examples = taught(rival, shown, settings["draws"], seed=seed_of(f"{pair.name}, seen"))
    options = {name: settings[name] for name in ("steps", "batch_size", "learning_rate")}
    values = torch.tensor(distill(rival, examples, **options))
    once = math.ceil(settings["draws"] / settings["batch_size"])
    before, after = float(values[:once].mean()), float(values[-once:].mean())
    columns = torch.cat([own.detach() for own in rival.columns.values()], 1)
    return rival, figures(before, after, columns.mean(1))


def figures(before: float, after: float, factors: Tensor) -> dict[str, Tensor]:
    """Return what is told about a fit."""
    return {
        "before": torch.tensor(before),
        "after": torch.tensor(after),
        "factors": factors.float(),
    }


FITS = {"lora_hub": fitted_hub, "zip_lora": fitted_zip}
