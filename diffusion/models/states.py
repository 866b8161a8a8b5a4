"""What a text encoder gives, and what one is."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

BATCH = 256


class TextStates(NamedTuple):
    """What a diffusion transformer is told about captions.

    Attributes:
        tokens: (N, L, D) states of tokens; those of padding are 0.
        pooled: (N, D) of length 1.
    """

    tokens: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Any) -> "TextStates":  # type: ignore[override]
        """Return the states of some captions."""
        return self.of(rows)

    def of(self, rows: Any) -> "TextStates":
        """Return the states of some captions, where types are checked."""
        return TextStates(self.tokens[rows], self.pooled[rows])


class TextEncoder(Protocol):
    """A frozen text encoder.

    Attributes:
        dim: Features of a state.
        fingerprint: 16 hexadecimal digits that tell it from others.
    """

    dim: int
    fingerprint: str

    def encode(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Return the pooled states (N, D) of captions, of length 1."""
