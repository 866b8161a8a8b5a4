"""The public function ``router`` and its registration as a PyTorch operator."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype
from core_gates.ops._select import definition, register_direction, use_kernel
from core_gates.ops.router import reference


class Routed(NamedTuple):
    """What the router finds out about N tokens and E experts.

    Attributes:
        weights: Weights of the chosen experts (..., K), in descending order.
        indices: The chosen experts (..., K), int64.
        probs: Softmax of all logits (..., E).
        counts: How often each expert was chosen (E,), int64.
        z_loss: Mean squared log-partition of the logits.
    """

    weights: Tensor
    indices: Tensor
    probs: Tensor
    counts: Tensor
    z_loss: Tensor


def router(logits: Tensor, k: int, *, renormalize: bool = True) -> Routed:
    """Choose the ``k`` largest logits of every token, fused where a kernel is chosen.

    Equal logits go to the lowest index, which ``torch.topk`` does not promise.

    Args:
        logits: Scores of the experts (..., E), any floating dtype; computed in float32.
        k: Experts chosen per token.
        renormalize: Whether the weights are the softmax over the chosen logits, which sums to 1, or
            the chosen part of the softmax over all.

    Raises:
        ValueError: ``k`` is not between 1 and E.
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie between 1 and the {num_experts} experts, got {k}")
    function = _forward if use_kernel(logits) else definition(reference.forward)
    flat = function(logits.reshape(-1, num_experts), k, renormalize)
    weights, indices, probs, counts, z_loss = flat
    leading = logits.shape[:-1]
    return Routed(
        weights.view(*leading, k),
        indices.view(*leading, k),
        probs.view(*leading, num_experts),
        counts,
        z_loss,
    )


def _fake(
    logits: Tensor, k: int, _renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact = logits.new_empty(logits.shape, dtype=accumulation_dtype(logits))
    num_rows, num_experts = logits.shape
    indices = logits.new_empty((num_rows, k), dtype=torch.int64)
    counts = logits.new_empty((num_experts,), dtype=torch.int64)
    return exact.new_empty((num_rows, k)), indices, exact, counts, exact.new_empty(())


def _save(ctx: Any, inputs: tuple[Tensor, int, bool], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[1], output[0])
    ctx.renormalize = inputs[2]
    ctx.mark_non_differentiable(output[1], output[3])


def _differentiate(
    ctx: Any, grad_weights: Tensor, _1: Any, grad_probs: Tensor, _2: Any, grad_z: Tensor
) -> Any:
    saved = ctx.saved_tensors
    return _backward(grad_weights, grad_probs, grad_z, *saved, ctx.renormalize), None, None


_forward = register_direction(reference, "forward", _fake)
_backward = register_direction(reference, "backward", lambda *args: torch.empty_like(args[3]))
_forward.register_autograd(_differentiate, setup_context=_save)
