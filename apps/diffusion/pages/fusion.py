"""Where gates help, pair by pair, and what they make of some pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apps.diffusion.generation.pairs import pair_images
from apps.diffusion.generation.shipped import shipped
from apps.diffusion.generation.sources import Sources, studio
from apps.diffusion.studies.fusion import GROUPS
from apps.diffusion.works.tasks import combinations
from apps.diffusion.world import World
from diffusion.evaluation.figures import (
    gate_map_figure,
    gate_table,
    pair_differences_figure,
    sheet_figure,
)
from harness.experiment import Arrays
from harness.experiment.record import read_record
from harness.report.page import Page
from harness.runs.ticker import counting, ticking

OWN, TUNED = "gates", " tuned"
RIVALS = ("sum", "mean", "ties", "k_lora")
"""Rivals as published that figures show, besides the best tuned one."""

SHOWN = 8
"""Pairs whose images are made."""


def add_fusion(page: Page, folder: Path, world: World) -> None:
    """Add differences by pair, and images and gates of some unseen pairs.

    Args:
        page: The report.
        folder: Of the run.
        world: In which nothing is trained.
    """
    page.section("Pair by pair")
    drawn = [_differences(page, folder, group) for group in GROUPS]
    if not any(drawn):
        page.text("There are no losses of gates yet: run `evaluate` first.")
    page.section("Images of unseen pairs")
    lacking = shipped(world).lacking
    if lacking:
        page.text(f"None are made: {', '.join(lacking)} are missing.")
        return
    _images(page, world)


def losses_of(folder: Path, group: str) -> dict[str, np.ndarray]:
    """Return method -> logarithm of the mean loss of each combination (P,), over all seeds.

    Args:
        folder: Of the run.
        group: Of combinations.
    """
    found: dict[str, list[np.ndarray]] = {}
    for place in sorted((folder / "losses").glob("*")):
        record = None if place.name.startswith(".") else read_record(place)
        if record is None or (record.identity.get("keys") or {}).get("of") != group:
            continue
        losses = Arrays().load(place)["losses"].numpy()
        found.setdefault(str(record.identity["method"]), []).append(np.nanmean(losses, axis=1))
    return {name: np.log(np.mean(own, axis=0)) for name, own in found.items()}


def _differences(page: Page, folder: Path, group: str) -> bool:
    losses = losses_of(folder, group)
    own = losses.pop(OWN, None)
    if own is None:
        return False
    tuned = {name: float(loss.mean()) for name, loss in losses.items() if name.endswith(TUNED)}
    best = [min(tuned, key=tuned.__getitem__)] if tuned else []
    shown = {name: own - losses[name] for name in (*RIVALS, *best) if name in losses}
    if not shown:
        return False
    names = [one.name for one in combinations(group)]
    page.figure(
        pair_differences_figure(
            names, shown, title=f"Gates and rivals: {GROUPS[group]}",
            note="flow-matching loss on drawings that no adapter and no gate has seen",
        ),
        f"{GROUPS[group]}: how much lower or higher the loss of gates is than that of rivals.",
        name=f"pairs-{group}",
        table=(
            ("combination", "rival", "log_loss_ratio"),
            [[name, rival, float(v)] for rival, d in shown.items()
             for name, v in zip(names, d, strict=True)],
        ),
    )  # fmt: skip
    return True


def _images(page: Page, world: World) -> None:
    pairs = combinations("test2")
    chosen = pairs[:: len(pairs) // SHOWN][:SHOWN]
    with counting("indexing") as progress:
        opening = studio(Sources(), lambda: world, progress)
    with opening as found, ticking("making images", len(chosen)) as tick:
        made = pair_images(found, world.drawings, chosen, tick)
    errors = {mode: made.errors(mode) for mode in made.images}
    table = [[pair.name, caption, mode, float(errors[mode][place])]
             for place, (pair, caption) in enumerate(zip(chosen, made.captions, strict=True))
             for mode in made.images]  # fmt: skip
    page.figure(
        sheet_figure(made.rows(), title="Unseen pairs", note="the same noise for gates and sum"),
        "Subjects in styles that no gate was trained on together: what is true, and what gates "
        "and the plain sum make.",
        name="pairs",
        table=(("pair", "caption", "column", "pixel error"), table),
    )
    if made.gates is not None:
        page.figure(
            gate_map_figure(made.gates, note=made.captions[0]),
            "Mean gates of the first of these images by layer and step, over tokens and channels.",
            name="gates",
            table=gate_table(made.gates),
        )
