"""The cache of decoding with block gates: keys, values, compressed keys, angles of all tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from core_gates.attention.head_gate import KeyValueCache, RotaryTable
from core_gates.attention.seer.decode import CompressedKeys, DecodeAttnGate
from language.seer.attention import AttentionInputs, unrotated
from language.seer.kept import KeptTokens


class BlockLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in memory that grows by half, and its compressed keys.

    Args:
        block_size: Tokens of a block.

    Attributes:
        kept: What was copied together for the next tokens; None where blocks are to be chosen.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self._memory = KeyValueCache()
        self.compressed: tuple[Tensor, Tensor] | None = None  # (B, n, K, G), and empty ones (B, n)
        self.kept: KeptTokens | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, K, T, D), and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._memory = KeyValueCache()
        else:
            self._memory.keys, self._memory.values = self.keys, self.values
        self.keys, self.values, _ = self._memory.extend(key_states, value_states)
        return self.keys, self.values

    def keys_for(
        self, gate: DecodeAttnGate, seen: AttentionInputs, table: RotaryTable
    ) -> CompressedKeys:
        """Compress the blocks completed since the last call, and return the compressed keys.

        Args:
            gate: The gate of the layer.
            seen: What its attention has before it.
            table: Cosines and sines (B, S, D / 2) of all tokens.
        """
        size, length = gate.block_size, seen.k.shape[2]
        whole = length // size * size
        known = 0 if self.compressed is None else self.compressed[0].shape[1] * size
        padding = seen.padding
        if self.compressed is None or known < whole:
            part = slice(known, whole)
            raw = unrotated(seen.k[:, :, part], (table[0][:, part], table[1][:, part]))
            past = None
            if self.compressed is not None:
                nothing = seen.k.new_zeros(len(raw), 0, dtype=torch.bool)
                past = CompressedKeys(self.compressed[0], raw[:, :0], self.compressed[1], nothing)
            found = gate.compress(
                raw, past, padding_mask=None if padding is None else padding[:, part]
            )
            self.compressed = found.blocks, found.empty
        rest = seen.k[:, :, whole:].transpose(1, 2)  # only how many there are matters
        ignored = seen.k.new_zeros(len(rest), rest.shape[1], dtype=torch.bool)
        blocks, empty = self.compressed
        return CompressedKeys(blocks, rest, empty, ignored)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: Minus their number.
        """
        super().crop(tokens_to_remove)
        blocks = self.get_seq_length() // self.block_size
        self._change(lambda x: x[:, :blocks])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row of the batch the tokens of row ``beam_idx`` (B,)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices])

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.compressed = self.kept = None

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.kept = None
        if self.compressed is not None:
            blocks, empty = self.compressed
            self.compressed = change(blocks), change(empty)


class BlockCache(Cache):  # type: ignore[misc]
    """What `generate` of transformers remembers when block gates choose what it reads.

    A complete block of keys is kept once more as one vector of each key head, 1 / (2 block_size) of
    keys and values. The angles of all tokens are kept once, as the last of the layers: keys are
    rotated back when their block is complete, whatever was cropped, reordered or selected before.

    Args:
        num_layers: Layers of the model.
        block_size: Tokens of a block.
    """

    layers: list[Any]

    def __init__(self, num_layers: int, block_size: int) -> None:
        super().__init__(layers=[BlockLayer(block_size) for _ in range(num_layers + 1)])

    def turn(self, table: RotaryTable, batch: int) -> None:
        """Add the cosines and sines (B or 1, T, D) of tokens that are read now, half of each."""
        half = table[0].shape[-1] // 2
        cos, sin = (part[..., :half].expand(batch, -1, -1).unsqueeze(1) for part in table)
        self.layers[-1].update(cos, sin)

    @property
    def table(self) -> RotaryTable:
        """Cosines and sines (B, S, D / 2) of all tokens."""
        angles = self.layers[-1]
        return angles.keys[:, 0], angles.values[:, 0]
