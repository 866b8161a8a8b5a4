"""Policies that keep everything, and read a part of it for each token that is generated."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.seer.decode import BlockSelector
from core_gates.attention.seer.gate import pool_blocks
from core_gates.errors import GatesError
from harness.files import content_digest
from language.hf.locate import attached, base_of
from language.scbench.policies.base import KVPolicy, kept_tokens
from language.scbench.policies.cache import LayerState, take_gates_back
from language.scbench.policies.dropping import window_attention
from language.seer.attach import BlockGate, block_gates, choose_blocks
from language.seer.attention import CHILD
from language.seer.attention import NAME as BLOCKS
from language.seer.block_files import load_block_gates
from language.seer.cache import BlockCache
from language.seer.rivals import page_bound

LEAST = 3
"""Pages that are read at least."""


@dataclass(frozen=True)
class ReadingPolicy(KVPolicy):
    """Reads the pages with the highest scores, and the last one.

    A policy of this kind is a subclass with a ``name`` and `page_scores`.

    Attributes:
        keep: Fraction of the pages that is read, above 0 and at most 1; three are at least.
        page: Tokens of a page.
    """

    keep: float = 0.5
    page: int = 16  # type: ignore[misc]

    def page_scores(self, layer: LayerState, queries: Tensor, keys: Tensor) -> Tensor:
        """Return scores (B, K, N) of pages, see `KVPolicy.decode`; the last may be left out."""
        raise NotImplementedError

    def decode(self, layer: LayerState, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Return the pages with the highest scores."""
        pages = -(-keys.shape[2] // self.page)
        number = max(LEAST, kept_tokens(self.keep, pages))
        if number >= pages:
            return None
        scores = self.page_scores(layer, queries, keys)[..., : pages - 1]
        best = scores.topk(number - 1, dim=-1).indices
        read = torch.zeros(*scores.shape[:-1], pages, dtype=torch.bool, device=keys.device)
        read[..., -1] = True
        return read.scatter(-1, best, True)


@dataclass(frozen=True)
class QuestPolicy(ReadingPolicy):
    """Scores pages by an upper bound of their scores (Quest, arXiv 2406.10774)."""

    name: ClassVar[str] = "quest"

    def page_scores(self, layer: LayerState, queries: Tensor, keys: Tensor) -> Tensor:
        """Score complete pages, whose bounds are held."""
        bounds = layer.held.get("bounds")
        before = 0 if bounds is None else bounds.shape[1]
        new = keys[:, :, before * self.page : keys.shape[2] // self.page * self.page]
        if new.shape[2]:
            added = pool_blocks(new.transpose(1, 2), self.page, ("max", "min"))
            bounds = added if bounds is None else torch.cat([bounds, added], 1)
            layer.held["bounds"] = bounds
        largest, smallest = layer.held["bounds"].chunk(2, -1)
        grouped = queries.transpose(1, 2).unflatten(2, (keys.shape[1], -1))
        return page_bound(grouped, smallest, largest)[:, :, 0]


@dataclass(frozen=True)
class OraclePolicy(ReadingPolicy):
    """Scores pages by their largest attention, which no method knows before it attends."""

    name: ClassVar[str] = "oracle"

    def page_scores(self, layer: LayerState, queries: Tensor, keys: Tensor) -> Tensor:
        """Score all pages, after attending to all keys."""
        weights = window_attention(layer, queries, keys)[..., 0, :].amax(2)
        return (
            F.pad(weights, (0, -weights.shape[-1] % self.page))
            .unflatten(-1, (-1, self.page))
            .amax(-1)
        )


class SinkSelector(BlockSelector):
    """Selects the first blocks, and others by their logits.

    Args:
        keep: Fraction of the blocks of a sequence that is selected.
        sinks: First blocks, padding left out.
    """

    def __init__(self, keep: float, sinks: int) -> None:
        super().__init__(k=1, dense_rows=0)
        self.keep, self.sinks = keep, sinks

    def forward(self, logits: Tensor) -> Tensor:
        """Return the mask of the selected blocks, see `BlockSelector.forward`."""
        self.value = kept_tokens(self.keep, logits.shape[-1])
        return super().forward(logits)


class SeerCache(BlockCache):
    """The cache of block gates, with what is measured of caches of policies.

    Attributes:
        seconds: 0: nothing is compressed at the end of the prompt.
    """

    seconds = 0.0

    def __init__(self, gates: Iterable[BlockGate]) -> None:
        gates = list(gates)
        super().__init__(max(gate.layer for gate in gates) + 1, gates[0].gate.block_size)
        self._gates = [weakref.ref(gate) for gate in gates]  # which copies of the cache share

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens, see `BlockCache`.

        Raises:
            GatesError: Another cache was made since, which took the gates off.
        """
        if any(gate() is None for gate in self._gates):
            raise GatesError(
                "the gates of this cache were taken off when another was made: make a new one by"
                " policy.make_cache(model), and use it before the next"
            )
        return super().update(*args, **kwargs)  # type: ignore[no-any-return]

    @property
    def read(self) -> float | None:
        """Mean fraction of the blocks that later calls have read; None before the first."""
        gates = [gate for ref in self._gates if (gate := ref()) is not None]
        seen = [1.0 if gate.selector is None else gate.density for gate in gates]
        known = [density for density in seen if density is not None]
        return sum(known) / len(known) if known else None

    @property
    def full_bytes(self) -> int:
        """Bytes of keys and values of all tokens."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers[:-1])

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that it holds."""
        parts = [(x.keys, x.values, *(x.compressed or ())) for x in self.layers]
        return [tensor for part in parts for tensor in part if tensor is not None]


@dataclass(frozen=True)
class SeerPolicy(KVPolicy):
    """Lets gates choose the blocks that are read (SeerAttention-R, arXiv 2506.08889).

    The model has gates for decoding, see `language.seer.attach.attach_block_gates`, or gets those
    of a file until the next cache is made. It must lose others by ``detach_block_gates`` before it
    attends by another policy.

    Attributes:
        keep: Fraction of the blocks that is read, next to the own one.
        sinks: First blocks that are read in any case.
        gates: File of `language.seer.block_files.save_block_gates`, for a model without gates.
    """

    name: ClassVar[str] = "seer"
    keep: float = 0.5
    sinks: int = 1
    gates: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return what decides its answers: the content of the file, too."""
        digest = None if self.gates is None else content_digest(Path(self.gates)).sha256
        return {**super().settings(), "gates": digest}

    def make_cache(self, model: nn.Module) -> Any:
        """Return a cache, see `KVPolicy.make_cache`.

        Raises:
            GatesError: The model has no gates for decoding, or does not fit those of the file.
        """
        take_gates_back(model)
        if self.gates is not None and not attached(model, CHILD, BlockGate):
            for gate in load_block_gates(model, self.gates).values():
                gate.lent = True
        gates = list(block_gates(model).values())
        if gates[0].kind != "decode":
            raise GatesError(
                "the block gates of the model choose for prompts, expected gates for decoding:"
                " detach_block_gates(model), then attach_block_gates(model, 'decode')"
            )
        base_of(model).set_attn_implementation(BLOCKS)
        choose_blocks(model, None if self.exact else SinkSelector(self.keep, self.sinks), every=1)
        return SeerCache(gates)
