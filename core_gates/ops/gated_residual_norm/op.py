"""The public function ``gated_residual_norm`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from core_gates.ops._register import register_direction
from core_gates.ops._select import definition, use_cpp, use_kernel
from core_gates.ops.gated_residual_norm import native, reference


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalize the sum for the next branch.

    ``y = x + s * branch`` and ``LayerNorm(y)``, the seam between two branches of a pre-norm
    transformer with feature-selection gates. The chain is bound by memory: fused it reads both
    inputs once and writes both outputs once.

    Args:
        x: Residual stream (..., D).
        branch: Output of attention or MLP (..., D).
        scores: Score of each feature (D,), after its rectifier.
        weight: Weight of the LayerNorm (D,).
        bias: Bias of the LayerNorm (D,).
        eps: Added to the variance.

    Returns:
        The new stream ``y`` and its normalization, both (..., D) in the dtype of ``x``.

    Raises:
        ValueError: The shapes do not fit.
    """
    if x.shape != branch.shape or x.ndim == 0:
        raise ValueError(f"x {tuple(x.shape)} and branch {tuple(branch.shape)} must have one shape")
    dim = x.shape[-1]
    for name, vector in (("scores", scores), ("weight", weight), ("bias", bias)):
        if vector.shape != (dim,):
            raise ValueError(f"{name} {tuple(vector.shape)} must have the shape ({dim},)")
    cpp = use_cpp(x, branch, scores, weight, bias)
    if not cpp and not use_kernel(x, branch, scores, weight):
        return definition(reference.forward)(x, branch, scores, weight, bias, eps)
    rows = x.reshape(-1, dim), branch.reshape(-1, dim)
    total, normalized = (_cpp if cpp else _forward)(*rows, scores, weight, bias, eps)
    return total.view(x.shape), normalized.view(x.shape)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(
    _grad_total: Tensor,
    _grad_normalized: Tensor,
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    _eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = torch.empty_like(scores), torch.empty_like(weight), torch.empty_like(weight)
    return x.new_empty(x.shape), branch.new_empty(branch.shape), *vectors


def _differentiable(forward: CustomOpDef, backward: CustomOpDef, *, by_sum: bool) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, branch, scores, weight, _, ctx.eps = inputs
        ctx.save_for_backward(output[0] if by_sum else x, branch, scores, weight)

    def differentiate(ctx: Any, grad_total: Tensor, grad_normalized: Tensor) -> Any:
        return *backward(grad_total, grad_normalized, *ctx.saved_tensors, ctx.eps), None

    forward.register_autograd(differentiate, setup_context=save)


_forward = register_direction(reference, "forward", _fake)
_differentiable(_forward, register_direction(reference, "backward", _fake_backward), by_sum=False)
_cpp = custom_op("core_gates::gated_residual_norm_cpp", native.forward, mutates_args=())
_cpp.register_fake(_fake)
_cpp_backward = custom_op(
    "core_gates::gated_residual_norm_cpp_backward", native.backward, mutates_args=()
)
_cpp_backward.register_fake(_fake_backward)
_differentiable(_cpp, _cpp_backward, by_sum=True)
