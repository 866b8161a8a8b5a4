"""Definition of ``grouped_mlp``: one grouped linear map after the other."""

from torch import Tensor

from core_gates.ops.grouped_linear.op import grouped_linear


def forward(
    x: Tensor,
    first: Tensor,
    down: Tensor,
    counts: Tensor,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gather: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
) -> Tensor:
    """Return the rows of every group after both of its maps; see `op.grouped_mlp`."""
    hidden = grouped_linear(
        x, first, counts, bias=first_bias, activation=activation, gated=gated, gather=gather
    )
    return grouped_linear(hidden, down, counts, bias=down_bias)
