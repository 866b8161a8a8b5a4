"""Losses of combinations under one way to use several adapters, as pieces of work."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.data.concepts import Combination
from diffusion.data.scenes import spread
from diffusion.evaluation.fusion_scores import fixed_losses
from diffusion.experiments.adapter_conditions import CaptionScores, roles_of
from diffusion.experiments.trained_gates import (
    FILE,
    GATE_OPTIONS,
    Bench,
    GatesForm,
    as_used,
    captions,
    combinations,
    is_gated,
    options_in,
    train_gates,
    with_common,
)
from diffusion.experiments.work import Form, Job
from diffusion.fusion.fusion_tasks import FusionTask
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.gates_file import load_trained
from diffusion.fusion.protocol import Fusion
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.rivals.registry import make_rival
from diffusion.rivals.weighing import LoraHub
from harness.files.piece import Piece, read_record

TIMES, MOST = 8, 4  # times of a loss, and drawings of a combination

RUN = 20  # steps of the sampling run that times belong to

TRIED_TIMES, TRIED_MOST = 4, 3  # the same where settings are chosen

FIRST, OTHERS, EVERY = "first_strength", "other_strength", "strength"
MANY = "strength_of_many"
"""Settings of any rival: what the subject, what styles, and what all are multiplied by, and what
all are where there are more than two adapters."""

NOT_OF_RIVALS = (FIRST, OTHERS, EVERY, MANY, "leave", "encoder")
"""Settings that a rival does not take: strengths, and what leaves adapters out."""

Settings = Mapping[str, Any]


def fusion_of(
    bench: Bench,
    method: str,
    settings: Settings,
    adapters: Mapping[str, LoraBundle],
    trained: Path | None,
) -> Fusion | None:
    """Return a method for one set of adapters; None for the base alone.

    Args:
        bench: The base.
        method: ``none``, the name of an adapter's place as in ``alone0``, gates, or a rival.
        settings: Of the method.
        adapters: Name -> adapter, the subject first.
        trained: Folder of what was trained for it; None if nothing was.
    """
    model = bench.base.transformer
    if method == "none":
        return None
    if method.startswith("alone"):
        name = list(adapters)[int(method.removeprefix("alone"))]
        return make_rival("sum", model, {name: adapters[name]})
    if is_gated(settings):
        options = options_in(settings, GATE_OPTIONS)
        if trained is not None:
            options = {"mode": settings.get("mode", "gated"), "gates": trained / FILE}
        given = with_common(adapters, settings.get("global_rank"))
        fusion = GatedFusion(model, given, **options)
        fusion.describe(roles=roles_of(settings, adapters))
        return fusion
    options = {name: value for name, value in settings.items() if name not in NOT_OF_RIVALS}
    made = make_rival(method, model, adapters, **options)
    if FIRST in settings or EVERY in settings:
        every = settings.get(EVERY, 1.0) * (settings.get(MANY, 1.0) if len(adapters) > 2 else 1.0)
        strengths = dict.fromkeys(adapters, every * settings.get(OTHERS, 1.0))
        made.set_strengths(strengths | {next(iter(adapters)): every * settings.get(FIRST, 1.0)})
    if trained is not None:
        made.load_state_dict(  # type: ignore[attr-defined]
            {name: value.float() for name, value in load_trained(trained / FILE).items()}
        )
    return made


def fused(
    piece: Piece,
    bench: Bench,
    files: Mapping[str, Path],
    trained: Mapping[str, Path],
    encoder: Path | None = None,
) -> Iterator[tuple[Combination, Fusion | None]]:
    """Yield each combination of the group of a piece with its adapters, under its method.

    A switch is told the mean cosines of adapters with the captions of the drawings; by these, a
    method with ``leave`` does without the lowest.

    Args:
        piece: Its method with ``settings`` and ``group``.
        bench: The base.
        files: Concept -> LoRA file.
        trained: Name of a piece -> folder of what was trained for it.
        encoder: Folder of the encoder that a switch takes scores from.
    """
    group, folder = combinations(piece["group"]), trained.get(piece.name)
    settings = piece["settings"]
    leave = settings.get("leave")
    scored = leave or settings.get("switch")
    used = dict.fromkeys(name for pair in group for name in pair.adapters)
    library = {name: load_lora(files[name]) for name in (files if scored else used)}
    suits = CaptionScores(encoder, library) if encoder is not None and scored else None
    for pair in group:
        adapters = {name: library[name] for name in pair.adapters}
        fusion = fusion_of(bench, piece["rival"], settings, adapters, folder)
        if suits is not None and fusion is not None:
            text = bench.text.encode(captions(spread(pair.scenes(piece["part"]), piece["most"])))
            scores = suits.scores(pair.adapters, text).mean(0).tolist()
            cosines = dict(zip(pair.adapters, scores, strict=True))
            if leave is None:
                fusion.describe(scores=cosines)
            else:
                fusion.set_strengths({min(cosines, key=cosines.__getitem__): 0.0})
        yield pair, fusion


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
    encoder: Path | None = None,
) -> dict[str, Tensor]:
    """Return the losses of each combination of a group, and how far a switch lets adapters through.

    Args:
        piece: Its method with ``settings``, ``group``, ``part``, ``times`` and ``most``.
        job: Ticks once a combination.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        trained: Name of a piece -> folder of what was trained for it.
        encoder: Folder of the encoder that a switch takes scores from.

    Returns:
        ``losses`` (P, most), NaN for no drawing; with a switch ``openings`` (P, K), from 0 to 1.
    """
    note_trained(job, trained.get(piece.name))
    bench = Bench.load(base_folder)
    group, openings = combinations(piece["group"]), []
    tasks = bench.tasks(group, piece["part"], piece["most"])
    table = torch.full((len(group), piece["most"]), torch.nan)
    for place, (pair, fusion) in enumerate(fused(piece, bench, files, trained, encoder)):
        task = tasks[place]
        table[place, : len(task.latents)] = fixed_losses(
            bench.base.transformer,
            fusion,
            task.latents,
            task.text,
            steps=piece["times"],
            run=RUN,
            seed=seed_of(pair.name),
            shift=bench.base.shift,
        )
        if piece["settings"].get("switch"):
            openings.append(fusion.context.opening().detach())  # type: ignore[union-attr]
        job.tick()
    return {"losses": table} | ({"openings": torch.stack(openings)} if openings else {})


def trial(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
) -> dict[str, float]:
    """Return the mean logarithm of the losses of training combinations under a setting.

    What has steps is trained first. A setting that a rival refuses, as beyond the end of a range,
    has none.
    """
    settings, trained = {name: piece[name] for name in piece.get("tuned", ())}, {}
    if "steps" in piece.settings:
        settings = as_used(piece.settings)
        folder = trained[Piece(piece.method, piece.seed).name] = job.folder / "trained"
        folder.mkdir(exist_ok=True)
        GatesForm().save(folder, train_gates(piece, job, base_folder, files))
    asked = Piece(
        piece.method,
        piece.seed,
        None,
        {
            "rival": piece.get("rival", piece.method),
            "settings": settings,
            "group": "tried2" if piece.get("group") == "train2" else "tried",
            "part": "gate",
            "times": piece.get("times", TRIED_TIMES),
            "most": TRIED_MOST,
        },
    )
    try:
        table = losses(asked, job, base_folder, files, trained)["losses"]
    except GatesError:
        return {"score": math.nan}
    return {"score": float(table.nanmean(1).log().mean())}


FITTING: dict[str, dict[str, Any]] = {
    "lora_hub": {"drawings": 5, "times": 4, "evaluations": 20, "regularization": 0.05},
}
"""How LoraHub is fitted to a pair.

