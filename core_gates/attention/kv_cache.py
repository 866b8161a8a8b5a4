"""What an attention layer remembers of the tokens before."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeyValueCache:
    """Keys and values of the tokens that one attention layer has seen; it grows with every call.

    Start with an empty one for every layer and every batch of sequences.

    Attributes:
        keys: Keys (B, K, S, D), gated and rotated; None before the first token.
        values: Values (B, K, S, D), gated.
        padding_mask: True (B, S) at tokens to ignore; None while there are none.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    padding_mask: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of tokens S, padding included."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(
        self, keys: Tensor, values: Tensor, *, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add T tokens and return all keys, values and padding.

        Args:
            keys: New keys (B, K, T, D).
            values: New values (B, K, T, D).
            padding_mask: True (B, T) at tokens to ignore.

        Raises:
            ValueError: The tokens belong to another batch, or to other heads.
        """
        num_before = len(self)
        if self.keys is not None and self.values is not None:
            before, now = ((t.shape[0], t.shape[1], t.shape[3]) for t in (self.keys, keys))
            if before != now:
                raise ValueError(
                    f"the cache holds (batch, heads, features) {before}, got tokens of {now};"
                    " start with an empty cache for every layer and batch"
                )
            keys = torch.cat([self.keys, keys], 2)
            values = torch.cat([self.values, values], 2)
        if padding_mask is not None or self.padding_mask is not None:
            batch, length = keys.shape[0], keys.shape[2]
            parts = (
                (self.padding_mask, num_before),
                (padding_mask, length - num_before),
            )
            padding_mask = torch.cat(
                [
                    torch.zeros(batch, size, dtype=torch.bool, device=keys.device)
                    if part is None
                    else part
                    for part, size in parts
                ],
                1,
            )
        self.keys, self.values, self.padding_mask = keys, values, padding_mask
        return keys, values, padding_mask
