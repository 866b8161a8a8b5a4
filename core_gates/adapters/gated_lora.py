"""A linear layer with gated low-rank adapters next to it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.adapters.lora_gate import AdapterContext, DiffusionTime, LoraGate, OpenGate
from core_gates.adapters.low_rank import (
    AdapterCapacity,
    AdapterFactors,
    LowRank,
    bias_of,
    by_sample,
    is_unwatched,
    weight_of,
)
from core_gates.adapters.relevance import RelevanceGate
from core_gates.numerics import accumulation_dtype
from core_gates.ops.gated_lora.op import gated_lora


class GatedLoraLinear(AdapterFactors):
    """Add the outputs of K adapters to those of a frozen layer, gated by token and channel.

    The weights of the gate do not depend on the adapters (AutoLoRA, 2025), so
    `set_adapters` may exchange them for any others and `set_strengths` weigh them. They
    are buffers, and loading a state dict brings those that were saved; to move a trained gate
    alone, save and load ``layer.gate``. The side path adds to the output, so the layer may be of
    any kind, quantized too, and it is left as it is; without adapters its output is returned
    unchanged.

    Args:
        base: The layer, a module from (..., D) to (..., D') with ``in_features`` and
            ``out_features``.
        adapters: Adapters of this layer; those without factors for it are simply left out, as are
            those of rank 0. One with a magnitude (DoRA) is computed in full, not in blocks; the
            layer must be linear but for a bias, which is read from it at each call.
        gate: Their gate; a `LoraGate` with default options if None, an `OpenGate`
            for the plain sum.
        capacity: Memory for other adapters, which then change neither shapes nor a compiled graph.
        device: Device of a gate made here, by default that of the layer.
        dtype: Floating dtype of a gate made here.

    Attributes:
        clock: Where a gate with ``time="film"`` reads the diffusion time that it is not given.
        context: What is known of the adapters, which factors of the gate and a switch weigh them
            by, or how far a relevance gate opens each; None where they have none.
        transparent: Whether the layer is saved and loaded as its base alone, see
            `core_gates.adapters.attach_adapters`.

    Shape:
        ``x`` (..., D) to (..., D').

    Raises:
        ValueError: The factors of an adapter or the gate do not fit the layer, it has adapters
            already, or a magnitude needs its weight and it has none.
    """

    def __init__(
        self,
        base: nn.Module,
        adapters: Sequence[LowRank] = (),
        *,
        gate: LoraGate | OpenGate | None = None,
        capacity: AdapterCapacity | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(base, AdapterFactors):
            raise ValueError(
                "the layer has adapters already: exchange them by set_adapters, or detach them"
            )
        super().__init__(cast(int, base.in_features), cast(int, base.out_features), capacity)
        self.base = base
        if gate is None:
            gate = LoraGate(self.out_features, device=device or self._device, dtype=dtype)
        self.gate = gate
        self.clock: DiffusionTime | None = None
        self.context: AdapterContext | RelevanceGate | None = None
        self.transparent = False
        if self.gate.dim != self.out_features:
            raise ValueError(
                f"the gate has {self.gate.dim} features, but the layer has"
                f" {self.out_features} outputs"
            )
        self.set_adapters(adapters)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state with adapters and gate, that of the base alone if transparent."""
        if not self.transparent:
            return super().state_dict(*args, **kwargs)
        state: dict[str, Any] = self.base.state_dict(*args, **kwargs)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        if not self.transparent:
            super()._load_from_state_dict(state_dict, prefix, *rest, **options)
            return
        # What follows loads the base from its own names, and the gate from what it holds.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}base.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        for child in ("gate", "context"):
            module = getattr(self, child)
            for name, tensor in ({} if module is None else module.state_dict()).items():
                state_dict[f"{prefix}{child}.{name}"] = tensor

    def set_adapters(self, adapters: Sequence[LowRank]) -> None:
        """Exchange the adapters; the gate stays, and strengths are 1 again.

        Args:
            adapters: The new ones, in any number; they are copied.

        Raises:
            ValueError: The factors of one do not fit the layer, there is no room for them, or a
                magnitude needs the weight of the layer and it has none.
        """
        device = self._device
        lost = device is not None and device.type == "meta"
        self._set(adapters, None if lost else device, self._dense_weight)

    def forward(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the layer's output with the gated adapters.

        Args:
            x: Inputs (..., D).
            time: Diffusion time for a gate with ``time="film"``; one number, or one a sample (B,)
                of ``x`` (B, ..., D). If None, it is that of ``clock``.

        Raises:
            ValueError: The gate needs the time and gets none, or gets times that fit no batch.
        """
        base: Tensor = self.base(x)
        ranks = self.ranks
        return self._mixed(x, base, time, ranks) if ranks else base

    def _mixed(self, x: Tensor, base: Tensor, time: Tensor | None, ranks: Sequence[int]) -> Tensor:
        if self.base_gains is not None:
            return self._mixed_in_full(x, base, time)
        hidden, up = self._hidden(x, ranks), self.up.to(x.device)
        if isinstance(self.gate, OpenGate):
            return base + (hidden @ up.to(hidden.dtype)).to(base.dtype)
        mix = partial(gated_lora, eps=self.gate.eps, overwrite_base=self._may_overwrite())
        time = self.gate.checked_time(self._time(time), x)
        return mix(base, hidden, up, self.gate.coefficients(time), ranks)

    def _mixed_in_full(self, x: Tensor, base: Tensor, time: Tensor | None) -> Tensor:
        """Return the mix with the full output of one adapter at a time."""
        total = torch.zeros_like(base, dtype=accumulation_dtype(base))
        for y in self._outputs(x, base):
            gate = self._gates(base, y.unsqueeze(-2), time).squeeze(-2)
            total = total.addcmul(gate.to(total.dtype), y.to(total.dtype))
        if isinstance(self.gate, LoraGate):
            total = total * self.gate.weight_out.to(total.dtype)
        return (base.to(total.dtype) + total).to(base.dtype)

    def _gates(self, base: Tensor, loras: Tensor, time: Tensor | None) -> Tensor:
        if isinstance(self.gate, OpenGate):
            return self.gate.gate_values(base, loras)
        return self.gate.gate_values(base, loras, time=self._time(time))

    def gate_values(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the gates (..., K, D'), which `forward` never holds at once.

        A switch or a relevance gate that the adapters have is a part of them.
        """
        base = self.base(x)
        gates = self._gates(base, self._stacked(x, base), time)
        opening = 1.0 if self.context is None else self.context.opening()
        if not isinstance(opening, Tensor):
            return gates
        opening = opening[..., self.places.to(opening.device)].to(gates)
        return gates * by_sample(opening, x).unsqueeze(-1)

    def adapter_outputs(self, x: Tensor) -> Tensor:
        """Return the weighted outputs of the adapters (..., K, D') in full, in order."""
        return self._stacked(x, None)

    def _stacked(self, x: Tensor, base: Tensor | None) -> Tensor:
        if not self.ranks:
            return x.new_zeros(*x.shape[:-1], 0, self.out_features)
        return torch.stack(list(self._outputs(x, base)), -2)

    def _outputs(self, x: Tensor, base: Tensor | None) -> Iterator[Tensor]:
        hidden = torch.split(self.hidden(x), self.ranks, -1)
        ups = torch.split(self.up.to(x.device, x.dtype), self.ranks)
        if self.base_gains is None:
            yield from (h @ up for h, up in zip(hidden, ups, strict=True))
            return
        base = self.base(x) if base is None else base
        bias = bias_of(self.base, x)
        plain = base if bias is None else base - bias
        strengths = by_sample(self._weights(), x).to(x.device, x.dtype)
        gains = (strengths.unsqueeze(-1) * self.base_gains.to(x.device, x.dtype)).unbind(-2)
        for h, up, gain in zip(hidden, ups, gains, strict=True):
            yield h @ up + plain * gain

    def _weights(self) -> Tensor:
        if self.context is None:
            return self.strengths
        factor: Tensor | float = self.context(self.gate.factors)
        if isinstance(factor, Tensor):
            factor = factor[..., self.places.to(factor.device)].to(self.strengths.device)
        return self.strengths * factor

    def _time(self, time: Tensor | None) -> Tensor | None:
        return self.clock.time if time is None and self.clock is not None else time

    def _dense_weight(self) -> Tensor:
        return weight_of(self.base)

    def _may_overwrite(self) -> bool:
        """Return whether nothing else can see the output of the layer."""
        return is_unwatched(self.base) and not torch.is_grad_enabled()

    @property
    def _device(self) -> torch.device | None:
        some = next(self.base.parameters(), None)
        return None if some is None else some.device

    def extra_repr(self) -> str:
        """Show the ranks in ``print(module)``."""
        return f"ranks={self.ranks}"
