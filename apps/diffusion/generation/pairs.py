"""Images of a subject in a style: what is true, what gates make, and what the plain sum makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apps.diffusion.generation.modes import GATED, SUM
from apps.diffusion.generation.studio import Studio
from diffusion.data.concepts import rows_of, subject
from diffusion.data.drawings import Drawings
from diffusion.data.pairs import Combination
from diffusion.data.styles import drawn
from diffusion.fusion.recording import GateMap

STEPS = 20
TRUE = "true drawing"


class PairImages(NamedTuple):
    """Images of P combinations.

    Attributes:
        captions: Of drawings that no adapter and no gate has seen.
        images: ``true drawing``, ``gated`` and ``sum`` -> (P, H, W, 3) uint8.
        gates: Mean gates of the first.
    """

    captions: list[str]
    images: dict[str, np.ndarray]
    gates: GateMap | None

    def errors(self, mode: str) -> np.ndarray:
        """Return the root mean square error (P,) of the pixels of a mode, from 0 to 1."""
        return self._errors(self.images[mode].astype(float))

    def white_errors(self) -> np.ndarray:
        """Return the same of a white image: what paleness alone is worth."""
        return self._errors(np.full(3, 255.0))

    def _errors(self, images: np.ndarray) -> np.ndarray:
        gap = (images - self.images[TRUE]) / 255
        return np.sqrt((gap**2).mean((1, 2, 3)))

    def rows(self) -> dict[str, dict[str, np.ndarray]]:
        """Return what :func:`diffusion.evaluation.figures.sheet_figure` draws."""
        return {
            caption: {name: images[[place]] for name, images in self.images.items()}
            for place, caption in enumerate(self.captions)
        }


def pair_images(
    studio: Studio,
    drawings: Drawings,
    combinations: Sequence[Combination],
) -> PairImages:
    """Make images of combinations with gates and with the plain sum, from the same noise.

    Args:
        studio: Of the embedded base.
        drawings: All.
        combinations: Subjects and styles.
    """
    captions: list[str] = []
    images: dict[str, list[np.ndarray]] = {TRUE: [], GATED: [], SUM: []}
    gates = None
    options = studio.options(STEPS, None, None)
    for one in combinations:
        row = rows_of(drawings, subject(one.subject), "test")[:1]
        captions.append(one.caption(str(drawings.captions[row[0]])))
        images[TRUE].append(in_bytes(drawn(drawings, row, one.styles)[0]))
        for mode in (GATED, SUM):
            made = studio.make(captions[-1], mode=mode, adapters=list(one.adapters), **options)
            images[mode].append(np.asarray(made.images[0].convert("RGB")))
            gates = made.gates if gates is None else gates
    found = {name: np.stack(own) for name, own in images.items()}
    return PairImages(captions, found, gates)


def in_bytes(image: np.ndarray) -> np.ndarray:
    """Return images from 0 to 1 as uint8."""
    return np.round(image * 255).clip(0, 255).astype(np.uint8)
