"""The public function ``gated_lora`` and its registration as a PyTorch operator."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.numerics import autocast_off
from core_gates.ops._select import definition, use_cpp, use_kernel
from core_gates.ops.gated_lora import native, reference, streamed

# Tiles of larger ranks exceed the shared memory of a multiprocessor (160 KiB and more).
LARGEST_KERNEL_RANK = 128


def gated_lora(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    *,
    eps: float = 1e-5,
    overwrite_base: bool = False,
) -> Tensor:
    """Add K low-rank adapters to the output of a layer, each with its own gate.

    With ``y_k = hidden_k @ up_k``, the base output and the adapter outputs normalized over the
    features, ``n`` and ``z_k``, and the rows ``c`` of ``coefficients``, it returns
    ``base + c_4 Σ_k sigmoid(c_0 + c_1 n + (c_2 + c_3 n) z_k) y_k``, the gate of AutoLoRA (2025)
    with its affine parameters folded together. No tensor of K times the size of ``base`` exists:
    the statistics of ``y_k`` come from the Gram matrix of ``up_k``, and tokens pass in blocks, in
    the backward pass too.

    Args:
        base: Output of the layer (..., D).
        hidden: Inputs of the second factors of all adapters, side by side (..., R).
        up: Second factors of all adapters, stacked (R, D).
        coefficients: The five rows (5, D): constant, base, adapter, cross and output; or those of
            every sample (B, 5, D) of ``base`` (B, ..., D).
        ranks: Rank of every adapter; they sum to R.
        eps: What is added to the variances.
        overwrite_base: Whether the result may take the memory of ``base``, which spares the system
            the pages of a second output; for inference, without gradients.

    Returns:
        The mixed output (..., D) in the dtype of ``base``; half precision is computed in float32.

    Raises:
        ValueError: A shape does not fit, there is no adapter, or ``base`` is to be overwritten
            where gradients are recorded.
    """
    _check(base, hidden, up, coefficients, ranks)
    if overwrite_base and torch.is_grad_enabled():
        raise ValueError("base can be overwritten under torch.no_grad() only")
    tokens = base.reshape(-1, base.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
    arguments = *tokens, up, coefficients, list(ranks), eps
    kernel = use_kernel(base, hidden, up, coefficients) and max(ranks) <= LARGEST_KERNEL_RANK
    exporting = torch.compiler.is_exporting()
    if coefficients.ndim == 3 and (exporting or kernel):  # these take one sample at a time
        samples = zip(base, hidden, coefficients, strict=True)
        return torch.stack([gated_lora(o, h, up, c, ranks, eps=eps) for o, h, c in samples])
    if exporting:  # other runtimes do not know the operator
        return reference.forward(*arguments).view(base.shape)
    # Dynamo would unroll the loop over blocks, hence the opaque operator while compiling.
    opaque = kernel or torch.compiler.is_compiling()
    if opaque:
        out: Tensor = _forward(*arguments, kernel)
    elif overwrite_base:
        out = _run_streamed(*arguments, out=tokens[0])
    else:
        out = _streamed(*arguments)
    return out.view(base.shape)


def _check(
    base: Tensor, hidden: Tensor, up: Tensor, coefficients: Tensor, ranks: Sequence[int]
) -> None:
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks must name at least one adapter, each of rank >= 1, got {ranks}")
    samples = base.shape[:1] if coefficients.ndim == 3 and base.ndim > 1 else ()
    expected = {
        "hidden": (hidden, (*base.shape[:-1], sum(ranks))),
        "up": (up, (sum(ranks), base.shape[-1])),
        "coefficients": (coefficients, (*samples, 5, base.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} must have the shape {tuple(shape)} for a base output"
                f" {tuple(base.shape)} and adapters of ranks {list(ranks)}"
            )


def _run_streamed(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: list[int],
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
    with autocast_off(base):
        if _native(base, hidden, up, coefficients):
            exact = (
                out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            )
            native.forward(base.float(), hidden.float(), up, coefficients, ranks, eps, exact)
            return out if exact is out else out.copy_(exact)
        mix = definition(reference.mix)
        return streamed.forward(mix, base, hidden, up, coefficients, ranks, eps, out)


def _native(base: Tensor, hidden: Tensor, up: Tensor, coefficients: Tensor) -> bool:
    """Return whether C++ computes these; activations of half precision are made float32 first."""
    half = torch.float16, torch.bfloat16
    activations = [
        t.new_empty(0, dtype=torch.float32) if t.dtype in half else t for t in (base, hidden)
    ]
    return use_cpp(*activations, up, coefficients) and native.possible(base)


class _Streamed(torch.autograd.Function):
    """The blockwise definition; its backward pass is differentiable, too."""

    @staticmethod
    def forward(
        base: Tensor, hidden: Tensor, up: Tensor, coefficients: Tensor, ranks: list[int], eps: float
    ) -> Tensor:
        return _run_streamed(base, hidden, up, coefficients, ranks, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:4])
        ctx.ranks, ctx.eps = inputs[4:]
        ctx.native = _native(*inputs[:4])
        ctx.mix_backward = definition(reference.mix_backward)  # by the mode of the forward pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        with autocast_off(grad):
            base, hidden, up, coefficients = ctx.saved_tensors
            if ctx.native and not ctx.needs_input_grad[2] and not torch.is_grad_enabled():
                exact = grad.float(), base.float(), hidden.float()
                of_base, of_hidden, of_coefficients = native.backward(
                    *exact, up, coefficients, ctx.ranks, ctx.eps
                )
                gradients = of_base.to(base.dtype), of_hidden.to(hidden.dtype)
                return *gradients, None, of_coefficients, None, None
            grads = streamed.backward(
                ctx.mix_backward, grad, base, hidden, up, coefficients, ctx.ranks, ctx.eps
            )
        return *grads, None, None


_streamed: Callable[..., Tensor] = _Streamed.apply


@custom_op("core_gates::gated_lora", mutates_args=())
def _forward(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: list[int],
    eps: float,
    kernel: bool,
) -> Tensor:
    if not kernel:
        return _run_streamed(base, hidden, up, coefficients, ranks, eps)
    with autocast_off(base):
        return cast(Tensor, _kernel().forward(base, hidden, up, coefficients, ranks, eps))


@custom_op("core_gates::gated_lora_backward", mutates_args=())
def _backward(
    grad: Tensor,
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: list[int],
    eps: float,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = grad, base, hidden, up, coefficients
    with autocast_off(base):
        if kernel:
            grads: tuple[Tensor, Tensor, Tensor, Tensor]
            grads = _kernel().backward(*tensors, ranks, eps)
            return grads
        return streamed.backward(definition(reference.mix_backward), *tensors, ranks, eps)


def _kernel() -> Any:
    from core_gates.ops.gated_lora import kernel  # the only place that needs Triton

    return kernel


@_forward.register_fake
def _(base: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(_grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    base, hidden, up, coefficients = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in rest[:4]
    )
    return base, hidden, up, coefficients


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
