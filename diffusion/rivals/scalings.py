"""The classifier of X-LoRA: the weight of each adapter for a token in a layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError


class Scalings(nn.Module):
    """Read scalings of adapters off the hidden state of every token (Buehler and Buehler, 2024).

    Parameters have the names that PEFT gives them.

    Args:
        features: Features d of the hidden state.
        adapters: Number of adapters K.
        layers: Number of layers L.
        layerwise: Give each layer its own scalings; else all have the same.
        depth: Number of linear layers of the classifier.
        width: Features between them.
        dropout: Probability between them while training.
        temperature: Divides logits; lower is sharper.
        top_k: Keep the largest scalings of a token, none of the others; all if None.
        normalize: Where softmax is taken: over ``all`` adapters, over the ``kept`` ones, ``never``.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        Hidden states (B, S, d) to scalings (B, S, L, K).

    Raises:
        GatesError: An option is out of range.
    """

    def __init__(
        self,
        features: int,
        adapters: int,
        layers: int,
        *,
        layerwise: bool = False,
        depth: int = 1,
        width: int = 2048,
        dropout: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        normalize: str = "all",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 1 or not temperature > 0:
            raise GatesError(f"depth {depth} must be at least 1, temperature {temperature} above 0")
        if top_k is not None and not 1 <= top_k <= adapters:
            raise GatesError(f"top_k is {top_k}, expected 1 to {adapters}, the number of adapters")
        if normalize not in ("all", "kept", "never"):
            raise GatesError(f"normalize is {normalize!r}; choose one of all, kept, never")
        self.adapters, self.num_layers, self.layerwise = adapters, layers, layerwise
        self.temperature, self.top_k, self.normalize = temperature, top_k, normalize
        sizes = [features, *[width] * (depth - 1)]
        inner: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            inner += [nn.Linear(inputs, outputs, device=device, dtype=dtype), nn.ReLU()]
            inner += [nn.Dropout(dropout)] if dropout > 0 else []
        outputs = adapters * (layers if layerwise else 1)
        last = nn.Linear(sizes[-1], outputs, device=device, dtype=dtype)
        self.layers = nn.Sequential(*inner, last)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scalings (B, S, L, K) of all layers."""
        logits = self.layers(hidden)
        layers = self.num_layers if self.layerwise else 1
        scalings = logits.unflatten(-1, (layers, self.adapters))
        if self.normalize == "all":
            scalings = (scalings / self.temperature).softmax(-1)
        return self._kept(scalings).expand(*hidden.shape[:-1], self.num_layers, self.adapters)

    def _kept(self, scalings: Tensor) -> Tensor:
        """Return scalings with those outside of the largest set to zero."""
        if self.top_k is None and self.normalize != "kept":
            return scalings
        best = scalings.topk(self.top_k or self.adapters, -1).indices
        mask = torch.zeros_like(scalings, dtype=torch.bool).scatter(-1, best, True)
        if self.normalize == "kept":
            return scalings.masked_fill(~mask, -torch.inf).softmax(-1)
        return scalings * mask


def owners(ranks: Sequence[int]) -> Tensor:
    """Return the number of the adapter that each component (R,) belongs to."""
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
