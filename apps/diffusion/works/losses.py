"""Losses of combinations under one way to use several adapters, as pieces of work."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.diffusion.works.gates import (
    FILE,
    GATE_OPTIONS,
    GatesForm,
    is_gated,
    train_gates,
    with_common,
)
from apps.diffusion.works.pictures import images_of
from apps.diffusion.works.tasks import Bench, combinations
from core_gates.errors import GatesError
from diffusion.data.concepts import rows_of, subject
from diffusion.data.pairs import Combination
from diffusion.evaluation.fusion import fixed_losses
from diffusion.fusion.data import FusionTask
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.protocol import Fusion
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.models.flow_matching import noised, velocity
from diffusion.rivals.registry import make_rival
from harness.experiment import Job, Piece
from harness.experiment.record import read_record

TIMES, MOST = 8, 6
"""Times of a loss, and drawings of a combination."""

RUN = 20
"""Steps of the sampling run that times belong to."""

TRIED_TIMES, TRIED_MOST = 4, 3
"""The same where settings are chosen."""

FIRST, OTHERS = "first_strength", "other_strength"
"""Settings of any rival: what the subject, and what styles, are multiplied by."""

Settings = Mapping[str, Any]


def fusion_of(
    bench: Bench,
    method: str,
    settings: Settings,
    adapters: Mapping[str, LoraBundle],
    trained: Path | None,
    observed: FusionTask | None = None,
) -> Fusion | None:
    """Return a method for one set of adapters; None for the base alone.

    Args:
        bench: Base and drawings.
        method: ``none``, the name of an adapter's place as in ``alone0``, gates, or a rival.
        settings: Of the method.
        adapters: Name -> adapter, the subject first.
        trained: Folder of what was trained for it; None if nothing was.
        observed: What baked gates are averaged over.
    """
    model = bench.base.transformer
    if method == "none":
        return None
    if method.startswith("alone"):
        name = list(adapters)[int(method.removeprefix("alone"))]
        return make_rival("sum", model, {name: adapters[name]})
    if method == "baked":
        assert trained is not None
        assert observed is not None
        return make_rival(
            "baked",
            model,
            adapters,
            gates=trained / FILE,
            observe=lambda: observe(bench, observed),
        )
    if is_gated(settings):
        given = with_common(adapters, settings.get("global_rank"))
        if trained is not None:
            return GatedFusion(model, given, gates=trained / FILE)
        return GatedFusion(model, given, **{name: settings[name] for name in GATE_OPTIONS})
    options = {name: value for name, value in settings.items() if name not in (FIRST, OTHERS)}
    made = make_rival(method, model, adapters, **options)
    if FIRST in settings:
        names = list(adapters)
        strengths: dict[str, float] = dict.fromkeys(names, float(settings[OTHERS]))
        strengths[names[0]] = float(settings[FIRST])
        made.set_strengths(strengths)
    if trained is not None:
        from safetensors.torch import load_file

        made.load_state_dict(  # type: ignore[attr-defined]
            {name: value.float() for name, value in load_file(trained / FILE).items()}
        )
    return made


@torch.no_grad()
def observe(bench: Bench, task: FusionTask) -> None:
    """Run the model on the plain drawings of a subject, at several times."""
    draw = torch.Generator().manual_seed(0)
    for step in range(TIMES):
        t = torch.full((len(task.latents),), (step + 0.5) / TIMES)
        noise = torch.randn(task.latents.shape, generator=draw)
        at = noised(task.latents, t, noise)
        velocity(bench.base.transformer, at.x, at.t, task.text)


def observed_by(
    piece: Piece, bench: Bench, group: Sequence[Combination]
) -> Sequence[FusionTask | None]:
    """Return what baked gates are averaged over: plain drawings, captions of the combination."""
    if piece["rival"] != "baked":
        return [None] * len(group)
    found = []
    for one in group:
        rows = rows_of(bench.drawings, subject(one.subject), "gate")[:MOST]
        latents = bench.base.latents(images_of(bench.drawings, rows))
        captions = [one.caption(str(text)) for text in bench.drawings.captions[rows]]
        found.append(FusionTask(one.adapters, latents, bench.text.encode(captions)))
    return found


def note_trained(job: Job, folder: Path | None) -> None:
    """Keep for the record which training a result was made with."""
    record = None if folder is None else read_record(folder)
    if record is not None:
        job.note(trained=record.fingerprint)


def seed_of(name: str) -> int:
    """Return the seed of the noise of a combination, the same for all methods."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def losses(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, Tensor]:
    """Return the losses of each combination of a group, ``losses`` (P, most), NaN for no drawing.

    Args:
        piece: Its method with ``settings``, ``group``, ``part``, ``times`` and ``most``.
        job: Ticks once a combination.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        trained: Name of a piece -> folder of what was trained for it.
        drawings_folder: Of the drawings.
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder, drawings_folder)
    group = combinations(piece["group"])
    tasks = bench.tasks(group, piece["part"], piece["most"])
    observed = observed_by(piece, bench, group)
    library = {name: load_lora(file) for name, file in files.items()}
    found = torch.full((len(group), piece["most"]), torch.nan)
    for place, (one, task) in enumerate(zip(group, tasks, strict=True)):
        adapters = {name: library[name] for name in one.adapters}
        fusion = fusion_of(
            bench,
            piece["rival"],
            piece["settings"],
            adapters,
            trained.get(piece.name),
            observed[place],
        )
        found[place, : len(task.latents)] = fixed_losses(
            bench.base.transformer,
            fusion,
            task.latents,
            task.text,
            steps=piece["times"],
            run=RUN,
            seed=seed_of(one.name),
        )
        job.tick()
    return {"losses": found}


def trial(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, float]:
    """Return the mean logarithm of the losses of training combinations under a setting.

    A setting that a rival refuses, as beyond the end of a range, has none.
    """
    settings = {name: piece[name] for name in piece["tuned"]}
    asked = Piece(
        piece.method,
        piece.seed,
        None,
        {
            "rival": piece.method,
            "settings": settings,
            "group": "tried",
            "part": "gate",
            "times": piece.get("times", TRIED_TIMES),
            "most": TRIED_MOST,
        },
    )
    try:
        found = losses(asked, job, base_folder, files, {}, drawings_folder)["losses"]
    except GatesError:
        return {"score": math.nan}
    return {"score": float(found.nanmean(1).log().mean())}


def trial_gates(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    drawings_folder: str | None = None,
) -> dict[str, float]:
    """Return the mean logarithm of the losses of training combinations under trained gates."""
    trained = train_gates(piece, job, base_folder, files, drawings_folder)
    folder = job.folder / "trained"
    folder.mkdir(exist_ok=True)
    GatesForm().save(folder, trained)
    asked = Piece(
        piece.method,
        piece.seed,
        None,
        {
            "rival": piece.method,
            "settings": dict(piece.settings) if is_gated(piece.settings) else {},
            "group": "tried2" if piece.get("group") == "train2" else "tried",
            "part": "gate",
            "times": TRIED_TIMES,
            "most": TRIED_MOST,
        },
    )
    found = losses(asked, job, base_folder, files, {asked.name: folder}, drawings_folder)
    return {"score": float(found["losses"].nanmean(1).log().mean())}
