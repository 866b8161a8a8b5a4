"""The self gate of HoME."""

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import linear_fp32


class SelfGate(nn.Module):
    """Weigh the experts of a group for the residual path of that group (arXiv 2408.05430).

    The weights are the softmax of ``x W + b``, or its sigmoid if there is exactly one expert, so
    that a lone expert can still be closed.

    Args:
        dim: Features of the gate's input.
        num_experts: Experts E of the group.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the weights are computed in float32.

    Shape:
        ``x`` (..., dim) and experts (..., E, D) to (..., D).

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_experts=num_experts)
        self.dim, self.num_experts = dim, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²) and zero the bias."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights (..., E) in float32 at least."""
        logits = linear_fp32(x, self.weight, self.bias)
        return logits.sigmoid() if self.num_experts == 1 else logits.softmax(-1)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Return the weighted sum (..., D) of the outputs of the experts (..., E, D).

        Raises:
            ValueError: ``x`` or ``experts`` has another shape.
        """
        weights = self.weights(x)
        if experts.shape[:-1] != weights.shape:
            raise ValueError(
                f"experts {tuple(experts.shape)} must be {tuple(weights.shape)} and their features"
            )
        return torch.einsum("...e,...ed->...d", weights.to(experts.dtype), experts)

    def gate_values(self, x: Tensor, experts: Tensor) -> Tensor:  # noqa: ARG002
        """Return the weights (..., E)."""
        return self.weights(x)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}"
