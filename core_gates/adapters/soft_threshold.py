"""The gate of SoRA: a factor for each rank component, which soft thresholding makes zero."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from core_gates.ops.soft_threshold.op import soft_threshold

GateInitialization = Literal["normal", "ones"]


class SoftThreshold(nn.Module):
    """Multiply rank components by a gate that a proximal step sparsifies (Ding et al., 2023).

    The gate is trained by gradient and shrunk by ``S_ξ(g) = sign(g) max(|g| - ξ, 0)`` after every
    optimizer step, which makes components exactly zero. A zero gate still receives a gradient and
    may come back. The optimizer takes the step where its group says so::

        gates = [m.weight for m in model.modules() if isinstance(m, SoftThreshold)]
        ProximalAdamW([{"params": others}, {"params": gates, "xi": 3e-4}], lr=8e-4)

    Args:
        r: Number of components R.
        initialization: ``normal`` draws the gate from N(0, 1) as published; ``ones`` starts as a
            plain LoRA.
        device: Device of the gate.
        dtype: Floating dtype of the gate.

    Shape:
        (..., R) to the same; ``weight`` (R,).

    Raises:
        ValueError: ``r`` is below 1 or the initialization is unknown.
    """

    def __init__(
        self,
        r: int,
        *,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, got {r}")
        if initialization not in get_args(GateInitialization):
            known = ", ".join(get_args(GateInitialization))
            raise ValueError(f"unknown initialization {initialization!r}; choose one of {known}")
        self.initialization = initialization
        self.weight = nn.Parameter(torch.empty(r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate as ``initialization`` says."""
        if self.initialization == "normal":
            nn.init.normal_(self.weight)
        else:
            nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden * gate``."""
        return hidden * self.weight.to(hidden.dtype)

    def gate_values(self, hidden: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the gate (R,), which no input changes."""
        return self.weight

    @property
    def kept(self) -> Tensor:
        """True (R,) where the gate is not zero."""
        return self.weight.detach() != 0

    @torch.no_grad()
    def shrink_(self, threshold: float) -> None:
        """Take one proximal step in place, for training loops without a proximal optimizer.

        Args:
            threshold: ξ, not negative; learning rate times the factor of the L1 penalty.

        Raises:
            ValueError: The threshold is negative or NaN.
        """
        self.weight.copy_(soft_threshold(self.weight, threshold))

    def extra_repr(self) -> str:
        """Show the size in ``print(gate)``."""
        return f"r={self.weight.shape[0]}"


def gate_l1_loss(model: nn.Module) -> Tensor:
    """Return the mean of ``|g|`` over all entries of all soft-thresholded gates of a model.

    The published code adds it to the loss, times a factor, beside the proximal step.

    Args:
        model: Module that holds gates; any :class:`SoftThreshold` in it counts.

    Raises:
        ValueError: The model holds no such gate.
    """
    gates = [m.weight for m in model.modules() if isinstance(m, SoftThreshold)]
    if not gates:
        raise ValueError(f"{type(model).__name__} holds no SoftThreshold gate to take the norm of")
    absolute = torch.stack([gate.abs().sum() for gate in gates])
    return absolute.sum() / sum(gate.numel() for gate in gates)
