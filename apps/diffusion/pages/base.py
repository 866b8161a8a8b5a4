"""Sheets of the embedded base and of its style adapters."""

from __future__ import annotations

import numpy as np

from apps.diffusion.generation.pairs import in_bytes
from apps.diffusion.studies.base import chosen_rows, image_pieces, styled_rows
from apps.diffusion.world import World
from diffusion.data.styles import drawn
from diffusion.evaluation.figures import sheet_figure
from harness.experiment import Arrays
from harness.report.page import Page

SHOWN, STYLED = 24, 8
"""Captions of the base, and of each style."""

REAL, MADE = "real drawings", "made"


def add_base(page: Page, world: World) -> None:
    """Add sheets of what the study made, next to real drawings.

    Args:
        page: The report.
        world: In which nothing is trained.
    """
    store = world.run.store("images", Arrays())
    plain, pieces = image_pieces(world)
    made = {
        piece.method: store.load(piece)["images"].permute(0, 2, 3, 1).numpy()
        for piece in (plain, *pieces)
        if store.find(piece) is not None
    }
    page.section("Images")
    if plain.method in made:
        _plain(page, world, made.pop(plain.method))
    if made:
        _styles(page, world, made)
    else:
        page.text("No images of style adapters were made yet: run `evaluate` first.")


def _plain(page: Page, world: World, made: np.ndarray) -> None:
    rows = chosen_rows(world)
    step = len(rows) // SHOWN
    places = np.arange(SHOWN) * step
    real = in_bytes(drawn(world.drawings, rows[places], ()))
    captions = [str(caption) for caption in world.drawings.captions[rows[places]]]
    halves = (range(SHOWN // 2), range(SHOWN // 2, SHOWN))
    for half in halves:
        figure = sheet_figure(
            {captions[i]: {REAL: real[[i]], MADE: made[[places[i]]]} for i in half},
            title="Training captions",
            note="the base alone, evenly spaced among the captions that are scored",
        )
        page.figure(
            figure,
            "What the base draws of training captions, next to the drawings.",
            name="base",
            table=(("caption", "column"), [[captions[i], one] for i in half for one in ("real",
                   "made")]),
        )  # fmt: skip


def _styles(page: Page, world: World, made: dict[str, np.ndarray]) -> None:
    rows = {name: styled_rows(world, name)[:STYLED] for name in made}
    sheet = {
        name: {REAL: in_bytes(drawn(world.drawings, rows[name], (name,))), MADE: own[:STYLED]}
        for name, own in made.items()
    }
    captions = [str(caption) for caption in world.drawings.captions[next(iter(rows.values()))]]
    figure = sheet_figure(
        sheet,
        captions,
        title="Style adapters, one at a time",
        note="captions of drawings that no adapter has seen",
    )
    table = [[name, caption] for name in made for caption in captions]
    page.figure(
        figure,
        "Every style adapter on the same captions: real drawings at the left, made ones at the "
        "right.",
        name="styles",
        table=(("style", "caption"), table),
    )
