"""A linear layer with gated low-rank adapters next to it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters.lora_gate import LoraGate
from core_gates.adapters.low_rank import LowRank
from core_gates.numerics import content_version
from core_gates.ops.gated_lora.op import gated_lora


class GatedLoraLinear(nn.Module):
    """Add the outputs of K adapters to those of a frozen layer, gated by token and channel.

    The weights of the gate do not depend on the adapters (AutoLoRA, 2025), so
    :meth:`set_adapters` may exchange them for any others. They are buffers, and loading a state
    dict brings those that were saved; to move a trained gate alone, save and load ``layer.gate``.
    The side path adds to the output, so the layer may be of any kind,
    quantized too, and it is left as it is; without adapters its output is returned unchanged.

    Args:
        base: The layer, a module from (..., D) to (..., D') with ``in_features`` and
            ``out_features``.
        adapters: Adapters of this layer; those without factors for it are simply left out, as are
            those of rank 0.
        gate: Their gate; a :class:`LoraGate` with default options if None.
        device: Device of a gate made here, by default that of the layer.
        dtype: Floating dtype of a gate made here.

    Shape:
        ``x`` (..., D) to (..., D').

    Raises:
        ValueError: The factors of an adapter or the gate do not fit the layer.
    """

    down: Tensor
    up: Tensor
    adapter_ranks: Tensor

    def __init__(
        self,
        base: nn.Module,
        adapters: Sequence[LowRank] = (),
        *,
        gate: LoraGate | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features = cast(int, base.in_features)
        self.out_features = cast(int, base.out_features)
        if gate is None:
            gate = LoraGate(self.out_features, device=device or self._device, dtype=dtype)
        self.gate = gate
        if self.gate.dim != self.out_features:
            raise ValueError(
                f"the gate has {self.gate.dim} features, but the layer has"
                f" {self.out_features} outputs"
            )
        self.set_adapters(adapters)

    def set_adapters(self, adapters: Sequence[LowRank]) -> None:
        """Exchange the adapters; the gate stays.

        Args:
            adapters: The new ones, in any number; they are copied.

        Raises:
            ValueError: The factors of one do not fit the layer.
        """
        for adapter in adapters:
            adapter.check(self.in_features, self.out_features)
        given = [adapter for adapter in adapters if adapter.rank > 0]
        empty = torch.empty(0, self.in_features), torch.empty(0, self.out_features)
        down = torch.cat([a.down.detach() for a in given]) if given else empty[0]
        up = torch.cat([a.scale * a.up.detach().mT for a in given]) if given else empty[1]
        self._set_factors([adapter.rank for adapter in given], down, up)

    def _set_factors(self, ranks: list[int], down: Tensor, up: Tensor) -> None:
        self.register_buffer("adapter_ranks", torch.tensor(ranks, dtype=torch.int64))  # (K,)
        self._ranks, self._known_version = ranks, content_version(self.adapter_ranks)
        self.register_buffer("down", down.to(self._device))  # (R, D)
        self.register_buffer("up", up.to(self._device))  # (R, D')

    @property
    def ranks(self) -> list[int]:
        """Ranks of the adapters: those of the buffer, which may be loaded in place."""
        if self.adapter_ranks.is_meta or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return self._ranks
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                compiled = torch.tensor(self._ranks, device=self.adapter_ranks.device)
                torch._assert_async(
                    (self.adapter_ranks == compiled).all(),
                    "the ranks of the adapters have changed since this graph was compiled; read"
                    " layer.ranks once, outside of torch.compile, and call again",
                )
            return self._ranks
        version = content_version(self.adapter_ranks)
        if version is None or version != self._known_version:
            self._ranks, self._known_version = self.adapter_ranks.tolist(), version
        return self._ranks

    def forward(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the layer's output with the gated adapters.

        Args:
            x: Inputs (..., D).
            time: Diffusion time for a gate with ``time="film"``; one number, or one a sample (B,)
                of ``x`` (B, ..., D).

        Raises:
            ValueError: The gate needs the time and gets none, or gets times that fit no batch.
        """
        base: Tensor = self.base(x)
        if not self.ranks:
            return base
        hidden, up = F.linear(x, self.down.to(x.dtype)), self.up
        mix = partial(gated_lora, eps=self.gate.eps, overwrite_base=self._may_overwrite())
        time = self.gate.checked_time(time, x)
        if time is None or time.ndim == 0:
            return mix(base, hidden, up, self.gate.coefficients(time), self.ranks)
        samples = zip(base, hidden, map(self.gate.coefficients, time), strict=True)
        return torch.stack([mix(o, h, up, c, self.ranks) for o, h, c in samples])

    def gate_values(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the gates (..., K, D'), which :meth:`forward` never holds at once."""
        base, loras = self.base(x), self.adapter_outputs(x)
        return self.gate.gate_values(base, loras, time=time)

    def adapter_outputs(self, x: Tensor) -> Tensor:
        """Return the scaled outputs of the adapters (..., K, D') in full, in order."""
        if not self.ranks:
            return x.new_zeros(*x.shape[:-1], 0, self.out_features)
        hidden = torch.split(F.linear(x, self.down.to(x.dtype)), self.ranks, -1)
        ups = torch.split(self.up.to(x.dtype), self.ranks)
        return torch.stack([h @ up for h, up in zip(hidden, ups, strict=True)], -2)

    def _may_overwrite(self) -> bool:
        """Return whether nothing else can see the output of the layer."""
        hooks = self.base._forward_hooks or nn.modules.module._global_forward_hooks
        plain = type(self.base) is nn.Linear and "forward" not in vars(self.base)
        return plain and not hooks and not torch.is_grad_enabled()

    @property
    def _device(self) -> torch.device | None:
        some = next(self.base.parameters(), None)
        return None if some is None else some.device

    def extra_repr(self) -> str:
        """Show the ranks in ``print(module)``."""
        return f"ranks={self.ranks}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Replace the attached adapters by those of the state dict."""
        names = "adapter_ranks", "down", "up"
        saved = [state_dict.get(prefix + name) for name in names]
        if all(isinstance(tensor, Tensor) for tensor in saved):
            ranks, down, up = cast(list[Tensor], saved)
            if int(ranks.sum()) == len(down) == len(up):
                self._set_factors(ranks.tolist(), torch.empty_like(down), torch.empty_like(up))
            else:
                error_msgs.append(
                    f"{prefix or 'layer'}: the ranks of its adapters sum to {int(ranks.sum())}, its"
                    f" factors to {len(down)}: the checkpoint is damaged, save it again"
                )
                return
        elif strict:
            error_msgs.append(
                f"{prefix or 'layer'}: the state dict holds no adapters: load the plain layer into"
                " .base or a gate into .gate, or attach adapters after loading"
            )
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
