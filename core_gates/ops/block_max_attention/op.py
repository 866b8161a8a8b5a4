"""``block_max_attention`` by a few blocks of queries at a time, against all keys before them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from core_gates.errors import check_at_least
from core_gates.numerics import accumulation_dtype
from core_gates.ops._select import in_forward_mode, use_kernel
from core_gates.ops.block_max_attention import reference
from core_gates.ops.block_sparse_attention import gather

ROWS = 128  # queries at once: their scores leave the cache late, their matmuls are large


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and block maxima; see `reference.forward`."""
    batch, heads, length, dim = q.shape
    acc = accumulation_dtype(q)
    num_blocks = -(-length // block_size)
    tail = num_blocks * block_size - length
    queries = (q.to(acc) * scale).reshape(batch * heads, length, dim)
    keys, values = (F.pad(t.to(acc), (0, 0, 0, tail)).flatten(0, 1) for t in (k, v))
    out, lse = torch.empty_like(queries), queries.new_empty(batch * heads, length)
    maxima = queries.new_zeros(batch * heads, length if per_row else num_blocks, num_blocks)
    rows = max(1, min(ROWS // block_size, num_blocks)) * block_size
    space = queries.new_empty(rows * num_blocks * block_size)
    future = queries.new_full((rows, rows), -torch.inf).triu(1)
    group = heads // k.shape[1]
    for head in range(batch * heads):
        key, value = keys[head // group], values[head // group]
        for start in range(0, length, rows):
            chunk = slice(start, min(start + rows, length))
            query = queries[head, chunk]
            blocks = -(-chunk.stop // block_size)
            seen = blocks * block_size
            scores = space[: len(query) * seen].view(len(query), seen)
            torch.mm(query, key[:seen].T, out=scores)
            scores[:, start:] += future[: len(query), : seen - start]
            top = scores.amax(-1)
            torch.softmax(scores, -1, out=scores)
            torch.mm(scores, value[:seen], out=out[head, chunk])
            by_row = scores.view(len(query), blocks, block_size).amax(-1)
            lse[head, chunk] = top - by_row.amax(-1).log()  # the largest weight is exp(top - lse)
            if per_row:
                maxima[head, chunk, :blocks] = by_row
            else:
                first = start // block_size
                for row, part in enumerate(torch.split(by_row, block_size), first):
                    maxima[head, row, :blocks] = part.amax(0)
    return (
        out.view(q.shape).to(q.dtype),
        lse.view(q.shape[:3]),
        maxima.view(batch, heads, *maxima.shape[1:]),
    )


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through the output: those of plain causal attention."""
    blocks = -(-q.shape[2] // ROWS)
    everything = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device)
    block_mask = everything.expand(*q.shape[:2], blocks, blocks)
    return gather.backward(grad, q, k, v, block_mask, out, ROWS, True, scale)


class BlockMaxOutput(NamedTuple):
    """Result of `block_max_attention`.

    Attributes:
        out: Attention output (B, H, L, D).
        lse: Log-sum-exp of the scores of every query (B, H, L), float32 at least.
        block_max: Largest attention weight in every block (B, H, N, N), or of every query in every
            block of keys (B, H, L, N); float32 at least, zero in the future.
    """

    out: Tensor
    lse: Tensor
    block_max: Tensor


def block_max_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    per_row: bool = False,
) -> BlockMaxOutput:
    """Causal attention with the largest weight of every block (arXiv 2410.13276, section 3.3).

    The maxima are what a SeerAttention gate is distilled from; the map of weights is never stored.
    Only ``out`` has gradients, those of plain attention; the maxima are constants.

    Padding is read like tokens: put it after them, where causality hides it, and let it hold
    something finite.

    Args:
        q: Queries (B, H, L, D).
        k: Keys (B, K, L, D), where K divides H.
        v: Values (B, K, L, D).
        block_size: Tokens of a block; the last one may be short.
        scale: Factor of the scores, ``D ** -0.5`` if None.
        per_row: Whether the maxima are kept for every query, as gates for decoding need them.

    Raises:
        ValueError: The shapes do not fit, or ``block_size`` is below 1.
    """
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    )
    if not fits or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, L, D),"
            " (B, K, L, D) and (B, K, L, D), where K divides H"
        )
    check_at_least(1, block_size=block_size)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if in_forward_mode():
        return BlockMaxOutput(*reference.forward(q, k, v, block_size, scale, per_row))
    backend = "triton" if use_kernel(q, k, v) else "row_chunks"
    return BlockMaxOutput(*_forward(q, k, v, block_size, scale, per_row, backend))


def _run(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, per_row: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (q, k, v, block_size, scale, per_row)
    if backend == "triton":
        from core_gates.ops.block_max_attention import kernel  # the only place for Triton

        return kernel.forward(*arguments)
    return forward(*arguments)


_forward = custom_op("core_gates::block_max_attention", _run, mutates_args=())
_backward = custom_op("core_gates::block_max_attention_backward", backward, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor, _k: Tensor, _v: Tensor, block_size: int, _scale: float, per_row: bool, _backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    acc = accumulation_dtype(q)
    num_blocks = -(-length // block_size)
    maxima = (batch, heads, length if per_row else num_blocks, num_blocks)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:3], dtype=acc),
        q.new_empty(maxima, dtype=acc),
    )


@_backward.register_fake
def _(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[0])
    ctx.scale = inputs[4]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> Any:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
