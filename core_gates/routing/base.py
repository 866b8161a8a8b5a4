"""The contract of routing gates."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import linear_fp32, unrounded
from core_gates.routing.output import RoutingOutput
from core_gates.routing.repeated import accumulate

Listener = Callable[[RoutingOutput, Tensor | None], None]
"""What is told every routing of a gate and its padding mask; ``torch.compile`` must trace it."""


class Gate(nn.Module, ABC):
    """Base of every gate that routes tokens to experts.

    A subclass builds its parameters on ``device``, so that the meta device works, fills them in
    ``reset_parameters`` and implements ``forward``. Whatever changes during training (a
    temperature, a balancing bias, a phase) lives in float32 or integer buffers that only
    `update` changes, once per optimizer step; ``forward`` changes nothing, which keeps
    activation checkpointing, gradient accumulation and resuming exact. Noise comes from the global
    random generator and is drawn in training mode only.

    A gate that learns from its routings names the size of their `summary`. Each call in
    training mode adds it to ``counted``, compiled or not, and no tensor of the routing is kept;
    `core_gates.routing.collect.update_gates` sums over ranks, hands the sum to
    `update` and clears it. What a step has counted so far is not state: it is neither saved
    nor a buffer, which ``DistributedDataParallel`` would overwrite by that of rank 0 in every
    forward pass.

    Args:
        dim: Features of a routing input.
        num_experts: Number of experts.
        summary_size: Length S of the summary of a routing; 0 if `update` needs none.
        device: Device of the counts.

    Attributes:
        counted: Calls in training mode since the last update, then the sum of their summaries
            (1 + S,), int64; None if there is no summary.
        listeners: Called with each routing; see ``Listener``. Copies of the gate have none.
        couples_tokens: True if the routing of a token depends on others. A causal model must
            refuse such a gate: it looks into the future.
        renormalize: True if the gate scales its weights to sum 1 after selection.
        phases: Names of the stages of the gate, in order. A staged gate evaluates by its phase.

    Raises:
        ValueError: ``dim`` or ``num_experts`` is below 1.
    """

    phases: ClassVar[tuple[str, ...]] = ("steady",)
    couples_tokens: bool = False
    renormalize: bool = False

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        summary_size: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_experts=num_experts)
        self.dim = dim
        self.num_experts = num_experts
        self.listeners: tuple[Listener, ...] = ()
        self.counted = (
            torch.zeros(1 + summary_size, dtype=torch.int64, device=device)
            if summary_size
            else None
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class its own ``__call__``.

        ``torch.compile`` limits the number of graphs that begin at one code object, and gates of
        all classes would share those of ``Gate.__call__``.
        """
        super().__init_subclass__(**kwargs)
        if "__call__" not in vars(cls):
            shared = Gate.__call__
            traced = FunctionType(
                shared.__code__.replace(), shared.__globals__, closure=shared.__closure__
            )
            cls.__call__ = traced  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Route as ``forward`` does, count the routing and tell it to the listeners."""
        routing: RoutingOutput = super().__call__(*args, **kwargs)
        if self.training and self.learns_from_routings and not torch.compiler.is_exporting():
            self._count(routing)
        for listener in self.listeners:
            listener(routing, kwargs.get("padding_mask"))
        return routing

    def checked_k(self, k: int) -> int:
        """Return ``k``, the number of choices of a token.

        Raises:
            ValueError: It is below 1 or above the number of experts.
        """
        if not 1 <= k <= self.num_experts:
            raise ValueError(f"k must lie between 1 and num_experts={self.num_experts}, got {k}")
        return k

    @property
    def learns_from_routings(self) -> bool:
        """True if `update` needs the summaries of the routings of a step."""
        return self.counted is not None

    @abstractmethod
    def reset_parameters(self) -> None:
        """Set parameters and state to their initial values."""

    @abstractmethod
    def forward(
        self, x: Tensor, *, ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> RoutingOutput:
        """Route every token of ``x``.

        Args:
            x: Routing input (..., D), any floating dtype; the routing is computed in float32.
            ids: Token or user numbers (...), for gates that route by identity.
            padding_mask: True (...) at tokens to *ignore*. (Attention masks of Hugging Face
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
        arguments are those of `forward`.
        """
        routing: RoutingOutput = self(x, ids=ids, padding_mask=padding_mask)
        return routing.to_dense(self.num_experts).weights.unsqueeze(-2)

    def summary(self, routing: RoutingOutput) -> Tensor:
        """Return the load statistics of a routing that `update` needs.

        Sums over micro-batches and ranks must be what it needs to know of the joined batch.

        Args:
            routing: What the gate returned for one micro-batch.

        Returns:
            Numbers (S,), int64, on the device of the weights; not read on the host.

        Raises:
            NotImplementedError: The gate does not learn from its routings.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn from its routings")

    def update(self, summary: Tensor | None = None, step: int | None = None) -> None:
        """Advance the state by one optimizer step; a gate without state keeps this empty default.

        Args:
            summary: Sum (S,) of the summaries of all micro-batches and ranks; None unless
                ``learns_from_routings``.
            step: Number of optimizer steps done, this one included, for gates that count them;
                read from their buffer if None, which waits for the device.
        """

    def given(self, summary: Tensor | None) -> Tensor:
        """Return the summary that `update` of a learning gate needs.

        Raises:
            ValueError: There is none.
        """
        if summary is None:
            raise ValueError(
                f"{type(self).__name__}.update needs the sum of the summaries of its routings; call"
                " update_gates(model), which has it"
            )
        return summary

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(torch.bfloat16) must not round temperatures and biases.
        buffers = {id(buffer) for buffer in self._buffers.values()}

        def moved(tensor: Tensor) -> Tensor:
            return (unrounded(fn) if id(tensor) in buffers else fn)(tensor)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        if self.counted is not None:  # keeps its values, for to_empty would leave any
            device = fn(self.counted).device
            kept = torch.zeros_like(self.counted, device=device) if self.counted.is_meta else None
            self.counted = self.counted.to(device) if kept is None else kept
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "listeners": ()}  # a copy has none

    @torch.no_grad()
    def _count(self, routing: RoutingOutput) -> None:
        assert self.counted is not None
        summary = self.summary(routing)
        if self.counted.device != summary.device:  # FSDP moves parameters and buffers alone
            self.counted = self.counted.to(summary.device)
        accumulate(self.counted, torch.cat([torch.ones_like(summary[:1]), summary]))


class LinearRouter(Gate):
    """Base of gates with the logits x Wᵀ + b, in float32 or wider.

    A subclass calls `reset_parameters` once all that it resets exists.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        bias: Whether the logits have a bias.
        summary_size: Integers that `core_gates.routing.base.Gate.summary` returns, if any.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bias: bool = False,
        summary_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, summary_size=summary_size, device=device)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), so that scores start near uniform; zero the bias."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the logits (..., E) of tokens (..., D); ignored tokens count as finite."""
        return linear_fp32(x, self.weight, self.bias, padding_mask=padding_mask)
