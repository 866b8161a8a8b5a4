"""The public function ``feature_gate``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core_gates.numerics import autocast_off
from core_gates.ops._select import (
    definition,
    derivatives,
    register,
    use_cpp,
    use_kernel,
    use_slices,
)
from core_gates.ops.feature_gate import blocks, reference
from core_gates.ops.feature_gate.blocks import NativeSteps, Steps


def feature_gate(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> Tensor:
    """Multiply inputs by the factors of low-rank feature gates (HoME, arXiv 2408.05430).

    Run j is ``v_i * Σ_l softmax(v_i mixer_g + mixer_bias_g)_l 2σ(v_i down_gl up_gl)`` for its input
    ``i = inputs[j]`` and its gate ``g = gates[j]``. As the mixture sums to one, the factor is
    ``1 + Σ_l mixture_l (2σ(·) - 1)``, the form used here: with ``up = 0`` it is exactly one. The
    logits, L times the size of the result, are computed again in the backward pass.

    Args:
        v: Inputs (I, N, D).
        mixer: Weights of the mixtures (G, L, D).
        mixer_bias: Their biases (G, L).
        down: First factors of the maps (G, L, r, D).
        up: Second factors of the maps (G, L, r, D).
        inputs: Input of every run (R,).
        gates: Gate of every run (R,).

    Returns:
        The rescaled inputs (R, N, D) in the dtype of ``v``, under autocast in that of autocast. In
        half precision mixtures and factors are computed in float32.

    Raises:
        ValueError: The shapes do not fit, or a run names an input or a gate that does not exist.
    """
    _check(v, mixer, mixer_bias, down, up, inputs, gates)
    device = v.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        v, down, up = v.to(half), down.to(half), up.to(half)
    tensors, runs = (v, mixer, mixer_bias, down, up), (list(inputs), list(gates))
    with autocast_off(v):
        if use_slices(*tensors):
            return _blockwise(*tensors, *runs)
        function = _forward if use_kernel(*tensors) else definition(reference.forward)
        out: Tensor = function(*tensors, *runs)  # type: ignore[call-arg]
    return out


def _check(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
) -> None:
    if v.ndim != 3 or up.ndim != 4 or v.shape[2] != up.shape[3] or down.shape != up.shape:
        raise ValueError(
            f"v {tuple(v.shape)} must be (inputs, rows, features), down {tuple(down.shape)} and up"
            f" {tuple(up.shape)} (gates, maps, rank, features) of the same features"
        )
    shape = up.shape[:2]
    if mixer.shape != (*shape, v.shape[2]) or mixer_bias.shape != shape:
        raise ValueError(
            f"mixer {tuple(mixer.shape)} and mixer_bias {tuple(mixer_bias.shape)} must begin with"
            f" the {tuple(shape)} gates and maps of up"
        )
    for name, indices, number in (("inputs", inputs, len(v)), ("gates", gates, len(up))):
        if not indices or len(inputs) != len(gates) or not all(0 <= i < number for i in indices):
            raise ValueError(f"{name} {list(indices)} must name one of {number} for each run")


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        mixer: Tensor,
        mixer_bias: Tensor,
        down: Tensor,
        up: Tensor,
        inputs: list[int],
        gates: list[int],
    ) -> Tensor:
        v, others = v.contiguous(), (mixer, mixer_bias, down, up)
        steps = NativeSteps() if use_cpp(v, *others) else Steps()
        out, maps = blocks.forward(v, *others, inputs, gates, steps)
        kept = [t for group in maps for t in (group.weight, group.hidden, group.mixture)]
        ctx.save_for_backward(v, *others, *kept)
        ctx.runs, ctx.options, ctx.steps = [m.runs for m in maps], (inputs, gates), type(steps)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        tensors, kept = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        if torch.is_grad_enabled():
            of_tensors = derivatives(reference.forward, tensors, ctx.options, grad)
            return *of_tensors, None, None
        v, _, _, down, up = tensors
        parts = zip(ctx.runs, kept[0::3], kept[1::3], kept[2::3], strict=True)
        maps = [blocks.Maps(*part) for part in parts]
        grad, steps = grad.contiguous(), ctx.steps()
        gradients = blocks.backward(grad, v, down, up, ctx.options[1], maps, steps)
        return *gradients, None, None


_blockwise: Callable[..., Tensor] = _Blockwise.apply


def _fake(v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(len(rest[4]), *v.shape[1:])


_forward = register(reference, _fake, saved=5)