Five examples and the weight of the mean absolute factor as published; half of the 40 evaluations,
after which two factors hardly move.
"""


def seen_losses(
    piece: Piece,
    job: Job,
    base_folder: Path,
    files: Mapping[str, Path],
    *,
    form: Form[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Fit a rival to other drawings of each pair, and return its losses on the pair's.

    It is fitted on drawings of the part ``gate``. What is made for a pair survives a kill.

    Args:
        piece: Its ``rival``, ``settings`` as in `FITTING`, ``group`` of pairs, ``part``,
            ``times`` and ``most`` of what losses are of.
        job: Ticks once a pair.
        base_folder: Of the base.
        files: Concept -> LoRA file.
        form: How what is made for one pair is saved.

    Returns:
        ``losses`` (P, most), NaN for no drawing; ``before`` and ``after`` (P,), the objective of
        the fit at its start and its end; ``factors`` (P, 2) of both adapters.
    """
    bench = Bench.load(base_folder)
    group, most = combinations(piece["group"]), piece["settings"]["drawings"]
    tests = bench.tasks(group, piece["part"], piece["most"])
    seen = bench.tasks(group, "gate", most)

    def make(place: int) -> dict[str, Tensor]:
        """Fit the rival to one pair, and return its losses."""
        pair = group[place]
        adapters = {name: load_lora(files[name]) for name in pair.adapters}
        fusion, fit = fitted_hub(bench, adapters, seen[place], pair.name, piece["settings"])
        losses = torch.full((piece["most"],), torch.nan)
        losses[: len(tests[place].latents)] = fixed_losses(
            bench.base.transformer,
            fusion,
            tests[place].latents,
            tests[place].text,
            steps=piece["times"],
            run=RUN,
            seed=seed_of(pair.name),
            shift=bench.base.shift,
        )
        return {"losses": losses, **fit}

    parts = []
    for place in range(len(group)):
        parts.append(job.part(str(place), form, partial(make, place)))
        job.tick()
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def fitted_hub(
    bench: Bench,
    adapters: Mapping[str, LoraBundle],
    task: FusionTask,
    name: str,
    settings: Mapping[str, Any],
) -> tuple[Fusion, dict[str, Tensor]]:
    """Return LoraHub with factors fitted to drawings of the subject in the style."""
    model = bench.base.transformer
    rival = LoraHub(model, adapters, regularization=settings["regularization"])
    noise = seed_of(f"{name}, seen")

    def loss() -> float:
        losses = fixed_losses(
            model, rival, task.latents, task.text, steps=settings["times"], run=RUN, seed=noise,
            shift=bench.base.shift,
        )  # fmt: skip
        objectives.append(float(losses.mean()))
        return objectives[-1]

    objectives: list[float] = []
    with rival:
        rival.search(loss, settings["evaluations"])
        last = loss()
    factors = torch.tensor([*rival.learned.values()])
    after = last + settings["regularization"] * float(factors.abs().mean())
    fit = {"before": torch.tensor(objectives[0]), "after": torch.tensor(after)}
    return rival, fit | {"factors": factors}
