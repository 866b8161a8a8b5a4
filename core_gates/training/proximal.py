"""AdamW whose groups of gates take a proximal step, so that gates become exactly zero."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from core_gates.ops.soft_threshold.op import soft_threshold

Threshold = Literal["constant", "lr_scaled"]
Prox = Literal["soft", "reference"]


class ProximalAdamW(Optimizer):
    """AdamW followed, in the groups that set ``xi``, by a soft threshold (arXiv 2311.11696).

    One optimizer for both kinds of parameters: a group with ``xi=None`` is an ordinary group; in a
    group with a number every step ends in ``g ← sign(g) max(|g| - ξ, 0)``, the proximal map of the
    L1 norm. N steps without gradient take N ξ off a gate, and as a step of Adam is at most about
    the learning rate, a useful gate survives only while ``lr > ξ``.

    The step of Adam is that of the published experiments: ``lr √(1 - β2^t) / (1 - β1^t)`` times
    ``m / (√v + ε)``, where ε is not divided by the bias correction as in ``torch.optim.AdamW``;
    decoupled weight decay uses the value before the step. ``xi`` is read from the groups at every
    step, like the learning rate, and is part of the state: schedules may change it.

    Args:
        params: Parameters or groups; a group may set each of the following for itself.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: ε.
        weight_decay: Decoupled decay rate.
        xi: Threshold ξ, or None for no proximal step.
        threshold: ``constant`` subtracts ξ a step; ``lr_scaled`` ξ · lr, the proximal gradient step
            of ``loss + ξ |g|_1`` but for Adam's scaling of the gradient.
        prox: ``soft``, or ``reference`` for the map of the published code, which after shrinking
            by ξ also zeroes what is then below ξ, and leaves ``|g| = ξ`` as it is.

    Raises:
        ValueError: A setting is out of range or unknown.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        xi: float | None = None,
        threshold: Threshold = "constant",
        prox: Prox = "soft",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "xi": xi,
            "threshold": threshold,
            "prox": prox,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its settings.

        Raises:
            ValueError: A setting is out of range or unknown.
        """
        _check_settings(self.defaults | param_group)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step in every group; return the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._adam(parameters, group)
                if group["xi"] is not None:
                    scale = group["lr"] if group["threshold"] == "lr_scaled" else 1.0
                    _shrink(parameters, float(group["xi"] * scale), group["prox"])
        return loss

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._initialized(p) for p in parameters]
        grads = [p.grad for p in parameters if p.grad is not None]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        first, second = group["betas"]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(means, grads, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, grads, grads, 1 - second)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        steps = [float(state["step"]) for state in states]
        sizes = [-group["lr"] * (1 - second**t) ** 0.5 / (1 - first**t) for t in steps]
        torch._foreach_addcdiv_(parameters, means, denominators, sizes)

    def _initialized(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _shrink(parameters: list[Tensor], xi: float, prox: Prox) -> None:
    """Apply the threshold to all gates at once: they are many and small."""
    flat = torch.cat([p.flatten() for p in parameters])
    shrunk = soft_threshold(flat, xi) if prox == "soft" else _reference_threshold(flat, xi)
    parts = shrunk.split_with_sizes([p.numel() for p in parameters])
    torch._foreach_copy_(
        parameters, [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
    )


def _reference_threshold(g: Tensor, xi: float) -> Tensor:
    shrunk = torch.where(g > xi, g - xi, torch.where(g < -xi, g + xi, g))
    return torch.where((shrunk.abs() < xi) & (g.abs() != xi), 0, shrunk)


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {group[name]}")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")
    if group["xi"] is not None and not group["xi"] >= 0:
        raise ValueError(f"xi must not be negative, got {group['xi']}; None means no threshold")
    for name, kind in (("threshold", Threshold), ("prox", Prox)):
        if group[name] not in get_args(kind):
            known = ", ".join(get_args(kind))
            raise ValueError(f"{name} is {group[name]!r}; choose one of {known}")
