"""Captions of adapters, each embedded once by a frozen text encoder."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.lora_file import LoraBundle
from diffusion.lora_file.container.text import clean
from diffusion.lora_file.errors import LoraFileError

AT_A_TIME = 256


class TextEncoder(Protocol):
    """A frozen encoder of texts, whose space adapters are put into."""

    @property
    def fingerprint(self) -> str:
        """Digits that decide whether two encoders give the same vectors."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return vectors of unit length (n, text_dim)."""


class Example(NamedTuple):
    """An adapter with what describes images that are made with it.

    Attributes:
        bundle: The adapter.
        captions: Texts, at least one.
        concept: What it was trained for; adapters of one concept are no negatives of each other.
        weights: How often each caption is drawn, relative to the others; equally often if None.
    """

    bundle: LoraBundle
    captions: Sequence[str]
    concept: str
    weights: Sequence[float] | None = None


class Captions:
    """The embedded captions of adapters.

    Args:
        examples: Adapters with captions.
        encoder: Embeds each different text once.

    Attributes:
        embeddings: (C, text_dim), one row per different text.
        index: (n, K) rows of the captions of each adapter, padded.
        weights: (n, K) how often each is drawn, 0 for padding.

    Raises:
        LoraFileError: An adapter has no caption, or the text encoder returns something else.
    """

    def __init__(self, examples: Sequence[Example], encoder: TextEncoder) -> None:
        for number, example in enumerate(examples):
            if not any(caption.strip() for caption in example.captions):
                name = clean(example.concept, 60)
                raise LoraFileError(f"adapter {number + 1} ({name}) has no caption: give it one")
        texts = {text: None for example in examples for text in example.captions}
        rows = {text: number for number, text in enumerate(texts)}
        self.texts = list(rows)
        self.embeddings = embedded(self.texts, encoder)
        most = max(len(example.captions) for example in examples)
        self.index = torch.zeros(len(examples), most, dtype=torch.int64)
        self.weights = torch.zeros(len(examples), most)
        for number, example in enumerate(examples):
            own = torch.tensor([rows[text] for text in example.captions])
            self.index[number, : len(own)] = own
            given = example.weights
            self.weights[number, : len(own)] = 1.0 if given is None else torch.tensor(given)

    def draw(self, adapters: Tensor) -> Tensor:
        """Return the embedding (n, text_dim) of a random caption of each adapter."""
        chosen = torch.multinomial(self.weights[adapters], 1)
        return self.embeddings[self.index[adapters].gather(1, chosen)[:, 0]]

    def all(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of all captions (Q, text_dim), and the adapter of each (Q,)."""
        adapters, places = self.weights.nonzero(as_tuple=True)
        return self.embeddings[self.index[adapters, places]], adapters


def embedded(texts: Sequence[str], encoder: TextEncoder) -> Tensor:
    """Return the embeddings (n, text_dim) of texts.

    Raises:
        LoraFileError: The encoder returns something else than finite vectors of unit length.
    """
    parts = [
        encoder.embed(texts[start : start + AT_A_TIME]).detach().float().cpu()
        for start in range(0, len(texts), AT_A_TIME)
    ]
    found = torch.cat(parts)
    if len(found) != len(texts) or not (found.norm(dim=1) - 1).abs().lt(1e-3).all():
        raise LoraFileError(
            f"the text encoder returned {tuple(found.shape)} for {len(texts)} texts, expected one "
            "finite vector of unit length each"
        )
    return found
