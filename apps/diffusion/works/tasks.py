"""Combinations of adapters with the images that they should make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from apps.diffusion.works.pictures import images_of
from diffusion.data.concepts import Part, rows_of, subject
from diffusion.data.drawings import Drawings
from diffusion.data.pairs import Combination, held_out_pairs, training_pairs, with_second_style
from diffusion.fusion.data import FusionTask
from diffusion.models.base import EmbeddedBase
from diffusion.models.text import TextEncoder, TextStates, text_encoder

TRIED = 24
"""Training pairs, and as many triples, that settings are chosen on."""


class Bench(NamedTuple):
    """What every work on combinations needs.

    Attributes:
        drawings: All.
        base: The base.
        text: Its text encoder.
    """

    drawings: Drawings
    base: EmbeddedBase
    text: TextEncoder

    @classmethod
    def load(cls, base_folder: Path, drawings_folder: str | None) -> Self:
        """Read the base and the drawings."""
        base = EmbeddedBase.load(base_folder)
        text = text_encoder(base.text_encoder["name"])
        base.check_text_encoder(text)
        return cls(Drawings.load(drawings_folder), base, text)

    def tasks(self, combinations: Sequence[Combination], part: Part, most: int) -> list[FusionTask]:
        """Return tasks of combinations, with at most so many drawings of a part each."""
        rows = [rows_of(self.drawings, subject(one.subject), part)[:most] for one in combinations]
        captions = [
            one.caption(str(self.drawings.captions[row]))
            for one, own in zip(combinations, rows, strict=True)
            for row in own
        ]
        states = _states(self.base.text_encoder["name"], tuple(captions))
        found, start = [], 0
        for one, own in zip(combinations, rows, strict=True):
            latents = self.base.latents(images_of(self.drawings, own, one.styles))
            found.append(
                FusionTask(one.adapters, latents, states.of(slice(start, start + len(own))))
            )
            start += len(own)
        return found

    def empty(self) -> TextStates:
        """Return the states of the empty caption."""
        return self.text.encode([""])


@lru_cache(maxsize=8)
def _states(encoder: str, captions: tuple[str, ...]) -> TextStates:
    """Return the states of captions, which the pieces that a process works on share."""
    return text_encoder(encoder).encode(captions)


def combinations(group: str) -> list[Combination]:
    """Return combinations: ``train``, ``train2``, ``tried``, ``tried2``, ``test2``, ...

    ``train`` are the pairs and triples that gates are trained on, none of which holds a test pair;
    ``tried`` are some of them, which settings are chosen on; ``train2`` and ``tried2`` are their
    pairs, for methods for two adapters. ``test2`` are the test pairs, ``test3`` the same with a
    second style, ``trained2`` as many of the training pairs.
    """
    tested, pairs = set(held_out_pairs()), training_pairs()
    triples = [
        one
        for one in with_second_style(pairs)
        if Combination(one.subject, one.styles[1:]) not in tested
    ]
    step2, step3 = len(pairs) // TRIED, len(triples) // TRIED
    return {
        "train": [*pairs, *triples],
        "train2": pairs,
        "tried": [*pairs[::step2][:TRIED], *triples[::step3][:TRIED]],
        "tried2": pairs[::step2][:TRIED],
        "test2": held_out_pairs(),
        "test3": with_second_style(held_out_pairs(), shift=3),
        "trained2": pairs[:: len(pairs) // len(tested)][: len(tested)],
    }[group]
