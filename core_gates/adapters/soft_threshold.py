"""The gate of SoRA: a factor for each rank component, which soft thresholding makes zero."""

from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_option
from core_gates.numerics import unrounded

GateInitialization = Literal["normal", "ones"]


class SoftThreshold(nn.Module):
    """Multiply rank components by a gate that a proximal step sparsifies (Ding et al., 2023).

    The gate is trained by gradient and shrunk by ``S_ξ(g) = sign(g) max(|g| - ξ, 0)`` after every
    optimizer step, which makes components exactly zero. A zero gate still receives a gradient and
    may come back. The step can follow any optimizer::

        optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4)
        core_gates.training.ProximalStep(optimizer, rank_gates(model), 3e-4)

    The gate stays in float32 where ``.to(torch.bfloat16)`` rounds everything else: ξ is below the
    resolution of half precision. FSDP2 requires one dtype in each group of parameters: in a model
    of half precision give it the gates first, ``fully_shard(gate)``.

    Args:
        rank: Number of components R; 0 for a gate that is loaded or was pruned away.
        initialization: ``normal`` draws the gate from N(0, 1) as published; ``ones`` starts as a
            plain LoRA.
        device: Device of the gate.
        dtype: Floating dtype of the gate, float32 in place of half precision.

    Shape:
        (..., R) to the same; ``weight`` (R,).

    Raises:
        ValueError: ``rank`` is negative or the initialization is unknown.
    """

    def __init__(
        self,
        rank: int,
        *,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(0, rank=rank)
        check_option("initialization", initialization, get_args(GateInitialization))
        self.initialization = initialization
        exact = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(rank, device=device, dtype=exact))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate according to ``initialization``."""
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

    def extra_repr(self) -> str:
        """Show the size in ``print(gate)``."""
        return f"rank={self.weight.shape[0]}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(unrounded(fn), recurse)  # type: ignore[no-any-return,no-untyped-call]


def rank_gates(model: nn.Module) -> list[nn.Parameter]:
    """Return the soft-thresholded gates of a model, for an optimizer and its proximal step.

    Args:
        model: Module that holds gates; any :class:`SoftThreshold` in it counts.
    """
    return [module.weight for module in model.modules() if isinstance(module, SoftThreshold)]


def gate_l1_loss(model: nn.Module) -> Tensor:
    """Return the mean of ``|g|`` over all entries of all soft-thresholded gates of a model.

    The published code adds it to the loss, times a factor, next to the proximal step.

    Args:
        model: Module that holds gates; any :class:`SoftThreshold` in it counts.

    Raises:
        ValueError: The model holds no such gate.
    """
    gates = rank_gates(model)
    if not gates:
        raise ValueError(f"{type(model).__name__} holds no SoftThreshold gate to take the norm of")
    absolute = torch.stack([gate.abs().sum().to(gates[0].device) for gate in gates])
    return absolute.sum() / max(1, sum(gate.numel() for gate in gates))
