"""Policies that drop tokens of the prompt, as NVIDIA/kvpress computes them or as published."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from language.scbench.policies.base import DroppingPolicy
from language.scbench.policies.cache import LayerState

ROWS = 128
"""Queries whose attention to all keys is in memory at once."""


def window_attention(layer: LayerState, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the attention (B, K, H / K, w, T) of the last w of T tokens, in float32."""
    window, length = queries.shape[2], keys.shape[2]
    grouped = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # keys are not repeated
    scores = (grouped @ keys.mT).float().unflatten(2, (-1, window)) * layer.scale
    future = torch.ones(window, length, dtype=torch.bool, device=keys.device)
    return scores.masked_fill_(future.triu_(length - window + 1), -torch.inf).softmax(-1)


def with_last(scores: Tensor, number: int) -> Tensor:
    """Append tokens that no score exceeds to scores (B, K, T)."""
    return F.pad(scores, (0, number), value=float(scores.max()) + 1)


@dataclass(frozen=True)
class SnapKVPolicy(DroppingPolicy):
    """Keeps what the last tokens attend to, and these (SnapKV, arXiv 2404.14469).

    Attributes:
        window: Last tokens.
        kernel: Tokens over which the attention is averaged, an odd number.
        variant: ``published`` chooses for every query head, and holds keys and values of each.
    """

    name: ClassVar[str] = "snapkv"
    certain: ClassVar[str] = "window"
    window: int = 32
    kernel: int = 5
    variant: str = "kvpress"

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score tokens by the attention around them."""
        votes = window_attention(layer, queries[:, :, -self.window :], keys)
        votes = votes[..., : -self.window].mean(-2)
        pooled = F.avg_pool1d(votes.flatten(1, 2), self.kernel, 1, self.kernel // 2)
        if self.variant == "kvpress":
            pooled = pooled.view_as(votes).mean(2)
        return with_last(pooled, self.window)


@dataclass(frozen=True)
class PyramidKVPolicy(SnapKVPolicy):
    """Keeps as `SnapKVPolicy` does, more in early layers than in late ones (arXiv 2406.02069).

    Attributes:
        beta: The last layer keeps 1 / beta of the mean, where the prompt is long enough.
        variant: ``published`` divides what is kept outside of the window, in whole steps.
    """

    name: ClassVar[str] = "pyramidkv"
    beta: int = 20

    def count(self, layer: LayerState, length: int) -> int:
        """Return the tokens that a layer keeps; their mean over layers is that of SnapKV."""
        mean, rest = super().count(layer, length), length - self.window
        published, gaps = self.variant == "published", max(1, layer.num_layers - 1)
        budget = float(mean - self.window) if published else self.keep * length
        least = budget // self.beta if published else budget / self.beta
        most = 2 * budget - least
        if most >= rest:
            most, least = rest, 2 * budget - rest
        if published:
            if length < 2 * budget:
                return mean
            return self.window + int(most - layer.index * ((most - least) // gaps))
        if not length >= most >= least >= self.window:
            return mean
        return round(most - layer.index * (most - least) / gaps)


@dataclass(frozen=True)
class H2OPolicy(DroppingPolicy):
    """Keeps the tokens that the prompt attends to most (H2O, arXiv 2306.14048).

    Attributes:
        variant: ``kvpress`` divides attention by the number of tokens that see a token;
            ``published`` does not, and keeps as many of the last tokens.
    """

    name: ClassVar[str] = "h2o"
    variant: str = "kvpress"

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score tokens by the attention of all tokens after them."""
        length = keys.shape[2]
        total = keys.new_zeros(*keys.shape[:3], dtype=torch.float)
        for start in range(0, length, ROWS):
            end = min(start + ROWS, length)
            part = window_attention(layer, queries[:, :, start:end], keys[:, :, :end])
            total[..., :end] += part.sum(-2).mean(2)
        if self.variant == "kvpress":
            return total / torch.arange(length, 0, -1, device=keys.device)
        last = self.count(layer, length) // 2
        return with_last(total[..., : length - last], last)


@dataclass(frozen=True)
class TOVAPolicy(DroppingPolicy):
    """Keeps what the last token attends to in all heads, and itself (TOVA, arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score tokens by the attention of the last one, averaged over heads."""
        votes = window_attention(layer, queries[:, :, -1:], keys)[..., 0, :-1].mean((1, 2))
        return with_last(votes.unsqueeze(1).expand(-1, keys.shape[1], -1), 1)


@dataclass(frozen=True)
class KNormPolicy(DroppingPolicy):
    """Keeps the tokens with the shortest keys (arXiv 2406.11430).

    Attributes:
        variant: ``published`` keeps all tokens in the first two layers.
    """

    name: ClassVar[str] = "knorm"
    variant: str = "kvpress"

    def count(self, layer: LayerState, length: int) -> int:
        """Return the tokens that a layer keeps."""
        whole = self.variant == "published" and layer.index < 2
        return length if whole else super().count(layer, length)

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score tokens by the length of their keys."""
        return -keys.float().norm(dim=-1)


@dataclass(frozen=True)
class KeyDiffPolicy(DroppingPolicy):
    """Keeps the tokens whose keys point away from their mean (KeyDiff, arXiv 2504.15364)."""

    name: ClassVar[str] = "keydiff"

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score tokens by the angle between their keys and the mean direction of keys."""
        keys = keys.float()
        return -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)


@dataclass(frozen=True)
class ChancePolicy(DroppingPolicy):
    """Keeps blocks of tokens by chance, which any policy must beat; a prompt has one draw.

    Attributes:
        block: Tokens of a block.
    """

    name: ClassVar[str] = "chance"
    block: int = 16

    def scores(self, layer: LayerState, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Score all tokens of a block alike."""
        batch, heads, length, _ = keys.shape
        draws = torch.Generator().manual_seed(zlib.crc32(keys.float().cpu().numpy().tobytes()))
        blocks = torch.rand(batch, heads, -(-length // self.block), generator=draws)
        return blocks.repeat_interleave(self.block, -1)[..., :length].to(keys.device)
