"""What the metadata of a file tells about an adapter: text of unknown origin, kept short."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion.lora_file import ContainerError
from diffusion.lora_file.container import clean, parse_json

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
    """Return what the metadata tells, by the keys of ModelSpec and kohya."""
    folders, counted = _frequencies(metadata.get("ss_tag_frequency", ""))
    stated = metadata.get("modelspec.trigger_phrase", "").split(",")
    title = metadata.get("modelspec.title") or metadata.get("ss_output_name") or ""
    comment = (metadata.get("modelspec.description", ""), metadata.get("ss_training_comment", ""))
    return Description(
        clean(title, TITLE).strip(),
        _phrases([*stated, *folders], TRIGGERS),
        _phrases([*metadata.get("modelspec.tags", "").split(","), *counted], TAGS),
        clean(metadata.get("modelspec.license", ""), PHRASE).strip(),
        clean(" ".join(filter(None, comment)), TEXT).strip(),
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


def _frequencies(raw: str) -> tuple[list[str], list[str]]:
    """Return the instance names of kohya's folders, and the tags by their number.

    The JSON maps folders such as ``10_sks dog`` to tags and how often each occurs.
    """
    try:
        content = parse_json(raw, "ss_tag_frequency") if raw else {}
    except ContainerError:
        return [], []
    names, counts = [], Counter[str]()
    for folder, tags in content.items():
        repeats, mark, name = folder.partition("_")
        if mark and repeats.isdecimal():
            names.append(name)
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] += count if type(count) is int and 0 < count < 2**31 else 1
    return names, [tag for tag, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
