"""The public function ``grouped_linear`` and its registration as a PyTorch operator."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.activations import check_activation
from core_gates.numerics import autocast_dtype
from core_gates.ops import _select
from core_gates.ops.grouped_linear import blocks, grouped_mm, reference, segments


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "identity",
    gated: bool = False,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
) -> Tensor:
    """Return ``act(row @ weight[e].T + bias[e])`` for the rows of every group e.

    Groups follow each other: the first ``counts[0]`` rows belong to group 0, and so on.
    Rows beyond the sum of ``counts`` belong to no group; their results are zero and they get no
    gradient. Under autocast the matmuls are computed in its dtype.

    Second derivatives exist in float64 only, which is computed by the definition.

    Args:
        x: Rows (M, D).
        weight: Weights (E, F, D), as in ``torch.nn.functional.linear``.
        counts: Rows of every group (E,), int64; their sum is at most N.
        bias: Biases (E, F).
        activation: ``identity``, ``relu``, ``silu``, ``gelu`` or ``gelu_tanh``.
        gated: Whether the result is ``act(first half) * second half`` of the F features.
        gather: Row of ``x`` that each row of a group reads (N,), int64; N = M without it.
        scatter: Row of the result that each row of a group writes (N,), a permutation.

    Returns:
        Rows (N, F), or (N, F / 2) if gated.

    Raises:
        ValueError: Shapes do not fit, or the activation is unknown.
    """
    _check(x, weight, counts, bias, gather, scatter)
    check_activation(activation)
    if gated and weight.shape[1] % 2:
        raise ValueError(f"gated weights need an even number of features, got {weight.shape[1]}")
    if dtype := autocast_dtype(x):
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    arguments = (x, weight, counts, bias, gather, scatter, activation, gated)
    if (x.dtype == torch.float64 and not x.is_meta) or _select.is_transformed():
        return reference.forward(*arguments)
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    backend = _backend(x, weight, num_rows, keep)
    if keep or torch.compiler.is_compiling() or x.is_meta:
        return cast(Tensor, _forward(*arguments, keep, backend)[0])
    return _run(*arguments, keep, backend)[0]  # a registered operator costs more than its work


def _check(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
) -> None:
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} must be (M, D) and weight {tuple(weight.shape)} (E, F, D)"
        )
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    _check_shape("counts", counts, (weight.shape[0],))
    _check_shape("bias", bias, weight.shape[:2])
    _check_shape("gather", gather, (num_rows,))
    _check_shape("scatter", scatter, (num_rows,))


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape {tuple(shape)}")


_BACKENDS: dict[str, Any] = {"segments": segments, "grouped_mm": grouped_mm}


def _backend(x: Tensor, weight: Tensor, num_rows: int, keep: bool) -> str:
    if grouped_mm.possible(x, weight):
        return "grouped_mm"
    few = segments.WEIGHT_FIRST and blocks.worthwhile(num_rows, weight.shape[0])
    if not keep and _select._mode == "compile" and few:
        return "blocks"
    return "segments"


def _run(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the result and, if they are kept, the values before the activation."""
    arguments = (x, weight, counts, bias, gather, scatter, activation, gated)
    if backend == "blocks":
        return blocks.forward(*arguments), x.new_empty(0, weight.shape[1])
    return _BACKENDS[backend].forward(*arguments, keep)  # type: ignore[no-any-return]


def _run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    kept: Tensor,
    activation: str,
    gated: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty where they are not needed."""
    needs = (needs_x, needs_weight, needs_bias)
    saved = (x, weight, counts, gather, scatter, kept, activation, gated)
    return _BACKENDS[backend].backward(grad, *saved, *needs)  # type: ignore[no-any-return]


_forward = custom_op("core_gates::grouped_linear", _run, mutates_args=())
_backward = custom_op("core_gates::grouped_linear_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    _counts: Tensor,
    _bias: Tensor | None,
    gather: Tensor | None,
    _scatter: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
    _backend: str,
) -> tuple[Tensor, Tensor]:
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    width = weight.shape[1]
    has_kept = keep and (gated or activation != "identity")
    out = x.new_empty(num_rows, width // 2 if gated else width)
    return out, x.new_empty(num_rows if has_kept else 0, width)


@_backward.register_fake
def _(
    _grad: Tensor,
    x: Tensor,
    weight: Tensor,
    _counts: Tensor,
    _gather: Tensor | None,
    _scatter: Tensor | None,
    _kept: Tensor,
    _activation: str,
    _gated: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    _backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape[:2] if needs_bias else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, counts, _, gather, scatter, ctx.activation, ctx.gated, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, counts, gather, scatter, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> Any:
    x, weight, counts, gather, scatter, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    saved = (x, weight, counts, gather, scatter, kept, ctx.activation, ctx.gated)
    gradients = _backward(grad, *saved, *needs, ctx.backend)
    grads = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return grads[0], grads[1], None, grads[2], None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
