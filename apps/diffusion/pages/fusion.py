"""Where gates help, pair by pair, and what they make of some pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from apps.diffusion.generation.pairs import TRUE, pair_images
from apps.diffusion.generation.shipped import shipped
from apps.diffusion.generation.sources import Sources
from apps.diffusion.generation.studio import studio
from apps.diffusion.studies.fusion import BLIND, GROUPS, SPACES, best_rival
from apps.diffusion.works.tasks import combinations
from apps.diffusion.world import World
from diffusion.data.concepts import rows_of, subject
from diffusion.evaluation.figures import (
    gate_map_figure,
    gate_table,
    pair_differences_figure,
    sheet_figure,
)
from harness.experiment import Arrays, Run
from harness.experiment.forms import Figures
from harness.experiment.record import read_record
from harness.experiment.run import CHOICES
from harness.experiment.tuning import Choice
from harness.report.page import Page
from harness.runs.ticker import counting, working

OWN = "gates"
RIVALS = ("sum", "mean", "ties", "k_lora")
"""Rivals as published that figures show, besides the best tuned one."""

SHOWN = 16
"""Pairs whose images are shown."""

PAIRS = "test2"


HOW_TO_READ = (
    "Scores are natural logarithms of losses over that of the base alone: 0 is the base, less is"
    " better, and a difference of 0.1 is a loss about 10 % higher. The adapter of the subject alone"
    " is *alone0*, that of the style *alone1*; *tuned* is a rival with the settings of its best"
    " trial, *baked* has the mean gates in one file, *layer_strengths* one trained number a layer."
)


def add_images(page: Page, run: Run, world: World) -> None:
    """Add images of some unseen pairs, and how to read the scores.

    Args:
        page: The report.
        run: Of the study.
        world: In which nothing is trained.
    """
    page.section("Images of unseen pairs")
    if not _images(page, run, world):
        page.text("There are no images yet: run `evaluate` first.")
    page.text(HOW_TO_READ)


def add_fusion(page: Page, run: Run, world: World) -> None:
    """Add differences by pair, and gates of an unseen pair.

    Args:
        page: The report.
        run: Of the study.
        world: In which nothing is trained.
    """
    page.section("Pair by pair")
    drawn = [_differences(page, run, group) for group in GROUPS]
    if not any(drawn):
        page.text("There are no losses of gates yet: run `evaluate` first.")
    page.section("Gates of an unseen pair")
    lacking = shipped(world).lacking
    if lacking:
        page.text(f"Gates are not shown: {', '.join(lacking)} are missing.")
    else:
        _gates(page, world)


def losses_of(folder: Path, group: str) -> dict[str, np.ndarray]:
    """Return method -> logarithm of the mean loss of each combination (P,), over all seeds.

    Args:
        folder: Of the run.
        group: Of combinations.
    """
    found = {
        name: [np.nanmean(one["losses"].numpy(), axis=1) for one in own]
        for name, own in _stored(folder / "losses", group).items()
    }
    return {name: np.log(np.mean(own, axis=0)) for name, own in found.items()}


def _stored(folder: Path, group: str) -> dict[str, list[dict[str, Tensor]]]:
    """Return method -> what is stored for a group, a result per seed."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for place in sorted(folder.glob("*")):
        record = None if place.name.startswith(".") else read_record(place)
        if record is not None and (record.identity.get("keys") or {}).get("of") == group:
            found.setdefault(str(record.identity["method"]), []).append(Arrays().load(place))
    return found


def _best_rival(run: Run) -> list[str]:
    """Return the rival that scores call the best: by its trials, never by what is tested."""
    chosen, store = {}, run.store(CHOICES, Figures())
    folders = [folder for folder in (store.shipped, store.folder) if folder is not None]
    for place in (place for folder in folders for place in sorted(folder.glob("*"))):
        if (record := read_record(place)) is not None:
            chosen[str(record.identity["method"])] = Choice(**Figures().load(place))
    rivals = chosen.keys() & {*SPACES, BLIND}
    return [best_rival(chosen)] if rivals else []


def _differences(page: Page, run: Run, group: str) -> bool:
    losses = losses_of(run.folder, group)
    own = losses.pop(OWN, None)
    if own is None:
        return False
    shown = {name: own - losses[name] for name in (*RIVALS, *_best_rival(run)) if name in losses}
    if not shown:
        return False
    names = [one.name for one in combinations(group)]
    page.figure(
        pair_differences_figure(
            names, shown, title=f"Gates and rivals: {GROUPS[group]}",
            note="flow-matching loss on drawings that no adapter and no gate has seen",
        ),
        f"{GROUPS[group]}: how much lower or higher the loss of gates is than that of rivals."
        " Each row is a combination, each mark a rival.",
        name=f"pairs-{group}",
        table=(
            ("combination", "rival", "log_loss_ratio"),
            [[name, rival, float(v)] for rival, d in shown.items()
             for name, v in zip(names, d, strict=True)],
        ),
    )  # fmt: skip
    return True


def _images(page: Page, run: Run, world: World) -> bool:
    """Add what each way makes of some unseen pairs, next to what is true."""
    made = {name: own[0] for name, own in _stored(run.folder / "images", PAIRS).items()}
    ways = [OWN, *RIVALS, *_best_rival(run)]
    ways = [name for name in ways if name in made]
    if not ways:
        return False
    pairs = combinations(PAIRS)
    chosen = range(0, len(pairs), len(pairs) // SHOWN)
    places = made[ways[0]]["combination"].tolist()
    first = {pair: places.index(pair) for pair in chosen}
    rows = {}
    for pair in chosen:
        row = rows_of(world.drawings, subject(pairs[pair].subject), "test")[0]
        caption = pairs[pair].caption(str(world.drawings.captions[row]))
        images = {TRUE: made[ways[0]]["true"]} | {name: made[name]["made"] for name in ways}
        rows[caption] = {n: i[[first[pair]]].permute(0, 2, 3, 1).numpy() for n, i in images.items()}
    note = "subjects in styles that no gate was trained on together; the same noise for all"
    page.figure(
        sheet_figure(rows, title="Unseen pairs", note=note),
        "One row per caption, which no adapter and no gate has seen: the drawing as it should be,"
        " then what gates and rivals make of it.",
        name="pairs",
        table=(("caption", "column"), [[c, n] for c, row in rows.items() for n in row]),
    )
    return True


def _gates(page: Page, world: World) -> None:
    """Add the gates of one image by layer and step."""
    with counting("indexing") as progress:
        opening = studio(Sources(), lambda: world, progress)
    with opening as found, working("recording gates"):
        made = pair_images(found, world.drawings, combinations(PAIRS)[:1])
    if made.gates is None:
        return
    page.figure(
        gate_map_figure(made.gates, note=made.captions[0]),
        "Mean gates of one image by layer and step, over tokens and channels; 1 is open, 0"
        " closed. A row of one color is a gate that is the same in all steps.",
        name="gates",
        table=gate_table(made.gates),
    )
