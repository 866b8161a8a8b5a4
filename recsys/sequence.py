"""Encoders of histories: mean, target attention, short transformer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import check_at_least, check_option
from recsys.schema import History


class HistoryEncoder(nn.Module, ABC):
    """From the embeddings of past items (B, L, d) to one vector (B, O); newest event last.

    What depends on the history alone, ``states``, is computed once for all candidates; ``pooled``
    follows for each. A history without events gives a finite vector with finite gradients.

    Args:
        dim: Features d of an item.
        out_dim: Features O of the result.

    Attributes:
        needs_target: Whether the result depends on the item to be ranked.
    """

    needs_target = False

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim

    def states(self, events: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """Return what is kept of each event (B, L, W); the events themselves here.

        Args:
            events: Embeddings (B, L, d).
            mask: True (B, L) where there is an event.
        """
        return events

    @abstractmethod
    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        """Return one vector (B, O).

        Args:
            states: From `states` (B, L, W); (1, L, W) of one user for B targets.
            mask: True where there is an event, (B, L) or (1, L).
            target: Embedding of the item to be ranked (B, d), where it is needed.
        """

    def forward(self, events: Tensor, mask: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the vectors (B, O) of histories, see `states` and `pooled`."""
        return self.pooled(self.states(events, mask), mask, target)


class MeanEncoder(HistoryEncoder):
    """The mean of the embeddings of all events; zeros where there are none.

    Args:
        dim: Features d of an item, and of the result.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the means (B, d)."""
        weights = mask.to(states.dtype)
        total = (weights.unsqueeze(1) @ states).squeeze(1)
        return total / weights.sum(1, keepdim=True).clamp(min=1)


class TargetAttention(HistoryEncoder):
    """A weighted sum of past items, the weights from a network of event and target (DIN).

    ``Σ_l a_l h_l`` with ``a_l = w SiLU(W [h_l, t, h_l − t, h_l ⊙ t] + b) + c`` (Zhou et al., KDD
    2018, section 4.3, there with PReLU or Dice). W splits into a matrix for h, one for t and one
    for their product, so that what depends on one of them alone is computed once. Without events
    the result is zero.

    Args:
        dim: Features d of an item, and of the result.
        hidden_dim: Features of the hidden layer.
        softmax: Whether the weights are normalized over the events; not in the paper, whose weights
            keep how strongly the history speaks for the target.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1.
    """

    needs_target = True

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int = 32,
        softmax: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_at_least(1, dim=dim, hidden_dim=hidden_dim)
        super().__init__(dim, dim)
        self.softmax = softmax
        self.hidden = nn.Linear(4 * dim, hidden_dim, device=device, dtype=dtype)
        self.score = nn.Linear(hidden_dim, 1, device=device, dtype=dtype)

    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        """Return the weighted sums (B, d) of events (B, L, d), or (1, L, d) of one user.

        Raises:
            ValueError: There is no target.
        """
        if target is None:
            raise ValueError("target attention needs the embedding of the item to be ranked")
        return (self.weights(states, mask, target).unsqueeze(1) @ states).squeeze(1)

    def weights(self, events: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Return the weight (B, L) of each event, zero where there is none."""
        event, item, difference, product = self.hidden.weight.chunk(4, 1)
        of_event = F.linear(events, event + difference, self.hidden.bias)
        of_target = F.linear(target, item - difference).unsqueeze(1)
        both = F.linear(events * target.unsqueeze(1), product)
        scores = self.score(F.silu(of_event + of_target + both)).squeeze(-1)
        if not self.softmax:
            return scores * mask
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~mask, lowest).softmax(1) * mask


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


def build_encoder(
    history: History,
    dim: int,
    options: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> HistoryEncoder:
    """Return the encoder of a history.

    Args:
        history: History, which names the encoder.
        dim: Features of its items.
        options: Further arguments of the encoder, by name.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: The encoder has no such option.
    """
    made = dict(options or {})
    try:
        if history.encoder == "mean":
            return MeanEncoder(dim, **made)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        if history.encoder == "target_attention":
            return TargetAttention(dim, **made, **placed)
        return TransformerEncoder(dim, **{"max_length": history.max_length} | made, **placed)
    except TypeError as error:
        raise ValueError(
            f"the encoder of history {history.name!r} cannot be built: {error}"
        ) from error
