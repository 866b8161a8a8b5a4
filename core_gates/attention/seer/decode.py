"""The gate of SeerAttention-R: which blocks of the past a new token needs."""

from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.head_gate import INIT_STD, NORM_EPS, rotate
from core_gates.attention.seer.gate import (
    as_float32,
    check_heads,
    check_tokens,
    pad_to_blocks,
    parse_pooling,
    pool_blocks,
    project_heads,
    shown_probs,
)
from core_gates.errors import check_option
from core_gates.numerics import zero_padding

QueryReduction = Literal["Qproj", "Qavgproj", "Qavg", "Qorig"]


class CompressedKeys(NamedTuple):
    """What a `DecodeAttnGate` remembers of the keys.

    Attributes:
        blocks: One vector a complete block and key head (B, n, K, gate_dim), rotated.
        rest: Keys of the unfinished block (B, fewer than block_size, K, D), before rotation.
        empty: True (B, n) at complete blocks that hold nothing but padding.
        rest_padding: True (B, fewer than block_size) at padding in the unfinished block.
    """

    blocks: Tensor
    rest: Tensor
    empty: Tensor
    rest_padding: Tensor


class DecodeAttnGate(nn.Module):
    """Predict the blocks that a token needs while text is generated (SeerAttention-R, 2506.08889).

    All query heads that share a key head share one decision. A block of keys is pooled,
    projected and rotated to its first position once it is complete. The unfinished block, which
    holds the token itself, has logit 0 and takes part in the softmax.

    Everything after the pooling is computed in float32.

    Args:
        num_heads: Query heads H.
        num_kv_heads: Key heads K.
        head_dim: Features of a head.
        block_size: Tokens of a block.
        gate_dim: Features of the gate.
        reduction: How the g heads of a group become one query: ``Qproj`` sums a projection of each,
            ``Qavgproj`` projects their mean, ``Qavg`` is their mean, ``Qorig`` keeps them and
            averages the logits. The last two need ``gate_dim == head_dim``.
        k_pooling: ``K`` with some of ``max``, ``min``, ``avg`` in this order.
        qk_norm: Whether queries and keys of the gate go through an RMSNorm.
        rope_theta: Base of the rotary embedding, that of the model.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``q`` (B, T, H, D) and ``k`` (B, T, K, D), before any rotation, to logits (B, K, T, N).

    Raises:
        ValueError: Heads do not divide, an option is unknown, or ``gate_dim`` does not fit.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 64,
        gate_dim: int = 128,
        reduction: QueryReduction = "Qproj",
        k_pooling: str = "Kmaxminavg",
        qk_norm: bool = True,
        rope_theta: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(num_heads, num_kv_heads, block_size)
        check_option("reduction", reduction, get_args(QueryReduction))
        if reduction in ("Qavg", "Qorig") and gate_dim != head_dim:
            raise ValueError(f"{reduction} needs gate_dim == head_dim={head_dim}, got {gate_dim}")
        self.k_kinds = parse_pooling(k_pooling.removeprefix("K"))
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size, self.gate_dim, self.rope_theta = block_size, gate_dim, rope_theta
        self.reduction = reduction
        group = num_heads // num_kv_heads
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        shapes = {"Qproj": (num_kv_heads, group, head_dim, gate_dim)}
        shapes["Qavgproj"] = (num_kv_heads, 1, head_dim, gate_dim)
        shape = shapes.get(reduction)
        self.weight_q = None if shape is None else nn.Parameter(torch.empty(shape, **options))
        k_shape = (num_kv_heads, head_dim * len(self.k_kinds), gate_dim)
        self.weight_k = nn.Parameter(torch.empty(k_shape, **options))
        self.q_norm = nn.RMSNorm(gate_dim, eps=NORM_EPS, **options) if qk_norm else None
        self.k_norm = nn.RMSNorm(gate_dim, eps=NORM_EPS, **options) if qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 0.02²); norms start at one."""
        for weight in (self.weight_q, self.weight_k):
            if weight is not None:
                nn.init.normal_(weight, std=INIT_STD)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(self, q: Tensor, k: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the logits that `decode` gives for every token, as distillation needs them.

        Blocks in the future, complete blocks of nothing but padding, and the rows of padding have
        the lowest finite value.

        Args:
            q: Queries (B, T, H, D) before rotation.
            k: Keys (B, T, K, D) before rotation.
            padding_mask: True (B, T) at tokens to ignore, whatever they hold.

        Raises:
            ValueError: The shapes do not fit.
        """
        check_tokens(q, k, self.num_heads, self.num_kv_heads)
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"q and k must have as many tokens, got {q.shape[1]} and {k.shape[1]}")
        length = k.shape[1]
        positions = torch.arange(length, device=k.device)
        keys = self.compress(k, padding_mask=padding_mask)
        num_blocks = -(-length // self.block_size)
        logits = self._logits(_without(q, padding_mask), positions, keys)
        logits = F.pad(logits, (0, num_blocks - logits.shape[-1]))
        block = torch.arange(num_blocks, device=k.device)
        complete = (block + 1) * self.block_size <= positions[:, None] + 1
        future = block * self.block_size > positions[:, None]
        logits = logits.masked_fill(~complete, 0)
        hidden = future if padding_mask is None else future | padding_mask[:, None, :, None]
        if padding_mask is not None:  # an unfinished block is not empty for the token in it
            empty = F.pad(keys.empty, (0, num_blocks - keys.empty.shape[1]))
            hidden = hidden | empty[:, None, None, :] & complete
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)

    def compress(
        self,
        k: Tensor,
        past: CompressedKeys | None = None,
        *,
        padding_mask: Tensor | None = None,
    ) -> CompressedKeys:
        """Add keys to what is remembered.

        Args:
            k: New keys (B, T, K, D) before rotation.
            past: What was remembered before them.
            padding_mask: True (B, T) at new tokens to ignore, whatever they hold.

        Raises:
            ValueError: The mask does not fit.
        """
        padding = k.new_zeros(k.shape[:2], dtype=torch.bool)
        if padding_mask is not None:
            k, padding = _without(k, padding_mask), padding_mask
        num_before = 0 if past is None else past.blocks.shape[1]
        rest = k if past is None else torch.cat([past.rest, k], 1)
        padding = padding if past is None else torch.cat([past.rest_padding, padding], 1)
        whole = rest.shape[1] // self.block_size * self.block_size
        if past is not None and not whole:
            return CompressedKeys(past.blocks, rest, past.empty, padding)
        now = padding[:, :whole]
        masked = padding_mask is not None or past is not None
        blocks = pool_blocks(
            rest[:, :whole], self.block_size, self.k_kinds, padding_mask=now if masked else None
        )
        blocks = as_float32(blocks)
        with torch.autocast(k.device.type, enabled=False):
            blocks = _normed(self.k_norm, project_heads(blocks, self.weight_k))
            starts = torch.arange(num_before, num_before + blocks.shape[1], device=k.device)
            blocks = rotate(blocks, starts.unsqueeze(-1) * self.block_size, self.rope_theta)
        empty = pad_to_blocks(now, self.block_size).all(-1)
        if past is not None:
            blocks, empty = torch.cat([past.blocks, blocks], 1), torch.cat([past.empty, empty], 1)
        return CompressedKeys(blocks, rest[:, whole:], empty, padding[:, whole:])

    def decode(
        self, q: Tensor, keys: CompressedKeys, *, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits (B, K, 1, N) of the newest token, whose key is among ``keys``.

        Args:
            q: Its query (B, 1, H, D) before rotation.
            keys: What `compress` returned.
            padding_mask: True (B, 1) where the newest token is padding.

        Raises:
            ValueError: There are no keys, or ``q`` holds more than one token.
        """
        length = keys.blocks.shape[1] * self.block_size + keys.rest.shape[1]
        if length == 0 or q.shape[1] != 1:
            raise ValueError(f"decode takes one query after its key, got {q.shape[1]} of {length}")
        position = torch.tensor([length - 1], device=q.device)
        logits = self._logits(_without(q, padding_mask), position, keys)
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(keys.empty[:, None, None, :], lowest)
        logits = F.pad(logits, (0, 1)) if keys.rest.shape[1] else logits
        if padding_mask is None:
            return logits
        return logits.masked_fill(padding_mask[:, None, :, None], lowest)

    def gate_values(self, q: Tensor, k: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the probabilities of the blocks of keys that a token may choose from, flat (M,).

        Those of the future and of padding are left out: they are not choices of the gate.
        """
        return shown_probs(self(q, k, padding_mask=padding_mask))

    def _logits(self, q: Tensor, positions: Tensor, keys: CompressedKeys) -> Tensor:
        """Return the logits of complete blocks (B, K, T, n)."""
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads)
        queries = as_float32(q.reshape(*q.shape[:2], *groups, q.shape[-1]))
        if self.reduction in ("Qavg", "Qavgproj"):
            queries = queries.mean(3, keepdim=True)
        with torch.autocast(q.device.type, enabled=False):
            if self.weight_q is not None:
                weight = as_float32(self.weight_q)
                queries = torch.einsum("btkgd,kgdc->btkc", queries, weight).unsqueeze(3)
            queries = _normed(self.q_norm, queries)
            queries = rotate(queries, positions[:, None, None], self.rope_theta)
            logits = torch.einsum("btkgc,bnkc->bktgn", queries, keys.blocks).mean(3)
            return cast(Tensor, logits * self.gate_dim**-0.5)

    def extra_repr(self) -> str:
        """Show the sizes, the reduction and the pooling."""
        return (
            f"block_size={self.block_size}, gate_dim={self.gate_dim}, reduction={self.reduction},"
            f" k_pooling=K{''.join(self.k_kinds)}"
        )


def _without(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return tokens (B, T, H, D) with zeros at padding (B, T)."""
    return zero_padding(x.flatten(2), padding_mask).reshape(x.shape)


def _normed(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.eps)
