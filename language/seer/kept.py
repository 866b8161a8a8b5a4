"""Keys and values of chosen blocks, copied together once for several tokens that are decoded."""

import torch
from torch import Tensor
from torch.nn import functional as F

from language.seer.attention import AttentionInputs, attend_to_token


def recent_blocks(blocks: int) -> int:
    """Return how many of a budget of blocks are best the last ones, own included, in decoding.

    Three quarters lost least, or nearly, in every held-out file of 2,048 tokens that was tried with
    gates of SmolLM2 and 16 blocks; gates choose from the rest of the text what remains.

    Args:
        blocks: That a row reads; 0 if its rule has no such number.
    """
    return max(2, 3 * blocks // 4)


class KeptTokens:
    """What a token reads of a cache, and the tokens after it until blocks are chosen again.

    These are the chosen blocks, copied next to each other, and all that follows from the beginning
    of the block of the first token on, later tokens included.

    Args:
        seen: What attention of the first token has before it.
        mask: Blocks (B, K, 1, N) that it reads, the last one among them.
        block_size: Tokens of a block.
        every: Tokens that read this, the first one included.

    Attributes:
        length: Tokens S of the cache, the newest one included.
    """

    def __init__(self, seen: AttentionInputs, mask: Tensor, block_size: int, every: int) -> None:
        self.length = self._first = seen.k.shape[2]
        self._block_size, self._every, self._blocks = block_size, every, int(mask.sum())
        self._differentiable = seen.k.requires_grad
        begin, past = (mask.shape[-1] - 1) * block_size, mask[:, :, 0, :-1]
        counts = past.sum(-1, keepdim=True)
        most = int(counts.max())
        order = past.byte().argsort(dim=-1, descending=True, stable=True)[..., :most]
        batch, head = (torch.arange(size, device=mask.device) for size in past.shape[:2])

        def together(x: Tensor) -> Tensor:
            blocks = x[:, :, :begin].unflatten(2, (-1, block_size))
            blocks = blocks[batch[:, None, None], head[:, None], order].flatten(2, 3)
            room = x.new_ones(*x.shape[:2], every - 1, *x.shape[3:])
            return torch.cat([blocks, x[:, :, begin:], room], 2)

        self._keys, self._values = together(seen.k), together(seen.v)
        self._visible: Tensor | None = None
        if seen.padding is not None or bool((counts < most).any()):  # what fills up the others
            tokens = torch.ones_like(seen.k[..., 0], dtype=torch.bool)
            tokens = tokens if seen.padding is None else tokens & ~seen.padding.unsqueeze(1)
            kept = (torch.arange(most, device=mask.device) < counts).repeat_interleave(
                block_size, 2
            )
            self._visible = together(tokens) & F.pad(
                kept, (0, self._keys.shape[2] - kept.shape[2]), value=True
            )

    @property
    def read(self) -> int:
        """Blocks that the newest token reads, of all rows and key heads."""
        more = (self.length - 1) // self._block_size - (self._first - 1) // self._block_size
        return self._blocks + more * self._keys.shape[0] * self._keys.shape[1]

    def continues(self, length: int) -> bool:
        """Return whether the token reads this that makes the cache so long."""
        written = torch.is_inference_mode_enabled() or not self._keys.is_inference()
        follows = self.length + 1 == length < self._first + self._every
        return follows and written and not self._differentiable

    def attend(self, seen: AttentionInputs) -> Tensor:
        """Return attention (B, H, 1, D) of the newest token, which is added unless it is first."""
        self.length = seen.k.shape[2]
        size = self._keys.shape[2] - self._every + 1 + self.length - self._first
        if self.length > self._first:
            self._keys[:, :, size - 1] = seen.k[:, :, -1]
            self._values[:, :, size - 1] = seen.v[:, :, -1]
        visible = None if self._visible is None else self._visible[:, :, None, :size]
        return attend_to_token(
            seen.q, self._keys[:, :, :size], self._values[:, :, :size], seen.scale, visible
        )
