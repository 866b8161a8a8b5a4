"""A short transformer over past items."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import check_at_least, check_option
from recsys.sequence.encoder import HistoryEncoder


class TransformerEncoder(HistoryEncoder):
    """One or two layers of self-attention over the events, then one vector.

    Positions are learned and count from the newest event, so that padding at the front changes
    nothing. A history without events gives a learned vector.

    Args:
        dim: Features d of an item.
        max_length: Largest number of events.
        layers: Number of layers.
        heads: Heads of the attention.
        width: Features W within the transformer, and of the result; ``dim`` if None.
        pool: ``last``: what the newest event has become, the same for all candidates; ``target``:
            attention of the item to be ranked.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, or the heads do not divide the width.
    """

    def __init__(
        self,
        dim: int,
        *,
        max_length: int = 50,
        layers: int = 1,
        heads: int = 1,
        width: int | None = None,
        pool: Literal["last", "target"] = "last",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = dim if width is None else width
        check_at_least(1, dim=dim, max_length=max_length, layers=layers, heads=heads, width=width)
        check_option("pool", pool, ("last", "target"))
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        super().__init__(dim, width)
        self.pool, self.needs_target = pool, pool == "target"
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.enter = nn.Linear(dim, width, **options)
        self.positions = nn.Parameter(torch.empty(max_length, width, **options))
        self.empty = nn.Parameter(torch.zeros(width, **options))
        self.layers = nn.ModuleList(_Layer(width, heads, **options) for _ in range(layers))
        self.norm = nn.LayerNorm(width, **options)
        self.query = nn.Linear(dim, width, bias=False, **options) if pool == "target" else None
        nn.init.normal_(self.positions, std=0.02)

    def states(self, events: Tensor, mask: Tensor) -> Tensor:
        """Return what each event has become (B, L, W).

        Raises:
            ValueError: There are more events than positions.
        """
        length = events.shape[1]
        if length > len(self.positions):
            raise ValueError(
                f"a history of {length} events is longer than max_length={len(self.positions)}"
            )
        x = self.enter(events) + self.positions[len(self.positions) - length :]
        allowed = mask | ~mask.any(1, keepdim=True)  # a softmax over nothing would be NaN
        for layer in self.layers:
            x = layer(x, allowed)
        return self.norm(x)

    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        """Return the state of the newest event, or the attention of the target to all, (B, W).

        Raises:
            ValueError: There is no target where it is needed.
        """
        full = mask.any(1, keepdim=True)
        if self.query is None:
            order = torch.arange(mask.shape[1], device=mask.device)
            newest = (order * mask).argmax(1)[:, None, None].expand(-1, 1, states.shape[-1])
            return torch.where(full, states.gather(1, newest).squeeze(1), self.empty)
        if target is None:
            raise ValueError("pool='target' needs the embedding of the item to be ranked")
        scores = (states @ self.query(target).unsqueeze(-1)).squeeze(-1) * states.shape[-1] ** -0.5
        weights = scores.masked_fill(~(mask | ~full), -torch.inf).softmax(1)
        return torch.where(full, (weights.unsqueeze(1) @ states).squeeze(1), self.empty)


class _Layer(nn.Module):
    """Attention and a network of four times the width, each on normalized input and added."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, **options)
        self.project = nn.Linear(width, 3 * width, **options)
        self.leave = nn.Linear(width, width, **options)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, **options),
            nn.Linear(width, 4 * width, **options),
            nn.GELU(),
            nn.Linear(4 * width, width, **options),
        )

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Return the layer of events (B, L, W), which see those that are allowed (B, L)."""
        heads = self.project(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, allowed[:, None, None, :])
        x = x + self.leave(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(x)
