"""JSON of unknown origin: an object without duplicate keys and without NaN."""

import json
from collections import Counter
from typing import Any

from diffusion.lora_file.container.text import clean
from diffusion.lora_file.errors import ContainerError


def parse_json(raw: bytes | str, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: UTF-8 or text.
        source: What it is, for messages.

    Raises:
        ContainerError: It is damaged, is not an object, is nested too deeply or names a key twice.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ContainerError(
            f"{source} is not valid JSON: {clean(reason, 200)}; get the file again"
        ) from error
    if not isinstance(content, dict):
        raise ContainerError(
            f"{source} is a JSON {type(content).__name__}, expected an object; get the file again"
        )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")
