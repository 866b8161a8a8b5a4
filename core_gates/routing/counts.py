"""Counts of routed choices, with a flag of what is not finite.

The flag travels with the counts as one more element, so that a NaN costs no extra
synchronization: the code that brings the counts to the host (a dispatcher, a log) sees it there.
"""

import torch
from torch import Tensor

from core_gates.errors import GatesError
from core_gates.routing.output import RoutingOutput


def count_routed(routing: RoutingOutput, num_experts: int | None = None) -> Tensor:
    """Count the kept choices of every expert and the tokens that are not finite.

    A token with a weight that is NaN or infinite counts in the last element alone. Sums over
    micro-batches and ranks are those of the joined batch.

    Args:
        routing: Output of a gate.
        num_experts: Needed where the output does not know it.

    Returns:
        Counts (E + 1,), int64, on the device of the weights; not read on the host.
    """
    finite = routing.weights.detach().isfinite().all(-1)
    if routing.dispatch is not None:
        finite = finite.all(-1)
    chosen = routing.chosen(num_experts, dropped=False).detach()
    chosen = chosen.masked_fill(~finite.unsqueeze(-1), 0).reshape(-1, chosen.shape[-1])
    counts = chosen.sum(0, dtype=torch.int64)
    return torch.cat([counts, (~finite).sum().reshape(1)])


def count_non_finite(weights: Tensor) -> Tensor:
    """Return the number of weights that are not finite (), int64; not read on the host."""
    return (~weights.detach().isfinite()).sum()


def refuse_non_finite(number: int, gate: str = "the gate") -> None:
    """Refuse a routing by the number of its weights that are not finite, outside of compilation.

    Raises:
        GatesError: The number is not zero.
    """
    if not torch.compiler.is_compiling() and number:
        raise GatesError(
            f"{gate} returned {number} weight{'s' * (number > 1)} that are not finite;"
            " look for NaN or infinity in its input and its parameters"
        )


def read_counts(counts: Tensor, gate: str = "gate") -> list[int]:
    """Bring counts of :func:`count_routed` to the host.

    Args:
        counts: Counts (E + 1,).
        gate: Name of the gate, for errors.

    Returns:
        Kept choices of every expert.

    Raises:
        GatesError: The routing of a token was not finite.
    """
    *routed, non_finite = counts.tolist()
    if non_finite:
        raise GatesError(
            f"gate {gate!r} routed {non_finite} token{'s' * (non_finite > 1)} with weights that"
            " are not finite; look for NaN or infinity in its input and its parameters"
        )
    return routed
