"""What people wrote into the header of a file: its title, triggers, tags and license."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion.lora_file.container import clean

_TITLES = ("modelspec.title", "ss_output_name", "name")
_TRIGGERS = (
    "modelspec.trigger_phrase",
    "modelspec.trigger_word",
    "ss_trigger_words",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
)
_LICENSES = ("modelspec.license", "license")
_BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_COMMENTS = ("modelspec.description", "ss_training_comment", "description")
_AUTHORS = ("modelspec.author", "author")
_REPEATS = re.compile(r"\d+_(.+)", re.DOTALL)
_FREQUENCIES, _TAGS = "ss_tag_frequency", "modelspec.tags"
_NOTHING = {"", "none", "null", "undefined"}
MAX_TEXT, MAX_COMMENT, MAX_TAGS = 400, 2_000, 1_000


class Description(NamedTuple):
    """What the metadata of a file tell about it, without control characters.

    Attributes:
        title: Its name.
        triggers: Words that belong into a prompt.
        tags: Tag to the number of training images with it, the most frequent first; 0 for a tag
            that is given without a number.
        folders: Names of folders of training images, such as ``sks dog`` of ``10_sks dog``; kohya's
            trainers take them as captions where there are no others.
        license: As stated.
        base: What it was trained on, as stated.
        comment: What the author and the trainer say about it.
        author: Who made it.
    """

    title: str = ""
    triggers: tuple[str, ...] = ()
    tags: Mapping[str, int] = {}
    folders: tuple[str, ...] = ()
    license: str = ""
    base: str = ""
    comment: str = ""
    author: str = ""


def describe(metadata: Mapping[str, str]) -> Description:
    """Return what metadata tell; what is damaged is passed over.

    Args:
        metadata: Of the header, see ``SafetensorsFile.metadata``.
    """
    frequencies = _json(metadata.get(_FREQUENCIES, ""))
    tags: Counter[str] = Counter()
    folders = []
    for folder, counts in frequencies.items() if isinstance(frequencies, dict) else ():
        if kohya := _REPEATS.match(folder):
            folders.append(clean(kohya[1], MAX_TEXT).strip())
        if isinstance(counts, dict):
            tags.update(_counted(counts))
    stated = dict.fromkeys(_words(metadata.get(_TAGS, "")), 0)
    triggers = [word for key in _TRIGGERS for word in _words(metadata.get(key, ""))]
    return Description(
        _first(metadata, _TITLES),
        tuple(dict.fromkeys(triggers)),
        dict(tags.most_common(MAX_TAGS)) | {t: n for t, n in stated.items() if t not in tags},
        tuple(dict.fromkeys(folder for folder in folders if folder)),
        _first(metadata, _LICENSES),
        _first(metadata, _BASES),
        " ".join(_stated(metadata, _COMMENTS))[:MAX_COMMENT],
        _first(metadata, _AUTHORS),
    )


def _counted(counts: Mapping[str, Any]) -> Counter[str]:
    """Return tags with their numbers; kohya's trainers keep the blanks around them."""
    found: Counter[str] = Counter()
    for tag, count in counts.items():
        word = clean(str(tag), MAX_TEXT).strip()
        if word and type(count) is int and 0 < count < 2**53:
            found[word] += count
    return found


def _words(text: str) -> list[str]:
    """Return the words of a list in JSON, or of a text with commas."""
    parsed = _json(text) if text.lstrip().startswith("[") else None
    words = parsed if isinstance(parsed, list) else text.split(",")
    found = [clean(word, MAX_TEXT).strip() for word in words if isinstance(word, str)]
    return [word for word in found if word.lower() not in _NOTHING]


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next(iter(_stated(metadata, keys)), "")[:MAX_TEXT].strip()


def _stated(metadata: Mapping[str, str], keys: tuple[str, ...]) -> list[str]:
    found = (clean(metadata.get(key, "")).strip() for key in keys)
    return list(dict.fromkeys(text for text in found if text.lower() not in _NOTHING))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
