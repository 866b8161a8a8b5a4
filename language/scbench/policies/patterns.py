"""Policies that read less of a prompt while it is read, in fixed patterns; they keep all of it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import GatesError
from language.scbench.policies.base import KVPolicy, kept_tokens
from language.scbench.policies.cache import LayerState

ROWS = 256
"""Queries that attend at once."""


@dataclass(frozen=True)
class AShapePolicy(KVPolicy):
    """Lets each token of a prompt attend to the first tokens and to those right before it.

    Attributes:
        keep: Tokens that are attended to as a fraction of the prompt, in place of ``window``.
        sinks: First tokens.
        window: Tokens before, itself included.
        last: The last tokens, which attend to everything.
    """

    name: ClassVar[str] = "a-shape"
    last: ClassVar[int] = 0
    keep: float | None = None
    sinks: int = 128
    window: int = 3968

    def require(self, length: int) -> None:
        """Refuse a prompt of which nothing but the first tokens is attended to."""
        if self.keep is not None and (kept := kept_tokens(self.keep, length)) <= self.sinks:
            raise GatesError(
                f"sinks of {self.name!r} is {self.sinks}, expected fewer than the {kept} of"
                f" {length} tokens that keep={self.keep} keeps: keep more or give less sinks"
            )

    def attend(
        self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor | None:
        """Return the attention of a prompt (B, H, T, D), some rows at a time."""
        length, sinks, window = keys.shape[2], self.sinks, self.window
        self.require(length)
        if self.keep is not None:
            window = kept_tokens(self.keep, length) - sinks
        if sinks + window >= length:
            return None
        out, dense = [], max(0, length - self.last)
        for start in [*range(0, dense, ROWS), *([dense] if dense < length else [])]:
            end = min(start + ROWS, dense) if start < dense else length
            first = 0 if start == dense else max(start - window + 1, sinks)
            key = torch.arange(length, device=keys.device)
            key = key[:end] if first <= sinks else torch.cat([key[:sinks], key[first:end]])
            row = torch.arange(start, end, device=keys.device)[:, None]
            near = (key < sinks) | (key > row - window) | (row >= dense)
            out.append(
                F.scaled_dot_product_attention(
                    queries[:, :, start:end], keys[:, :, key], values[:, :, key],
                    attn_mask=near & (key <= row), scale=layer.scale,
                    enable_gqa=keys.shape[1] < queries.shape[1],
                )
            )  # fmt: skip
        return torch.cat(out, 2)


@dataclass(frozen=True)
class TriShapePolicy(AShapePolicy):
    """Attends as `AShapePolicy` does, but the last tokens to everything (arXiv 2412.10319).

    Attributes:
        last: The last tokens.
    """

    name: ClassVar[str] = "tri-shape"
    last: int = 100  # type: ignore[misc]
