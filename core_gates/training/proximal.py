"""A proximal step after each step of any optimizer, so that gates become exactly zero."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from core_gates.errors import check_at_least, check_option
from core_gates.ops.elementwise import soft_threshold

Rule = Literal["soft", "reference"]


class ProximalStep:
    """End every step of an optimizer with a soft threshold of its gates (arXiv 2311.11696).

    ``g ← sign(g) max(|g| - ξ, 0)``, the proximal map of the L1 norm, after any optimizer: fused,
    8-bit, Muon, sharded by FSDP2 or not. N steps without gradient take N ξ off a gate. A step of
    Adam is at most about the learning rate, so under Adam a useful gate survives only while
    ``lr > ξ``. A gate that the optimizer leaves alone, because it has no gradient or a gradient
    scaler met an overflow, is left alone here, too.

    Nothing needs to hold this object: the optimizer does. A copied or unpickled optimizer takes no
    proximal steps until it gets a new one.

    Examples:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, fused=True)
        >>> ProximalStep(optimizer, rank_gates(model), 3e-4)

    Args:
        optimizer: Any optimizer.
        gates: Parameters of it that become sparse, float32 or float64.
        threshold: ξ. It is read at every step: schedules may set this attribute.
        scaled_by_lr: Subtract ξ times the learning rate of the group instead, the proximal gradient
            step of ``loss + ξ |g|_1`` but for the optimizer's scaling of the gradient.
        rule: ``soft``, or ``reference`` for the map of the published code, which after shrinking
            by ξ also zeroes what is then below ξ, and leaves ``|g| = ξ`` as it is.

    Raises:
        ValueError: The threshold is negative, the rule unknown, or a gate is of half precision,
            which is too coarse for small thresholds, or no parameter of the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gates: Iterable[Tensor],
        threshold: float,
        *,
        scaled_by_lr: bool = False,
        rule: Rule = "soft",
    ) -> None:
        check_at_least(0, threshold=threshold)
        check_option("rule", rule, get_args(Rule))
        gates = list(gates)
        _check_gates(optimizer, gates)
        self.threshold = threshold
        self.scaled_by_lr = scaled_by_lr
        self.rule: Rule = rule
        self._gates = {id(gate): gate for gate in gates}  # held, so that no id is used again
        self._handle = optimizer.register_step_post_hook(self._shrink)

    def remove(self) -> None:
        """Take no more proximal steps."""
        self._handle.remove()

    def state_dict(self) -> dict[str, float]:
        """Return the present threshold."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with a saved threshold."""
        self.threshold = state["threshold"]

    @torch.no_grad()
    def _shrink(self, optimizer: Optimizer, _args: Any, _options: Any) -> None:
        """Shrink all gates alike at once: they are many and small."""
        alike: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            threshold = self.threshold * (float(group["lr"]) if self.scaled_by_lr else 1.0)
            for p in group["params"]:
                if id(p) in self._gates and p.grad is not None:
                    alike[p.device, p.dtype, threshold].append(_local(p))
        found_inf = getattr(optimizer, "found_inf", None)  # a fused step that may have been skipped
        for (device, _, threshold), gates in alike.items():
            flat = torch.cat([gate.flatten() for gate in gates])
            shrunk = _RULES[self.rule](flat, threshold)
            if found_inf is not None:
                shrunk = torch.where(found_inf.to(device) > 0, flat, shrunk)
            parts = shrunk.split_with_sizes([gate.numel() for gate in gates])
            for gate, part in zip(gates, parts, strict=True):
                gate.copy_(part.view_as(gate))


def _reference_threshold(g: Tensor, threshold: float) -> Tensor:
    shrunk = torch.where(
        g > threshold, g - threshold, torch.where(g < -threshold, g + threshold, g)
    )
    return torch.where((shrunk.abs() < threshold) & (g.abs() != threshold), 0, shrunk)


_RULES = {"soft": soft_threshold, "reference": _reference_threshold}


def _local(p: Tensor) -> Tensor:
    """Return this rank's part of a sharded parameter: the threshold acts on each value alone."""
    to_local = getattr(p, "to_local", None)
    return p if to_local is None else to_local()  # type: ignore[no-any-return]


def _check_gates(optimizer: Optimizer, gates: list[Tensor]) -> None:
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = sum(id(gate) not in optimized for gate in gates)
    if foreign:
        raise ValueError(
            f"{foreign} of {len(gates)} gates are not parameters of the optimizer; make it of the"
            " parameters that the model has after sharding and pruning"
        )
    coarse = {gate.dtype for gate in gates} & {torch.float16, torch.bfloat16}
    if coarse:
        raise ValueError(
            f"gates of {', '.join(map(str, coarse))} are too coarse to shrink; keep them in"
            " torch.float32"
        )
