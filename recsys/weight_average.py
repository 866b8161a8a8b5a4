"""A moving average of weights, with which a network is evaluated and served."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from core_gates.errors import check_fraction
from core_gates.numerics import unrounded


class WeightAverage(nn.Module):
    """``a ← d a + (1 - d) w`` after every step, with ``d = min(decay, (1 + n) / (10 + n))``.

    The averages are buffers, saved with the model; they start as the weights. n counts the steps,
    so that the first, worst weights are forgotten soon.

    Args:
        parameters: Weights by name; averages are kept in float32 at least.
        decay: Largest d, below 1.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    steps: Tensor

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        super().__init__()
        check_fraction(ema=decay)
        self.decay = decay
        self._names = {name: name.replace(".", "/") for name in parameters}  # no dots in buffers
        for name, parameter in parameters.items():
            exact = torch.promote_types(parameter.dtype, torch.float32)
            start = parameter.detach().to(exact, copy=True)
            self.register_buffer(self._names[name], start)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the averages after a step."""
        steps = int(self.steps.add_(1))
        d = min(self.decay, (1 + steps) / (10 + steps))
        for name, parameter in parameters.items():
            average = self.average(name)
            average.lerp_(parameter.detach().to(average.dtype), 1 - d)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move between devices; averages are not rounded to half precision with the weights."""
        return super()._apply(unrounded(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def average(self, name: str) -> Tensor:
        """Return the average of a weight."""
        return self.get_buffer(self._names[name])

    @contextmanager
    def swapped(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Put the averages in place of the weights inside the ``with`` block."""
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Overwrite weights by their averages."""
        for name, parameter in parameters.items():
            parameter.copy_(self.average(name))
