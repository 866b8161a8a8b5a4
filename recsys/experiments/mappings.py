"""Arguments that are mappings, in settings: under dotted names where these tell all, else whole.

``options: {dim: 8}`` is the setting ``model.options.dim``. A setting that is None is as good as
absent, and a dot separates names, so that ``{norm: null}`` or ``{"a.b": 1}`` stay in one piece: the
setting ``model.options``. Otherwise they would be taken for ``{}`` and for ``{a: {b: 1}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any


def with_whole_mappings(
    settings: Mapping[str, Any], prefix: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings in which a mapping that dotted names cannot tell is one setting.

    Args:
        settings: Under dotted names.
        prefix: Of the names of the arguments, such as ``model.``.
        arguments: By name, as they were given.
    """
    found = dict(settings)
    for name, value in arguments.items():
        if isinstance(value, Mapping) and not _has_plain_names(value):
            found = {n: v for n, v in found.items() if not n.startswith(f"{prefix}{name}.")}
            found[f"{prefix}{name}"] = dict(value)
    return found


def mapping_in(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping of this name, whole or under dotted names; empty if there is none."""
    return dict(settings.get(name) or nested(settings, f"{name}."))


def nested(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings below a prefix as nested mappings, such as options of a network.

    Where one is whole and has dotted names, too, these replace its values.
    """
    found: dict[str, Any] = {}
    for name in sorted(name for name in settings if name.startswith(prefix)):
        *path, last = name.removeprefix(prefix).split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = deepcopy(settings[name])
    return found


def _has_plain_names(value: Any) -> bool:
    """Return whether a value is the same after it was put under dotted names and nested again."""
    if isinstance(value, Mapping):
        return all(
            isinstance(name, str) and name and "." not in name and _has_plain_names(one)
            for name, one in value.items()
        )
    return value is not None
