"""The contract of routing gates."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from core_gates.routing.output import RoutingOutput

_HALF = (torch.float16, torch.bfloat16)


class Gate(nn.Module, ABC):
    """Base of every gate that routes positions to experts.

    A subclass builds its parameters on ``device``, so that the meta device works, fills them in
    ``reset_parameters`` and implements ``forward``. Whatever changes during training (a
    temperature, a balancing bias, a phase) lives in float32 or integer buffers that only
    :meth:`update` changes, once per optimizer step; ``forward`` changes nothing, which keeps
    activation checkpointing, gradient accumulation and resuming exact. Noise comes from the global
    random generator and is drawn in training mode only.

    Args:
        dim: Features of a routing input.
        num_experts: Number of experts.

    Attributes:
        couples_tokens: True if the routing of a position depends on others. A causal model must
            refuse such a gate: it looks into the future.
        renormalize: True if the gate scales its weights to sum 1 after selection.
        learns_from_routings: True if :meth:`update` reads its routings; only then are they kept.
        phases: Names of the stages of the gate, in order. A staged gate evaluates by its phase.

    Raises:
        ValueError: ``dim`` or ``num_experts`` is below 1.
    """

    phases: ClassVar[tuple[str, ...]] = ("steady",)
    learns_from_routings: bool = False
    couples_tokens: bool = False
    renormalize: bool = False

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.dim = dim
        self.num_experts = num_experts

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set parameters and state to their initial values."""

    @abstractmethod
    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> RoutingOutput:
        """Route every position of ``x``.

        Args:
            x: Routing input (..., D), any floating dtype; the routing is computed in float32.
            ids: Token or user numbers (...), for gates that route by identity.
            padding_mask: True (...) at positions to *ignore*. (Attention masks of Hugging Face
                mean the opposite: convert them where they enter.)
        """

    @property
    def phase(self) -> str:
        """Name of the present stage; a staged gate derives it from its buffers."""
        return self.phases[0]

    def selectors(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Return (..., J, E) whose sum over J is the dense weights of ``x``.

        J is the number of trees or selectors of a gate that is a sum of several, else 1. The
        arguments are those of :meth:`forward`.
        """
        routing: RoutingOutput = self(x, ids=ids, padding_mask=padding_mask)
        return routing.to_dense(self.num_experts).weights.unsqueeze(-2)

    def update(self, routings: Sequence[RoutingOutput]) -> None:
        """Advance the state by one optimizer step; a gate without state keeps this empty default.

        Args:
            routings: What this gate returned for the micro-batches of the step on this rank,
                detached; empty unless ``learns_from_routings``. A gate that learns from them sums
                over ranks itself.
        """

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Older checkpoints hold scalars where FSDP, which shards none, needs shape (1,).
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter is not None and parameter.shape == (1,) and isinstance(value, Tensor):
                state_dict[prefix + name] = value.reshape(1) if value.ndim == 0 else value
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(torch.bfloat16) must not round temperatures and biases.
        before = {k: b for k, b in self._buffers.items() if b is not None and b.dtype not in _HALF}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype in _HALF:
                self._buffers[name] = buffer.to(moved.device)
        return self
