"""The public function ``gated_residual_norm`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

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


_forward = custom_op("core_gates::gated_residual_norm", reference.forward, mutates_args=())
_backward = custom_op(
    "core_gates::gated_residual_norm_backward", reference.backward, mutates_args=()
)

_cpp = custom_op("core_gates::gated_residual_norm_cpp", native.forward, mutates_args=())
_cpp_backward = custom_op(
    "core_gates::gated_residual_norm_cpp_backward", native.backward, mutates_args=()
)


@_forward.register_kernel("cuda")
def _(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from core_gates.ops.gated_residual_norm import kernel  # the only place that needs Triton

    return kernel.forward(x, branch, scores, weight, bias, eps)


@_backward.register_kernel("cuda")
def _(
    grad_total: Tensor,
    grad_normalized: Tensor,
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from core_gates.ops.gated_residual_norm import kernel

    return kernel.backward(grad_total, grad_normalized, x, branch, scores, weight, eps)


@_cpp.register_fake
@_forward.register_fake
def _(
    x: Tensor, _branch: Tensor, _scores: Tensor, _weight: Tensor, _bias: Tensor, _eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_cpp_backward.register_fake
@_backward.register_fake
def _(
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    x, branch, scores, weight, _, eps = inputs
    ctx.save_for_backward(x, branch, scores, weight)
    ctx.eps = eps


def _differentiate(ctx: Any, grad_total: Tensor, grad_normalized: Tensor) -> Any:
    return *_backward(grad_total, grad_normalized, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_save)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, branch, scores, weight, _, eps = inputs
    ctx.save_for_backward(output[0], branch, scores, weight)
    ctx.eps = eps


def _differentiate_cpp(ctx: Any, grad_total: Tensor, grad_normalized: Tensor) -> Any:
    return *_cpp_backward(grad_total, grad_normalized, *ctx.saved_tensors, ctx.eps), None


_cpp.register_autograd(_differentiate_cpp, setup_context=_save_sum)
