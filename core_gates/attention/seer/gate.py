"""The gate of SeerAttention: pooled queries and keys before RoPE to logits of blocks."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.attention.head_gate import INIT_STD, check_frequencies, rotate
from core_gates.errors import check_fraction, check_option, check_whole
from core_gates.numerics import accumulation_dtype, check_padding_mask

KINDS = ("max", "min", "avg")


def parse_pooling(name: str) -> tuple[str, ...]:
    """Return the kinds in a name such as ``maxminavg``.

    Raises:
        ValueError: The name is not made of ``max``, ``min`` and ``avg``, in this order.
    """
    kinds = tuple(kind for kind in KINDS if kind in name)
    if not kinds or "".join(kinds) != name:
        raise ValueError(f"pooling must join some of max, min, avg in this order, got {name!r}")
    return kinds


def pool_blocks(
    x: Tensor, block_size: int, kinds: tuple[str, ...], *, padding_mask: Tensor | None = None
) -> Tensor:
    """Pool the tokens of every block and join the kinds of pooling along the features.

    Averages are over the tokens that a block has: the last one may be short, and padding is no
    token. A block of nothing but padding is pooled to 0.

    Args:
        x: Tokens (B, T, H, D).
        block_size: Tokens of a block.
        kinds: Some of ``max``, ``min``, ``avg``.
        padding_mask: True (B, T) at tokens to ignore, whatever they hold.

    Returns:
        Pooled (B, ceil(T / block_size), H, D * number of kinds).
    """
    if padding_mask is not None:
        return _pool_tokens(x, block_size, kinds, padding_mask)
    whole = x.shape[1] // block_size * block_size
    blocks = (x.shape[0], whole // block_size, block_size, *x.shape[2:])
    parts = [x[:, :whole].reshape(blocks)]
    if whole < x.shape[1]:
        parts.append(x[:, whole:].unsqueeze(1))
    reduce: dict[str, Callable[[Tensor, int], Tensor]] = {
        "max": Tensor.amax,
        "min": Tensor.amin,
        "avg": Tensor.mean,
    }
    return torch.cat(
        [torch.cat([reduce[kind](part, 2) for kind in kinds], -1) for part in parts], 1
    )


def pad_to_blocks(padding_mask: Tensor, block_size: int) -> Tensor:
    """Cut a mask (B, T) into blocks (B, ceil(T / block_size), block_size), True where none is."""
    padded = F.pad(padding_mask, (0, -padding_mask.shape[1] % block_size), value=True)
    return padded.reshape(len(padded), padded.shape[1] // block_size, block_size)


def _pool_tokens(
    x: Tensor, block_size: int, kinds: tuple[str, ...], padding_mask: Tensor
) -> Tensor:
    ignored = pad_to_blocks(padding_mask, block_size)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block_size))
    blocks = x.reshape(*ignored.shape, *x.shape[2:])
    number = (~ignored).sum(2)[..., None, None]
    ignored = ignored[..., None, None]
    pooled = {
        "max": lambda: blocks.masked_fill(ignored, -torch.inf).amax(2).masked_fill(number == 0, 0),
        "min": lambda: blocks.masked_fill(ignored, torch.inf).amin(2).masked_fill(number == 0, 0),
        "avg": lambda: blocks.masked_fill(ignored, 0).sum(2) / number.clamp(min=1),
    }
    return torch.cat([pooled[kind]() for kind in kinds], -1)


class PooledBlocks(NamedTuple):
    """What an `AttnGate` scores; it depends on no weight of the gate.

    Attributes:
        queries: Pooled queries (B, Nq, H, head_dim * kinds of pooling), before rotation.
        keys: Pooled keys (B, Nk, K, head_dim * kinds of pooling), before rotation.
        empty: True (B, Nk) at blocks of nothing but padding; None without a padding mask.
    """

    queries: Tensor
    keys: Tensor
    empty: Tensor | None = None


def pool_prompt(
    q: Tensor,
    k: Tensor,
    block_size: int,
    kinds: tuple[tuple[str, ...], tuple[str, ...]],
    *,
    padding_mask: Tensor | None = None,
) -> PooledBlocks:
    """Return the pooled blocks of a prompt, or of a part of it after a past.

    Args:
        q: Queries (B, Tq, H, D), the last Tq of the Tk positions. Of a first block that begins in
            the middle, the queries that exist are pooled.
        k: Keys (B, Tk, K, D).
        block_size: Tokens of a block.
        kinds: How queries and keys are pooled, see `pool_blocks`.
        padding_mask: True (B, Tk) at tokens to ignore, whatever they hold.

    Raises:
        ValueError: There are more queries than keys, or the mask does not fit.
    """
    offset = k.shape[1] - q.shape[1]
    if offset < 0:
        raise ValueError(
            f"{q.shape[1]} queries must be the last of the positions of the keys, got"
            f" {k.shape[1]} keys"
        )
    q_mask = empty = None
    if padding_mask is not None:
        check_padding_mask(padding_mask, k.shape[:2])
        q_mask = padding_mask[:, offset:]
        empty = pad_to_blocks(padding_mask, block_size).all(-1)
    if lead := offset % block_size:
        none = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
        q_mask = F.pad(none if q_mask is None else q_mask, (lead, 0), value=True)
        q = F.pad(q, (0, 0, 0, 0, lead, 0))
    queries = pool_blocks(q, block_size, kinds[0], padding_mask=q_mask)
    keys = pool_blocks(k, block_size, kinds[1], padding_mask=padding_mask)
    return PooledBlocks(queries, keys, empty)


def hide_blocks(logits: Tensor, empty: Tensor | None = None) -> Tensor:
    """Give the blocks that a row cannot choose the lowest finite value.

    Args:
        logits: Of blocks (B, H, Nq, Nk), whose rows are the last ones.
        empty: True (B, Nk) at blocks of nothing but padding, which are hidden as rows, too.
    """
    num_rows, num_blocks = logits.shape[-2:]
    hidden = torch.ones(num_rows, num_blocks, dtype=torch.bool, device=logits.device)
    hidden = hidden.triu(num_blocks - num_rows + 1)
    if empty is not None:
        empty = empty[:, None]
        hidden = hidden | empty[..., num_blocks - num_rows :, None] | empty[..., None, :]
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def mean_pool_logits(
    q: Tensor, k: Tensor, block_size: int, *, padding_mask: Tensor | None = None
) -> Tensor:
    """Return products of mean queries and mean keys, which no training made (MoBA, 2502.13189).

    Args:
        q: Rotated queries (B, Tq, H, D); see `pool_prompt`.
        k: Rotated keys (B, Tk, K, D).
        block_size: Tokens of a block.
        padding_mask: True (B, Tk) at tokens to ignore, whatever they hold.

    Returns:
        Logits (B, H, Nq, Nk), hidden as those of an `AttnGate`.
    """
    pooled = pool_prompt(q, k, block_size, (("avg",), ("avg",)), padding_mask=padding_mask)
    keys = as_float32(pooled.keys).repeat_interleave(q.shape[2] // k.shape[2], 2)
    products = torch.einsum("bihd,bjhd->bhij", as_float32(pooled.queries), keys)
    return hide_blocks(products, pooled.empty)


class AttnGate(nn.Module):
    """Predict the map of attention between blocks while a prompt is read (arXiv 2410.13276).

    Queries and keys are pooled over blocks, projected, rotated to the first position of their block
    and multiplied. The projection of the queries is left out where it could be absorbed into that
    of the keys: with a single kind of pooling and ``gate_dim == head_dim``.

    Everything after the pooling is computed in float32.

    Args:
        num_heads: Query heads H.
        num_kv_heads: Key heads K.
        head_dim: Features of a head.
        block_size: Tokens of a block.
        gate_dim: Features of the gate.
        pooling: ``Q`` and ``K``, each with some of ``max``, ``min``, ``avg`` in this order.
        force_double: Whether the queries are projected in any case.
        rope_theta: Base of the rotary embedding, that of the model.
        frequencies: Angles per position (gate_dim / 2) in place of those of ``rope_theta``: the
            ``inv_freq`` of a model of transformers with scaled positions. Kept as numbers, so that
            no cast of the gate rounds them.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``q`` (B, Tq, H, D) and ``k`` (B, Tk, K, D), before any rotation, to logits (B, H, Nq, Nk).

    Raises:
        ValueError: Heads do not divide, the pooling is unknown, or the frequencies do not fit.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 64,
        gate_dim: int = 128,
        pooling: str = "Qavg_Kmaxminavg",
        force_double: bool = False,
        rope_theta: float = 10000.0,
        frequencies: Tensor | Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads(num_heads, num_kv_heads, block_size)
        pooled = re.fullmatch(r"Q(\w+)_K(\w+)", pooling)
        if pooled is None:
            raise ValueError(f"pooling must look like 'Qavg_Kmaxminavg', got {pooling!r}")
        self.q_kinds, self.k_kinds = parse_pooling(pooled[1]), parse_pooling(pooled[2])
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size, self.gate_dim, self.rope_theta = block_size, gate_dim, rope_theta
        self.frequencies = as_numbers(frequencies, gate_dim)
        double = force_double or len(self.q_kinds) > 1 or gate_dim != head_dim
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        q_shape = (num_heads, head_dim * len(self.q_kinds), gate_dim)
        k_shape = (num_kv_heads if double else num_heads, head_dim * len(self.k_kinds), gate_dim)
        self.weight_q = nn.Parameter(torch.empty(q_shape, **options)) if double else None
        self.weight_k = nn.Parameter(torch.empty(k_shape, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 0.02²)."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD)

    def forward(self, q: Tensor, k: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the logits of every block of keys for every block of queries.

        It is the `score` of what `pool` returns; see there for arguments and errors.
        """
        return self.score(self.pool(q, k, padding_mask=padding_mask))

    def pool(self, q: Tensor, k: Tensor, *, padding_mask: Tensor | None = None) -> PooledBlocks:
        """Return the pooled blocks in the dtype of the tokens; padding is not pooled.

        They are 1 / block_size of the tokens times the kinds of pooling: a frozen model may run
        once over what its gates then learn from many times.

        Args:
            q: Queries (B, Tq, H, D) before rotation; the last Tq of the Tk positions. Of a first
                block that begins in the middle, the queries that exist are pooled.
            k: Keys (B, Tk, K, D) before rotation.
            padding_mask: True (B, Tk) at tokens to ignore, whatever they hold.

        Raises:
            ValueError: The shapes do not fit.
        """
        check_tokens(q, k, self.num_heads, self.num_kv_heads)
        kinds = self.q_kinds, self.k_kinds
        return pool_prompt(q, k, self.block_size, kinds, padding_mask=padding_mask)

    def score(self, pooled: PooledBlocks) -> Tensor:
        """Return the logits (B, H, Nq, Nk) of pooled blocks.

        Blocks in the future, and rows and columns of nothing but padding, have the lowest finite
        value.

        Args:
            pooled: What `pool` returned, of this gate or one of the same heads and pooling.

        Raises:
            ValueError: The blocks are those of other heads or another pooling.
        """
        queries, keys = as_float32(pooled.queries), as_float32(pooled.keys)
        shapes = [
            (self.num_heads, self.head_dim * len(self.q_kinds)),
            (self.num_kv_heads, self.head_dim * len(self.k_kinds)),
        ]
        if [queries.shape[2:], keys.shape[2:]] != shapes or queries.shape[1] > keys.shape[1]:
            raise ValueError(
                f"pooled queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be"
                f" (B, Nq, {shapes[0][0]}, {shapes[0][1]}) and (B, Nk, {shapes[1][0]},"
                f" {shapes[1][1]}) with no more queries than keys: pool with a gate of the same"
                " heads and pooling"
            )
        group, num_blocks = self.num_heads // self.num_kv_heads, keys.shape[1]
        with torch.autocast(queries.device.type, enabled=False):
            if self.weight_q is None:
                keys = keys.repeat_interleave(group, 2)
            else:
                queries = project_heads(queries, self.weight_q)
            keys = project_heads(keys, self.weight_k)
            starts = torch.arange(num_blocks, device=queries.device).unsqueeze(-1) * self.block_size
            queries = self._rotate(queries, starts[num_blocks - queries.shape[1] :])
            keys = self._rotate(keys, starts)
            if self.weight_q is not None:
                keys = keys.repeat_interleave(group, 2)
            logits: Tensor = torch.einsum("bihd,bjhd->bhij", queries, keys) * self.gate_dim**-0.5
        return hide_blocks(logits, pooled.empty)

    def gate_values(self, q: Tensor, k: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the probabilities of the blocks of keys that a row may choose from, flat (M,).

        Those of the future and of padding are left out: they are not choices of the gate.
        """
        return shown_probs(self(q, k, padding_mask=padding_mask))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.rope_theta, frequencies=self.frequencies)

    def extra_repr(self) -> str:
        """Show the sizes and the pooling."""
        q, k = "".join(self.q_kinds), "".join(self.k_kinds)
        return f"block_size={self.block_size}, gate_dim={self.gate_dim}, pooling=Q{q}_K{k}"


def shown_probs(logits: Tensor) -> Tensor:
    """Return the probabilities of the logits that are not hidden, flat (M,)."""
    return logits.softmax(-1)[logits > torch.finfo(logits.dtype).min]


def as_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and anything else as it is."""
    return x.to(accumulation_dtype(x))


def project_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every head (B, N, H, C) by its own matrix (H, C, G)."""
    return cast(Tensor, torch.einsum("bnhc,hcg->bnhg", x, as_float32(weight)))


def check_heads(num_heads: int, num_kv_heads: int, block_size: int) -> None:
    """Refuse heads that do not fall into groups, and empty blocks."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
    check_whole(1, block_size=block_size)


def as_numbers(
    frequencies: Tensor | Sequence[float] | None, gate_dim: int
) -> tuple[float, ...] | None:
    """Return the frequencies of a gate as exact numbers, refusing any but ``gate_dim / 2``."""
    if frequencies is None:
        return None
    frequencies = torch.as_tensor(frequencies, dtype=torch.float64, device="cpu")
    check_frequencies(frequencies.shape, gate_dim)
    return tuple(frequencies.tolist())


def check_tokens(q: Tensor, k: Tensor, num_heads: int, num_kv_heads: int) -> None:
    """Refuse tokens of another number of heads."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[2] != num_heads or k.shape[2] != num_kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, T, {num_heads}, D) and"
            f" (B, T, {num_kv_heads}, D), before rotation"
        )


