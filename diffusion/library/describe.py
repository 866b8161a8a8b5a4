"""What the metadata of a file tells about an adapter, cut to what an index keeps."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion.lora_file import inspection
from diffusion.lora_file.container import clean

TITLE, PHRASE, TEXT = 200, 120, 2_000
"""Characters that are kept of a title, of a tag or trigger, and of a description."""
TRIGGERS, TAGS = 16, 64
"""Triggers and tags that are kept."""


class Description(NamedTuple):
    """What a file tells about itself; everything may be empty.

    Attributes:
        title: As given by its author.
        triggers: Words that a prompt should hold.
        tags: The most frequent first.
        license: Such as ``CC0-1.0``.
        text: Description and comment.
    """

    title: str = ""
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str = ""
    text: str = ""


NOTHING_TOLD = Description()


def describe(metadata: Mapping[str, str]) -> Description:
    """Return what the metadata tells; names of kohya's folders count as triggers."""
    told = inspection.describe(metadata)
    stated = [tag for tag, count in told.tags.items() if not count]
    return Description(
        clean(told.title, TITLE).strip(),
        _phrases([*told.triggers, *told.folders], TRIGGERS),
        _phrases([*stated, *told.tags], TAGS),
        clean(told.license, PHRASE).strip(),
        clean(told.comment, TEXT).strip(),
    )


def _phrases(texts: Iterable[str], most: int) -> tuple[str, ...]:
    """Return texts without repetition, whatever their case."""
    kept: dict[str, str] = {}
    for text in texts:
        if phrase := clean(text, PHRASE).strip():
            kept.setdefault(phrase.casefold(), phrase)
        if len(kept) == most:
            break
    return tuple(kept.values())
