"""What the page of ``gates diffusion demo`` does, without the library that draws it."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from apps.diffusion.demo.cards import found_card, message_card
from apps.diffusion.generation.modes import SUM
from apps.diffusion.generation.pictures import record_of
from apps.diffusion.generation.studio import Studio
from core_gates.errors import GatesError
from diffusion.data.contact_sheet import enlarged
from diffusion.evaluation.figures import gate_map_figure
from diffusion.fusion.pipeline import Generated

SIDE = 320
"""Pixels that small images are enlarged to."""


class Asked(NamedTuple):
    """What images are made of: a prompt, a seed, and the names of what was found by it."""

    prompt: str
    seed: int
    names: list[str]


class Shown(NamedTuple):
    """What the page shows.

    Attributes:
        card: HTML of the adapters, or of an error.
        gated: Image with gates (H, W, 3); None after an error.
        plain: Image of the plain sum.
        gates: Map of the gates; None without gates.
    """

    card: str
    gated: np.ndarray | None = None
    plain: np.ndarray | None = None
    gates: Figure | None = None


class Actions:
    """The actions of the page.

    Args:
        studio: What makes images.
        steps: Number of denoising steps.
        size: Side of images in pixels; that of the base if None.
    """

    def __init__(self, studio: Studio, steps: int, size: int | None) -> None:
        self.studio, self.options = studio, studio.options(steps, None, size)
        self.lock = Lock()  # adapters are attached to one model

    def find(self, prompt: str, k: int, seed: int) -> tuple[Asked | None, Shown]:
        """Find adapters by a prompt, and make images."""
        try:
            made, shown = self._make(prompt, k, seed, None)
        except GatesError as error:
            return None, Shown(message_card(str(error)))
        return Asked(prompt, made.seed, [one.name for one in made.adapters]), shown

    def weigh(self, asked: Asked | None, strengths: Sequence[float]) -> Shown:
        """Make images with other strengths of the same adapters."""
        if asked is None:
            return Shown(message_card("no adapters are found yet: give a prompt"))
        weights = dict(zip(asked.names, strengths, strict=False))
        try:
            return self._make(asked.prompt, len(asked.names), asked.seed, weights)[1]
        except GatesError as error:
            return Shown(message_card(str(error)))

    def _make(
        self, prompt: str, k: int, seed: int, strengths: dict[str, float] | None
    ) -> tuple[Generated, Shown]:
        """Return an image, and what is shown of it."""
        with self.lock:
            made = self.studio.make(prompt, k=k, seed=seed, strengths=strengths, **self.options)
            weights = {one.name: one.strength for one in made.adapters}
            plain = self.studio.make(
                prompt, mode=SUM, adapters=list(weights), strengths=weights, seed=seed,
                **self.options,
            )  # fmt: skip
            record = record_of(self.studio, made, made.mode)
        left = [f"left out: {name}: {why}" for name, why in made.skipped.items()]
        notes = [*self.studio.notices, self.studio.finder.notice, *left]
        card = found_card(record["adapters"], [note for note in notes if note])
        gates = None if made.gates is None else gate_map_figure(made.gates, note=prompt)
        return made, Shown(card, _pixels(made), _pixels(plain), gates)


def _pixels(made: Generated) -> np.ndarray:
    return np.asarray(enlarged(made.images[0], SIDE))
