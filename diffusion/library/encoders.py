"""What a library asks of encoders; it knows none of them."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from diffusion.lora_file import LoraBundle


class WeightEncoder(Protocol):
    """Encodes an adapter by its weights into the space of a text encoder."""

    @property
    def family(self) -> str:
        """Family of models that it was trained on, such as ``flux``."""

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders only if all embeddings are; it decides what is encoded again."""

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""

    def refusal(self, bundle: LoraBundle) -> str | None:
        """Return why it cannot encode an adapter, in a few words; None if it can."""

    def encode(self, bundle: LoraBundle) -> Tensor:
        """Return the embedding (dim,) of unit length.

        Raises:
            LoraFileError: It cannot encode the adapter after all.
        """


class TextEncoder(Protocol):
    """Encodes prompts into the space in which adapters are found."""

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders only if all embeddings are."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (n, dim) of unit length."""
