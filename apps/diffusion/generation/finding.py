"""Adapters that a search has found, and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffusion.library import LoraLibrary, Match, Results
from diffusion.lora_file import LoraBundle

_WORD = re.compile(r"\w{3,}")


class Finder:
    """A library that keeps what it found last, with the scores of all parts of the search.

    Args:
        library: Of adapters, indexed.

    Attributes:
        matches: Name -> match of the last search.
        notice: What its reader has to know; empty if there is nothing.
    """

    def __init__(self, library: LoraLibrary) -> None:
        self.library = library
        self.matches: dict[str, Match] = {}
        self.notice = ""

    def search(self, prompt: str, k: int = 3) -> Results[Match]:
        """Return the adapters that suit a prompt best, the best first."""
        found = self.library.search(prompt, k)
        self.matches = {match.name: match for match in found}
        self.notice = found.notice
        return found

    def load(self, name: str) -> LoraBundle:
        """Read an adapter."""
        return self.library.load(name)

    def described(self, name: str, prompt: str) -> dict[str, Any]:
        """Return what is known about an adapter, and why it was found, as plain values.

        Args:
            name: Of the adapter.
            prompt: That it was found by, if it was.
        """
        adapter, match = self.library.find(name), self.matches.get(name)
        shared = shared_words(prompt, [adapter.title, *adapter.triggers, *adapter.tags])
        return {
            "title": adapter.title,
            "license": adapter.license,
            "triggers": list(adapter.triggers),
            "sha256": adapter.sha256,
            "weights": None if match is None else match.weights,
            "metadata": None if match is None else match.metadata,
            "why": reason(match, shared),
        }


def reason(match: Match | None, shared: Sequence[str]) -> str:
    """Return in words why an adapter takes part.

    Args:
        match: Of the search; None if the adapter was named.
        shared: Words of the prompt that its metadata hold.
    """
    if match is None:
        return "it was named"
    parts = []
    if match.weights is not None:
        parts.append(f"cosine of its weights and the prompt {match.weights:.2f}")
    if match.metadata is not None:
        parts.append(f"metadata {match.metadata:.0%} of the best")
    if match.metadata is not None and shared:
        parts.append(f"words: {', '.join(shared)}")
    return "; ".join(parts)


def shared_words(prompt: str, texts: Sequence[str]) -> list[str]:
    """Return the words of a prompt, of three letters or more, that some texts hold."""
    known = {word.lower() for text in texts for word in _WORD.findall(text)}
    return list(dict.fromkeys(w for w in _WORD.findall(prompt.lower()) if w in known))
