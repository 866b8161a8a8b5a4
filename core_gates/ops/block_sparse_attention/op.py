"""The public function ``block_sparse_attention`` and its registration as a PyTorch operator."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from core_gates.errors import check_at_least
from core_gates.numerics import check_padding_mask
from core_gates.ops._select import in_forward_mode, use_kernel
from core_gates.ops.block_sparse_attention import gather, reference, rows
from core_gates.ops.block_sparse_attention.reference import BlockLayout


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    dense_above: float = 1.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Attend to the kept blocks of keys only (SeerAttention, arXiv 2410.13276).

    Blocks are cut at multiples of ``block_size``. Under causality the queries are the last Lq of
    the Lk tokens; blocks in the future are ignored whatever the mask holds. A query without a
    visible key gets 0. Without a kernel the kept blocks are gathered, also in mode ``compile``;
    half precision is then computed in float32. No more queries than a block has, as in decoding,
    read the kept keys where they lie: a long cache is neither copied nor repeated for the heads.

    All keys of a kept block are attended to but those at padding. Without a ``padding_mask`` put
    padding after the tokens, where causality hides it, and let it hold something finite.

    Gathering pays below roughly two thirds of the blocks. A caller to whom the mask names what
    must be attended at least sets ``dense_above``: beyond that fraction plain attention is faster,
    but not with a ``padding_mask``, which leaves the choice as it is. There are no second
    derivatives.

    Args:
        q: Queries (B, H, Lq, D).
        k: Keys (B, K, Lk, D), where K divides H.
        v: Values (B, K, Lk, D).
        block_mask: True for kept blocks, bool (B, H, Nq, Nk); the first dimension may also be 1,
            the second also 1, or K for one choice per key head.
        block_size: Tokens of a block.
        causal: Whether a query sees no key that comes after it.
        scale: Factor of the scores, ``D ** -0.5`` if None.
        dense_above: Fraction of the reachable blocks; if the mask keeps more, all are attended. It
            reads the mask on the host.
        padding_mask: True (B, Lk) at keys to ignore, whatever they hold. Under causality the
            queries are the last of the same tokens, and the output of those at padding is 0.

    Returns:
        Output (B, H, Lq, D) in the dtype of ``q``.

    Raises:
        ValueError: Shapes or dtypes do not fit.
    """
    _check(q, k, v)
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    block_mask = _expand(block_mask, q, k, layout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if padding_mask is not None:
        check_padding_mask(padding_mask, (k.shape[0], k.shape[2]))
    elif not torch.compiler.is_compiling() and _is_dense(block_mask, layout, dense_above):
        return _dense(q, k, v, layout, scale)
    return _sparse(q, k, v, block_mask, layout, scale, padding_mask)


def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    layout: BlockLayout,
    scale: float,
    padding_mask: Tensor | None,
) -> Tensor:
    ignored = None
    if padding_mask is not None and layout.causal:
        ignored = padding_mask[:, layout.offset :]
        q = reference.without_padding(q, ignored)
    arguments = (q, k, v, block_mask, layout.size, layout.causal, scale)
    if in_forward_mode():
        out = reference.forward(*arguments, padding_mask)[0]
    else:
        sparse = "rows" if layout.is_short else "gather"
        backend = "triton" if use_kernel(q, k, v) else sparse
        out = cast(Tensor, _forward(*arguments, backend, padding_mask)[0])
    return out if ignored is None else reference.without_padding(out, ignored)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = (
        q.ndim == k.ndim == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    )
    if not fits or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must be (B, H, Lq, D),"
            " (B, K, Lk, D) and (B, K, Lk, D), where K divides H"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _expand(block_mask: Tensor, q: Tensor, k: Tensor, layout: BlockLayout) -> Tensor:
    """Return the mask as (B, H, Nq, Nk)."""
    check_at_least(1, block_size=layout.size)
    if layout.offset < 0:
        raise ValueError(
            f"causal attention needs no more queries than keys, got {layout.num_queries} and"
            f" {layout.num_keys}"
        )
    batch, heads = q.shape[:2]
    grid = (layout.num_query_blocks, layout.num_key_blocks)
    if block_mask.dtype != torch.bool:
        raise ValueError(f"block_mask must be bool with True = keep, got {block_mask.dtype}")
    if (
        block_mask.ndim != 4
        or block_mask.shape[0] not in (1, batch)
        or block_mask.shape[1] not in (1, heads, k.shape[1])
        or block_mask.shape[2:] != grid
    ):
        raise ValueError(
            f"block_mask {tuple(block_mask.shape)} must be {(batch, heads, *grid)} for blocks of"
            f" {layout.size} positions; batch and heads may be 1, heads may be {k.shape[1]}"
        )
    if block_mask.shape[1] == k.shape[1] != heads:
        block_mask = block_mask.repeat_interleave(heads // k.shape[1], 1)
    return block_mask.expand(batch, heads, *grid)


def _is_dense(block_mask: Tensor, layout: BlockLayout, dense_above: float) -> bool:
    if not block_mask.numel():
        return False
    reachable = layout.reachable(block_mask.device)
    possible = reachable.sum() * (block_mask.shape[0] * block_mask.shape[1])
    kept = (block_mask & reachable).sum()
    return bool((kept == possible) | (kept > dense_above * possible))


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    whole = layout.offset == 0 and not layout.is_short  # a flag says what (T, T) values would
    masked = layout.causal and layout.num_queries > 1 and not whole
    mask = layout.visible(q.device) if masked else None
    if layout.is_short:  # the queries of a key head are its rows: its keys are not repeated
        queries = q.reshape(*k.shape[:2], -1, q.shape[3])
        mask = None if mask is None else mask.repeat(group, 1)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if layout.offset == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    backend: str,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output, and the log-sum-exp where the backward pass of the backend needs it."""
    arguments = (q, k, v, block_mask, block_size, causal, scale, padding_mask)
    if backend == "triton":
        from core_gates.ops.block_sparse_attention import kernel  # the only place for Triton

        return kernel.forward(*arguments)
    attend = rows.forward if backend == "rows" else gather.forward
    return attend(*arguments), q.new_empty(0, dtype=torch.float32)


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    backend: str,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    settings = (block_size, causal, scale, padding_mask)
    if backend == "triton":
        from core_gates.ops.block_sparse_attention import kernel

        return kernel.backward(grad, q, k, v, block_mask, out, lse, *settings)
    return gather.backward(grad, q, k, v, block_mask, out, *settings)


_forward = custom_op("core_gates::block_sparse_attention", _run, mutates_args=())
_backward = custom_op("core_gates::block_sparse_attention_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(
    q: Tensor,
    _k: Tensor,
    _v: Tensor,
    _block_mask: Tensor,
    _block_size: int,
    _causal: bool,
    _scale: float,
    backend: str,
    _padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = q.shape[:3] if backend == "triton" else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@_backward.register_fake
def _(
    _grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _block_mask: Tensor,
    _out: Tensor,
    _lse: Tensor,
    _block_size: int,
    _causal: bool,
    _scale: float,
    _backend: str,
    _padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.size, ctx.causal, ctx.scale, ctx.backend, padding_mask = inputs
    ctx.save_for_backward(*tensors, *output, padding_mask)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> Any:
    *saved, padding_mask = ctx.saved_tensors
    settings = (ctx.size, ctx.causal, ctx.scale, ctx.backend)
    return *_backward(grad, *saved, *settings, padding_mask), *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_save)
