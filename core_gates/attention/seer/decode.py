"""The gate of SeerAttention while decoding, and which blocks a row of logits selects."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.head_gate import INIT_STD, NORM_EPS, rotate
from core_gates.attention.seer.gate import (
    as_float32,
    as_numbers,
    check_heads,
    check_tokens,
    pad_to_blocks,
    parse_pooling,
    pool_blocks,
    project_heads,
    shown_probs,
)
from core_gates.errors import GatesError, check_option, check_whole
from core_gates.numerics import accumulation_dtype, check_padding_mask, zero_padding


class BlockSelector(nn.Module):
    """Turn the logits of an attention gate into a block mask (arXiv 2410.13276 and 2506.08889).

    Exactly one rule is given. The block of the query itself is always kept, else a query could be
    left without any key: in addition to what the rule chooses, or as the first of the ``recent``
    ones, which count. Equal scores go to the lowest index.

    Args:
        threshold: Keep blocks whose probability (softmax over the row) exceeds this.
        nz_ratio: Fraction of the causal area to keep: every row of a map of N blocks keeps its
            ``max(1, int((1 - sqrt(1 - nz_ratio)) * N))`` best.
        token_budget: Tokens to attend, in whole blocks of ``block_size``.
        k: Blocks to keep, or how many of each head, whole numbers (H,).
        p: Keep the best blocks until their probabilities sum to this.
        sinks: First blocks of a sequence, after those of padding, that every row keeps and that
            count as chosen; of each head (H,) if it is a tensor.
        recent: Last blocks of a row, its own included, that it keeps and that count as chosen.
        block_size: Tokens of a block, for ``token_budget``.
        dense_rows: Last rows of a square map that keep everything. A map with fewer rows than
            columns, as in decoding, has none.

    Shape:
        Logits (..., Nq, Nk) to bool (..., Nq, Nk). Row i is the block ``Nk - Nq + i``; later blocks
        are never kept, nor are logits of the lowest finite value, by which gates hide padding.

    Raises:
        ValueError: Not exactly one rule is given, a value is out of range, or ``sinks`` and
            ``recent`` blocks are more than ``k`` or the budget.
    """

    def __init__(
        self,
        *,
        threshold: float | None = None,
        nz_ratio: float | None = None,
        token_budget: int | None = None,
        k: int | Tensor | None = None,
        p: float | None = None,
        sinks: int | Tensor = 0,
        recent: int = 0,
        block_size: int = 64,
        dense_rows: int = 2,
    ) -> None:
        super().__init__()
        rules: dict[str, Any] = {
            "threshold": threshold,
            "nz_ratio": nz_ratio,
            "token_budget": token_budget,
            "k": k,
            "p": p,
        }
        given = {name: value for name, value in rules.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(rules)}, got {', '.join(given) or 'none'}")
        ((self.rule, self.value),) = given.items()
        if self.rule in ("threshold", "nz_ratio", "p") and not 0 <= self.value <= 1:
            raise ValueError(f"{self.rule} must lie in [0, 1], got {self.value}")
        check_whole(1, block_size=block_size)
        check_whole(0, dense_rows=dense_rows, recent=recent)
        _check_blocks(0, "sinks", sinks)
        if self.rule in ("k", "token_budget"):
            _check_blocks(1, self.rule, self.value)
        if self.rule == "token_budget" and self.value < block_size:
            raise ValueError(
                f"token_budget must be at least one block of {block_size}, got {self.value}"
            )
        self.block_size, self.dense_rows = block_size, dense_rows
        self.sinks, self.recent = sinks, recent
        if self.rule in ("k", "token_budget"):
            first, most = (torch.as_tensor(n, device="cpu") for n in (sinks, self._count(0)))
            if (over := int((first + recent - most).max())) > 0:
                raise ValueError(
                    f"sinks={sinks} and recent={recent} are {over} more than the blocks of"
                    f" {self.rule}={self.value}: raise it, or lower them"
                )

    def forward(self, logits: Tensor) -> Tensor:
        """Return the mask of kept blocks, True = keep.

        Args:
            logits: Logits (..., Nq, Nk) of a gate.

        Raises:
            ValueError: There are more rows than columns.
            GatesError: A logit that is not in the future is NaN or infinite; not checked while
                compiling.
        """
        num_rows, num_blocks = logits.shape[-2:]
        past, current = _past_and_own(logits)
        if not torch.compiler.is_compiling():
            _refuse_non_finite(logits, past)
        scores = logits.detach().to(accumulation_dtype(logits))
        lowest = torch.finfo(logits.dtype).min
        available = past & (scores > lowest)
        scores = scores.masked_fill(~available, torch.finfo(scores.dtype).min)
        kept = self._choose(scores, self._always(available, past)) & available
        if num_rows == num_blocks and self.dense_rows:
            first = max(0, num_rows - self.dense_rows)
            kept[..., first:, :] = available[..., first:, :]
        return kept | current

    def _always(self, available: Tensor, past: Tensor) -> Tensor:
        """Return the blocks (..., Nq, Nk) that are kept whatever their scores."""
        first = available.cumsum(-1) <= _per_head(self.sinks, available.device)
        last = past.flip(-1).cumsum(-1).flip(-1) <= self.recent
        return cast(Tensor, available & (first | last))

    def _choose(self, scores: Tensor, always: Tensor) -> Tensor:
        if self.rule == "threshold":
            return cast(Tensor, (scores.softmax(-1) > self.value) | always)
        order = scores.masked_fill(always, torch.inf).argsort(dim=-1, descending=True, stable=True)
        if self.rule == "p":
            probs = scores.softmax(-1).gather(-1, order)
            before = probs.cumsum(-1) - probs
            chosen = before < self.value
        else:
            rank = torch.arange(scores.shape[-1], device=scores.device)
            most = _per_head(self._count(scores.shape[-1]), scores.device)
            chosen = (rank < most).expand(scores.shape)
        return torch.zeros_like(chosen).scatter(-1, order, chosen) | always

    def _count(self, num_blocks: int) -> Any:
        if self.rule == "nz_ratio":
            return max(1, int((1 - math.sqrt(1 - self.value)) * num_blocks))
        return self.value // self.block_size if self.rule == "token_budget" else self.value

    def extra_repr(self) -> str:
        """Show the rule."""
        always = f"sinks={self.sinks}, recent={self.recent}"
        return f"{self.rule}={self.value}, {always}, dense_rows={self.dense_rows}"


def _check_blocks(least: int, name: str, blocks: int | Tensor) -> None:
    """Refuse numbers of blocks, of all heads or of each, that are not whole or too small."""
    if not isinstance(blocks, Tensor):
        check_whole(least, **{name: blocks})
    elif blocks.ndim != 1 or blocks.is_floating_point() or not (blocks >= least).all():
        raise ValueError(
            f"{name} must be whole numbers (H,) from {least} on, got {blocks.tolist()}"
        )


def _per_head(blocks: int | Tensor, device: torch.device) -> int | Tensor:
    """Return a number of blocks, with rows and columns if it is of each head."""
    return blocks.to(device)[:, None, None] if isinstance(blocks, Tensor) else blocks


def block_density(block_mask: Tensor) -> Tensor:
    """Return the kept fraction of the blocks that causality allows, a float32 scalar.

    Args:
        block_mask: Bool (..., Nq, Nk), aligned as in `BlockSelector`.

    Raises:
        ValueError: There are more rows than columns.
    """
    past = _past_and_own(block_mask)[0].expand(block_mask.shape)
    return (block_mask & past).sum() / past.sum()


def _refuse_non_finite(logits: Tensor, past: Tensor) -> None:
    wrong = int((past & ~logits.isfinite()).sum())
    if wrong:
        raise GatesError(
            f"{wrong} of the logits to choose from are not finite; look for NaN in queries or keys,"
            " give the gate the padding_mask, and hide blocks by the lowest finite value"
        )


def _past_and_own(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the blocks that are not in the future of a row, and its own, bool (..., Nq, Nk)."""
    num_rows, num_blocks = blocks.shape[-2:]
    if num_rows > num_blocks:
        raise ValueError(f"a map of {num_rows} rows needs as many columns, got {num_blocks}")
    block = torch.arange(num_blocks, device=blocks.device)
    rows = block[num_blocks - num_rows :, None]
    return block <= rows, block == rows


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
        frequencies: Angles per position (gate_dim / 2) in place of those of ``rope_theta``: the
            ``inv_freq`` of a model of transformers with scaled positions. Kept as numbers, so that
            no cast of the gate rounds them.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``q`` (B, T, H, D) and ``k`` (B, T, K, D), before any rotation, to logits (B, K, T, N).

    Raises:
        ValueError: Heads do not divide, an option is unknown, or ``gate_dim`` or the frequencies do
            not fit.
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
        frequencies: Tensor | Sequence[float] | None = None,
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
        self.frequencies = as_numbers(frequencies, gate_dim)
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
        if padding_mask is not None:
            check_padding_mask(padding_mask, k.shape[:2])
        positions = torch.arange(k.shape[1], device=k.device)
        pooled = pool_blocks(k, self.block_size, self.k_kinds, padding_mask=padding_mask)
        logits = self.score(_without(q, padding_mask), positions, pooled)
        if padding_mask is None:
            return logits
        empty = pad_to_blocks(padding_mask, self.block_size).all(-1)[:, None, None, :]
        hidden = padding_mask[:, None, :, None] | empty & self._complete(positions, pooled.shape[1])
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)

    def score(self, q: Tensor, positions: Tensor, pooled: Tensor) -> Tensor:
        """Return the logits (B, K, T, N) of some tokens for pooled blocks, as `forward` does.

        The pooled keys of a frozen model depend on no weight of the gate, which may learn from them
        many times.

        Args:
            q: Queries (B, T, H, D) before rotation.
            positions: Their positions (T,).
            pooled: What ``pool_blocks(k, gate.block_size, gate.k_kinds)`` returned for keys before
                rotation (B, N, K, D * kinds of pooling).
        """
        logits = self._logits(q, positions, self._project(pooled))
        complete = self._complete(positions, pooled.shape[1])
        starts = torch.arange(pooled.shape[1], device=q.device) * self.block_size
        logits = logits.masked_fill(~complete, 0)
        return logits.masked_fill(starts > positions[:, None], torch.finfo(logits.dtype).min)

    def _complete(self, positions: Tensor, num_blocks: int) -> Tensor:
        """Return which blocks have ended when tokens at these positions are there, (T, N)."""
        ends = torch.arange(1, num_blocks + 1, device=positions.device) * self.block_size
        return ends <= positions[:, None] + 1

    def _project(self, pooled: Tensor, first: int = 0) -> Tensor:
        """Return pooled keys from block ``first`` on as one rotated vector each (B, n, K, G)."""
        pooled = as_float32(pooled)
        with torch.autocast(pooled.device.type, enabled=False):
            blocks = _normed(self.k_norm, project_heads(pooled, self.weight_k))
            starts = torch.arange(first, first + blocks.shape[1], device=pooled.device)
            return self._rotate(blocks, starts.unsqueeze(-1) * self.block_size)

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
        blocks = self._project(blocks, num_before)
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
        logits = self._logits(_without(q, padding_mask), position, keys.blocks)
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

    def _logits(self, q: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        """Return the logits of projected blocks (B, K, T, n)."""
        groups = (self.num_kv_heads, self.num_heads // self.num_kv_heads)
        queries = as_float32(q.reshape(*q.shape[:2], *groups, q.shape[-1]))
        if self.reduction in ("Qavg", "Qavgproj"):
            queries = queries.mean(3, keepdim=True)
        with torch.autocast(q.device.type, enabled=False):
            if self.weight_q is not None:
                weight = as_float32(self.weight_q)
                queries = torch.einsum("btkgd,kgdc->btkc", queries, weight).unsqueeze(3)
            queries = _normed(self.q_norm, queries)
            queries = self._rotate(queries, positions[:, None, None])
            logits = torch.einsum("btkgc,bnkc->bktgn", queries, blocks).mean(3)
            return cast(Tensor, logits * self.gate_dim**-0.5)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.rope_theta, frequencies=self.frequencies)

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
