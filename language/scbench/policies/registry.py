"""The policies by name."""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from core_gates.errors import GatesError, check_option
from language.scbench.policies.base import FullPolicy, KVPolicy, StreamingPolicy
from language.scbench.policies.dropping import (
    ChancePolicy,
    H2OPolicy,
    KeyDiffPolicy,
    KNormPolicy,
    PyramidKVPolicy,
    SnapKVPolicy,
    TOVAPolicy,
)
from language.scbench.policies.kivi import KIVIPolicy
from language.scbench.policies.patterns import AShapePolicy, TriShapePolicy
from language.scbench.policies.reading import OraclePolicy, QuestPolicy, SeerPolicy

KINDS: tuple[type[KVPolicy], ...] = (
    *(FullPolicy, StreamingPolicy, SnapKVPolicy, PyramidKVPolicy, H2OPolicy),
    *(TOVAPolicy, KNormPolicy, KeyDiffPolicy, ChancePolicy),
    *(KIVIPolicy, QuestPolicy, OraclePolicy, SeerPolicy, AShapePolicy, TriShapePolicy),
)

POLICIES: Mapping[str, type[KVPolicy]] = MappingProxyType({kind.name: kind for kind in KINDS})
"""All policies."""


def policy_of(name: str, **options: Any) -> KVPolicy:
    """Return a policy with its options, such as ``policy_of("snapkv", keep=0.5)``.

    Raises:
        GatesError: There is no such policy or option, or a value is out of range.
    """
    check_option("policy", name, POLICIES, GatesError)
    kind = POLICIES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise GatesError(f"policy {name!r} has no option {option!r}; {has}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise GatesError(f"policy {name!r}: {error}") from error
