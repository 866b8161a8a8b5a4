"""Tasks of gates from a table: images, their captions, and the adapters that should make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from core_gates.errors import GatesError
from diffusion.data.table import TableRow, inside, label, read_rows
from diffusion.fusion.data import FusionTask
from diffusion.models.codec import Codec, latents_of
from diffusion.models.text import TextStates

SEPARATOR = ";"
"""Between the files of adapters that made an image together."""


class Shown(NamedTuple):
    """Images that one set of adapters should make.

    Attributes:
        adapters: Their names, which are those of their files in the table.
        images: Their files.
        captions: The longest of each image.
    """

    adapters: tuple[str, ...]
    images: list[Path]
    captions: list[str]


def read_shown(path: Path) -> list[Shown]:
    """Read a table whose ``model_file`` names one adapter, or several as ``a;b``.

    Args:
        path: See :func:`diffusion.data.table.read_rows`.

    Raises:
        LoraFileError: See :func:`diffusion.data.table.read_rows`.
        GatesError: A row has no image, or there are too few adapters to be used together.
    """
    found: dict[tuple[str, ...], Shown] = {}
    for row in read_rows(path):
        names = tuple(name.strip() for name in row.model_file.split(SEPARATOR) if name.strip())
        if not names or len({inside(path.parent, name) for name in names}) < len(names):
            what = "names an adapter twice: give each once" if names else "names no adapter"
            raise GatesError(f"line {row.line} of {label(path)} {what}")
        one = found.setdefault(names, Shown(names, [], []))
        one.images.append(_image(path, row))
        one.captions.append(row.forms[0] if row.forms else next(iter(row.captions)))
    alone = [names for names in found if len(names) == 1]
    if len(alone) == 1:
        raise GatesError(
            f"{label(path)} has images of {'one adapter' if len(found) == 1 else alone[0][0]}"
            " alone: gates weigh several, so give rows of two such adapters, or none"
        )
    return list(found.values())


def tasks_of(
    shown: Sequence[Shown],
    codec: Codec,
    *,
    partners: int = 8,
    contrast: bool = False,
    seed: int = 0,
) -> list[FusionTask]:
    """Return what gates are trained on.

    Images of several adapters are a task of these. Those of one adapter are tasks of it together
    with each of its partners, whose captions are the wrong ones (AutoLoRA, 2025).

    Args:
        shown: See :func:`read_shown`.
        codec: Of the model.
        partners: Other adapters that each one alone is combined with.
        contrast: Whether tasks need wrong captions.
        seed: Of the partners.
    """
    text = {one.adapters: codec.states(one.captions) for one in shown}
    latents = {one.adapters: latents_of(codec, one.images) for one in shown}
    alone = [one.adapters for one in shown if len(one.adapters) == 1]
    draw, tasks = torch.Generator().manual_seed(seed), []
    for names in text:
        if len(names) > 1:
            wrong = _others(names, text) if contrast else None
            tasks.append(FusionTask(names, latents[names], text[names], wrong))
            continue
        others = [other for other in alone if other != names]
        for place in torch.randperm(len(others), generator=draw)[:partners].tolist():
            other = others[place]
            wrong = text[other] if contrast else None
            tasks.append(FusionTask((*names, *other), latents[names], text[names], wrong))
    return tasks


def _others(names: tuple[str, ...], text: dict[tuple[str, ...], TextStates]) -> TextStates | None:
    """Return captions of images of other adapters; those of single adapters among these, if any."""
    own = [states for other, states in text.items() if set(other) < set(names)]
    found = own or [states for other, states in text.items() if other != names]
    if not found:
        return None
    return TextStates(
        torch.cat([states.tokens for states in found]),
        torch.cat([states.pooled for states in found]),
    )


def _image(path: Path, row: TableRow) -> Path:
    """Return the image of a row.

    Raises:
        GatesError: There is none.
    """
    if not row.image_file:
        raise GatesError(f"line {row.line} of {label(path)} has no image_file: fill it in")
    image = inside(path.parent, row.image_file)
    if not image.is_file():
        raise GatesError(
            f"line {row.line} of {label(path)} names {row.image_file}, which is missing"
        )
    return image
