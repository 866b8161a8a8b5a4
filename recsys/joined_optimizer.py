"""Several optimizers, each for some of the parameters, that step as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class JoinedOptimizer(Optimizer):
    """Optimizers of different parameters as one, such as Adam and row-wise Adagrad for tables.

    A trainer that knows a single optimizer can so use several: schedulers find the groups of all,
    and the state of all is saved and loaded.

    Args:
        optimizers: They have no parameter in common.

    Attributes:
        optimizers: As given.

    Raises:
        ValueError: There is none, or two have a parameter in common.
    """

    optimizers: tuple[Optimizer, ...] = ()

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("two optimizers have a parameter in common")
        super().__init__(parameters, {})  # refuses an empty list
        self.optimizers = tuple(optimizers)

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers; a change of an entry is theirs."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Ignore what the base class sets: the groups are those of the optimizers."""

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The state of all parameters."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        """Ignore what the base class sets: the state is that of the optimizers."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Let every optimizer step.

        Args:
            closure: Computes gradients and returns the loss; called once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every optimizer, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`.

        Raises:
            ValueError: It is that of another number of optimizers or parameters.
        """
        states = state_dict.get("optimizers", ())
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the state is that of {len(states)} joined optimizers, not {len(self.optimizers)}"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: ARG002
        """Refuse a group, unless the base class starts: one of the optimizers must take it.

        Raises:
            ValueError: There are optimizers already.
        """
        if self.optimizers:
            raise ValueError("add the group to one of the optimizers that are joined")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
