"""SoRA: a low-rank adapter whose gate is thresholded (Ding et al., 2023), on linear layers too."""

import math
from collections.abc import Callable
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters.low_rank import LowRank, place_of
from core_gates.errors import (
    check_at_least,
    check_finite,
    check_fraction,
    check_option,
    check_positive,
    check_whole,
)
from core_gates.numerics import accumulation_dtype, unrounded

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
        model: Module that holds gates; any `SoftThreshold` in it counts.
    """
    return [module.weight for module in model.modules() if isinstance(module, SoftThreshold)]


def gate_l1_loss(model: nn.Module) -> Tensor:
    """Return the mean of ``|g|`` over all entries of all soft-thresholded gates of a model.

    The published code adds it to the loss, times a factor, next to the proximal step.

    Args:
        model: Module that holds gates; any `SoftThreshold` in it counts.

    Raises:
        ValueError: The model holds no such gate.
    """
    gates = rank_gates(model)
    if not gates:
        raise ValueError(f"{type(model).__name__} holds no SoftThreshold gate to take the norm of")
    absolute = torch.stack([gate.abs().sum().to(gates[0].device) for gate in gates])
    return absolute.sum() / max(1, sum(gate.numel() for gate in gates))


class SparseLowRank(nn.Module):
    """Return ``α/R B (g ∘ A x)``, to be added to a layer's output (Ding et al., 2023, SoRA).

    Components whose gate is zero contribute nothing: `prune_` cuts them,
    `export` gives the rest as a plain LoRA, `merge_into` adds it to a weight. All three
    are exact. The scale stays that of the first rank and is part of the state, so that a pruned
    adapter can be loaded: into one of any rank, which then takes that of the checkpoint. Load
    before making an optimizer, whose parameters are those of the former rank.

    Args:
        in_features: Inputs of the layer.
        out_features: Outputs of the layer.
        rank: Largest rank R; 0 for an adapter that is loaded or was pruned away.
        alpha: Numerator α of the scale.
        dropout: Probability of dropping an input feature, of the adapter only.
        initialization: That of the gate; see `SoftThreshold`.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the gate is float32 at least.

    Shape:
        ``x`` (..., D) to (..., D'); ``lora_A`` (R, D), ``lora_B`` (D', R), gate (R,).

    Raises:
        ValueError: A size is below 1, ``rank`` is negative or not whole, ``alpha`` is not a
            positive number, or ``dropout`` is not a probability.
    """

    scaling: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, out_features=out_features)
        check_whole(0, rank=rank)
        check_finite(alpha=alpha)
        check_positive(alpha=alpha)
        check_fraction(dropout=dropout)
        self.in_features = in_features
        self.out_features = out_features
        self.dropout = dropout
        self._start = alpha, max(rank, 1)
        self.lora_gate = SoftThreshold(
            rank, initialization=initialization, device=device, dtype=dtype
        )
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        # α and R: both are exact in float32, their ratio is not.
        self.register_buffer("scaling", torch.empty(2, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from Kaiming's uniform distribution (a = √5), zero B, draw the gate."""
        self.scaling.copy_(torch.tensor(self._start))
        if len(self.lora_A):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.lora_gate.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapter's output, which is added to the layer's."""
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        return F.linear(self.scale.to(hidden.dtype) * self.lora_gate(hidden), self.lora_B)

    def gate_values(self, x: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the gate (R,), which no input changes."""
        return self.lora_gate.gate_values()

    @property
    def scale(self) -> Tensor:
        """Scale α/R with the rank R of the start, in float32 at least."""
        exact = accumulation_dtype(self.lora_B)
        alpha, rank = self.scaling.to(exact).unbind()
        return alpha / rank

    @property
    def rank(self) -> int:
        """Number of components whose gate is not zero; reading it waits for the device."""
        return int(self.lora_gate.kept.sum())

    @torch.no_grad()
    def export(self) -> LowRank:
        """Return the remaining components as a plain LoRA of scale 1, the gate folded into B.

        Its rank is 0 if nothing remains. Files of LoRAs know no rank 0: leave such a layer out.
        """
        kept = self.lora_gate.kept
        factors = self.scale * self.lora_gate.weight[kept]
        up = (factors * self.lora_B[:, kept]).to(self.lora_B.dtype)
        return LowRank(self.lora_A[kept].clone(), up)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the change (D', D) that the adapter adds to the layer's weight."""
        return self.export().delta_weight()

    @torch.no_grad()
    def merge_into(self, linear: nn.Module) -> None:
        """Add the adapter to the weight of a layer in place; dead components change no bit of it.

        Args:
            linear: See `sizes_of`.

        Raises:
            ValueError: The layer has other sizes, or its weight is quantized.
        """
        exported, weight = self.export(), cast(Tensor, linear.weight)
        stored = weight.dtype if isinstance(weight, Tensor) else torch.qint8
        if not stored.is_floating_point or stored.itemsize == 1:
            raise ValueError(
                f"{type(linear).__name__} stores its weight in {stored}, to which an adapter cannot"
                " be added exactly: keep the adapter, or merge before the layer is quantized"
            )
        exported.check(*sizes_of(linear))
        if exported.rank:
            delta = exported.delta_weight().to(weight.dtype)
            weight += delta.mT if _is_transposed(linear) else delta

    @torch.no_grad()
    def prune_(self, threshold: float = 0.0) -> int:
        """Cut the components whose gate is at most ``threshold`` in magnitude, down to rank 0.

        With the threshold 0 the output stays the same. The parameters become new ones without
        gradient history: make a new optimizer if training continues.

        Args:
            threshold: Largest magnitude of a gate that is cut.

        Returns:
            Number of components that remain.
        """
        gate = self.lora_gate.weight
        kept = ~(gate.abs() <= threshold)  # a NaN stays, to be seen
        self._replace(self.lora_A[kept], self.lora_B[:, kept], gate[kept])
        return len(self.lora_gate.weight)

    def _replace(self, down: Tensor, up: Tensor, gate: Tensor) -> None:
        self.lora_A = nn.Parameter(down, self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(up, self.lora_B.requires_grad)
        self.lora_gate.weight = nn.Parameter(gate, self.lora_gate.weight.requires_grad)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(adapter)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}lora_A")
        if isinstance(saved, Tensor) and saved.ndim == 2 and len(saved) != len(self.lora_A):
            rank = len(saved)
            up = self.lora_B.new_empty(self.out_features, rank)
            gate = self.lora_gate.weight.new_empty(rank)
            self._replace(self.lora_A.new_empty(rank, self.in_features), up, gate)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(tensor: Tensor) -> Tensor:
            return (unrounded(fn) if tensor is self.scaling else fn)(tensor)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return,no-untyped-call]


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer.

    Args:
        linear: ``nn.Linear``, or ``Conv1D`` of transformers, whose weight is (inputs, outputs).
    """
    if _is_transposed(linear):
        inputs, outputs = cast(Tensor, linear.weight).shape
        return inputs, outputs
    return cast(int, linear.in_features), cast(int, linear.out_features)


def _is_transposed(linear: nn.Module) -> bool:
    return hasattr(linear, "nf") and not hasattr(linear, "out_features")


class SparseLoraLinear(nn.Module):
    """Add a `SparseLowRank` adapter to the output of a linear layer (Ding et al., 2023).

    The layer is neither changed nor frozen: ``layer.base`` gives it back with the same bits, and
    `merge` with the adapter added to its weight. At the start the output is that of the
    layer.

    Args:
        base: The layer, quantized or not; one of another class needs what `sizes_of` reads.
        rank: Largest rank R.
        alpha: Numerator α of the scale α/R.
        dropout: Probability of dropping an input feature, of the adapter only.
        initialization: That of the gate; see `SoftThreshold`.
        device: Device of the adapter, by default that of the layer.
        dtype: Floating dtype of the adapter, by default that in which the layer computes.

    Shape:
        ``x`` (..., D) to (..., D').
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: GateInitialization = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base_device, computed = place_of(base)
        self.base = base
        self.in_features, self.out_features = sizes_of(base)
        self.adapter = SparseLowRank(
            *sizes_of(base),
            rank,
            alpha=alpha,
            dropout=dropout,
            initialization=initialization,
            device=device or base_device,
            dtype=dtype or computed,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer plus that of the adapter."""
        base: Tensor = self.base(x)
        added: Tensor = self.adapter(x.to(self.adapter.lora_A.dtype))
        return base + added.to(base.dtype)

    @property
    def weight(self) -> Tensor:
        """That of the base, which models ask for its type."""
        return cast(Tensor, self.base.weight)

    def merge(self) -> nn.Module:
        """Add the adapter to the weight of the layer in place, close it, and return the layer."""
        self.adapter.merge_into(self.base)
        nn.init.zeros_(self.adapter.lora_gate.weight)
        return self.base
