"""``compress``: which tokens of sequences are active, and the slots they are compressed to."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.errors import check_at_least
from core_gates.ops._select import definition, register_direction, use_kernel
from core_gates.ops.compress import reference


class ActiveTokens(NamedTuple):
    """A one-to-one map between the active tokens of every sequence and its first slots.

    Attributes:
        slots: Slot of every token (B, T), int64; -1 for a token that has none.
        positions: Token in every slot (B, T'), int64, rising; -1 for an empty slot, of which there
            are only some after the last token.
    """

    slots: Tensor
    positions: Tensor

    @classmethod
    def of(cls, mask: Tensor, num_slots: int | None = None) -> "ActiveTokens":
        """Give the active tokens of every sequence slots in their order.

        Args:
            mask: True at active tokens (B, T).
            num_slots: T', at most T. By default the largest number of active tokens in the batch,
                at least one where there are tokens; finding it out waits for the device. A given
                number waits for nothing and keeps shapes static; tokens that find no slot are left
                out.

        Raises:
            ValueError: The mask is not a boolean (B, T), or ``num_slots`` is negative.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(
                f"mask must be a boolean (batch, tokens), got {mask.dtype} {tuple(mask.shape)}"
            )
        if num_slots is None:
            counts = mask.sum(-1)
            num_slots = max(int(counts.max()), 1) if mask.numel() else 0
        check_at_least(0, num_slots=num_slots)
        num_slots = min(num_slots, mask.shape[1])
        order = mask.cumsum(-1) - 1
        slots = order.masked_fill(~mask | (order >= num_slots), -1)
        tokens = torch.arange(mask.shape[1], device=mask.device).expand_as(slots)
        # Whatever has no slot is written after the last one and cut off.
        after = torch.where(slots < 0, num_slots, slots)
        positions = slots.new_full((mask.shape[0], num_slots + 1), -1)
        return cls(slots, positions.scatter(1, after, tokens)[:, :num_slots])


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