DECODE_EPS = 1e-9


def prefill_target(block_max: Tensor) -> Tensor:
    """Return the distribution over blocks of keys that an `AttnGate` should predict.

    Args:
        block_max: Largest weight of every block (B, H, N, N), of
            `core_gates.ops.block_max_attention`.

    Returns:
        Rows that sum to 1, of the same shape (arXiv 2410.13276, equation 5).
    """
    return block_max / block_max.sum(-1, keepdim=True)


def decode_target(block_max: Tensor, num_kv_heads: int) -> Tensor:
    """Return the distribution over blocks of keys that a `DecodeAttnGate` should predict.

    Args:
        block_max: Largest weight of every query in every block of keys (B, H, T, N), of
            `core_gates.ops.block_max_attention` with ``per_row``.
        num_kv_heads: Key heads K; the maximum is taken over the heads of each group.

    Returns:
        Rows that sum to 1, (B, K, T, N) (arXiv 2506.08889).
    """
    batch, heads, *rows = block_max.shape
    grouped = block_max.reshape(batch, num_kv_heads, heads // num_kv_heads, *rows)
    largest = grouped.amax(2)
    return largest / (largest.sum(-1, keepdim=True) + DECODE_EPS)


def gate_distillation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    skip: float = 0.25,
    reduction: Literal["element", "row"] = "element",
) -> Tensor:
    """Return the divergence KL(target, softmax(logits)).

    The first rows, in which there is nothing to choose, are left out.

    Args:
        logits: Logits of a gate (B, H, rows, N), of sequences without padding.
        target: Distributions of the same shape; constants.
        skip: Fraction of the rows of a sequence that is left out; published are 0.25 for prefill,
            0.5 for decoding.
        reduction: ``element`` averages over all elements as the published training does, whose
            loss is then scaled by 10; ``row`` averages over rows and is N times as large.

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        ValueError: The shapes differ, ``skip`` lies outside [0, 1) or the reduction is unknown.
    """
    if logits.shape != target.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have one shape"
        )
    check_fraction(skip=skip)
    check_option("reduction", reduction, ("element", "row"))
    dtype = accumulation_dtype(logits)
    logits, target = logits.to(dtype), target.detach().to(dtype)
    first = int(skip * logits.shape[-2])
    logits, target = logits[..., first:, :], target[..., first:, :]
    losses = F.kl_div(logits.log_softmax(-1), target, reduction="none")
    return losses.mean() if reduction == "element" else losses.sum(-1).mean()
