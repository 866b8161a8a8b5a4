"""A library that images are made with, and why an adapter was found in it."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion.library import LoraLibrary, Match, Results
from diffusion.library.prompts import COMMON
from diffusion.lora_file import LoraBundle

_WORD = re.compile(r"\w{3,}")


class Finder:
    """A library that keeps what it found last, with the scores of all parts of the search.

    Args:
        library: Of adapters, indexed.
        by: What is compared, see `LoraLibrary.search`.

    Attributes:
        found: What was found last.
    """

    def __init__(self, library: LoraLibrary, by: str = "names") -> None:
        self.library, self.by = library, by
        self.found: Results[Match] = Results((), "")

    def search(self, prompt: str, k: int = 3, *, whole: bool = False) -> Results[Match]:
        """Return the adapters that suit a prompt best, the best first."""
        self.found = self.library.search(prompt, k, self.by, whole=whole)
        return self.found

    def similarities(self, names: Sequence[str]) -> tuple[np.ndarray, str]:
        """Return the cosines of adapters with each other, and the fingerprint of the encoder."""
        return self.library.similarities(names)

    def load(self, name: str) -> LoraBundle:
        """Read an adapter."""
        return self.library.load(name)

    def described(self, name: str, prompt: str) -> dict[str, Any]:
        """Return an adapter's metadata and why the search found it, as plain values.

        Args:
            name: Of the adapter.
            prompt: That it was found by, if it was.
        """
        adapter = self.library.find(name)
        match = next((item for item in self.found if item.name == name), None)
        texts = [adapter.title, *adapter.triggers, *adapter.tags]
        words = {word.lower() for text in texts for word in _WORD.findall(text)} - COMMON
        shared = [word for word in dict.fromkeys(_WORD.findall(prompt.lower())) if word in words]
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
    parts = [f"named: {match.named}"] if match.named else []
    if match.weights is not None:
        parts.append(f"cosine of its weights and the prompt {match.weights:.2f}")
    if match.metadata is not None:
        parts.append(f"metadata hold {match.metadata:.0%} of the words")
    if match.metadata is not None and shared:
        parts.append(f"words: {', '.join(shared)}")
    return "; ".join(parts)
