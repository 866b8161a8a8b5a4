"""Differences between two descriptions in JSON, for messages of one line."""

import json
import re
from typing import Any


def differences(found: str, expected: str) -> str:
    """Return which facts differ, such as ``cycles 24 instead of 420``.

    Args:
        found: JSON object, as read from a file; anything else is named as it is.
        expected: JSON object.
    """
    try:
        left, right = _facts(json.loads(found)), _facts(json.loads(expected))
    except (ValueError, AttributeError):
        return f"{found} instead of {expected}"
    names = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
    return ", ".join(
        f"{name} {left.get(name, 'absent')} instead of {right.get(name, 'absent')}"
        for name in names
    )


def _facts(content: dict[str, Any]) -> dict[str, Any]:
    """Return the facts, the arguments of a description ``Name(a=1, b=2)`` one by one."""
    facts: dict[str, Any] = {}
    for name, value in content.items():
        described = re.fullmatch(r"(\w+)\((.*)\)", value) if isinstance(value, str) else None
        if described is None:
            facts[name] = value
            continue
        facts[name] = described[1]
        for argument in described[2].split(", "):
            key, _, setting = argument.partition("=")
            facts[f"{name}.{key}"] = setting
    return facts
