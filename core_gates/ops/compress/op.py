"""The public functions ``compress`` and ``extract`` and their registration as one operator."""

from typing import Any

from torch import Tensor

from core_gates.ops._register import register_direction
from core_gates.ops._select import definition, use_kernel
from core_gates.ops.compress import reference
from core_gates.ops.compress.active import ActiveTokens


def compress(x: Tensor, active: ActiveTokens) -> Tensor:
    """Move the active tokens of every sequence to its front (arXiv 2306.11197).

    Args:
        x: Sequences (B, T, D).
        active: Which tokens are active.

    Returns:
        Compressed sequences (B, T', D) in the order of the tokens; zeros in empty slots.

    Raises:
        ValueError: ``x`` is not a batch of sequences of T tokens.
    """
    _check("x", x, active.slots)
    return _pick_rows(x, active.positions, active.slots)


def extract(y: Tensor, active: ActiveTokens) -> Tensor:
    """Move compressed tokens back to where they came from; the inverse of :func:`compress`.

    Args:
        y: Compressed sequences (B, T', D).
        active: Which tokens are active.

    Returns:
        Sequences (B, T, D) with zeros at all other tokens.

    Raises:
        ValueError: ``y`` is not a batch of T' slots.
    """
    _check("y", y, active.positions)
    return _pick_rows(y, active.slots, active.positions)


def _check(name: str, rows: Tensor, places: Tensor) -> None:
    if rows.ndim != 3 or rows.shape[:2] != places.shape:
        raise ValueError(
            f"{name} {tuple(rows.shape)} must be {tuple(places.shape)} and features; the active"
            " tokens were found for another batch"
        )


def _pick_rows(source: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    function = _forward if use_kernel(source) else definition(reference.forward)
    return function(source, rows, inverse)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    rows, inverse = ctx.saved_tensors
    return _forward(grad, inverse, rows), None, None


_forward = register_direction(
    reference,
    "forward",
    lambda source, rows, _inverse: source.new_empty((*rows.shape, source.shape[-1])),
)
_forward.register_autograd(_differentiate, setup_context=_save)
