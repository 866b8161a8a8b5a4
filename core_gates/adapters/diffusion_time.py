"""The diffusion time for gates deep in a model whose layers are not told it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class DiffusionTime:
    """What a model was last told as its time, for all gates in it.

    Gates read it in the forward pass, and again where activations are recomputed in the backward
    pass: there it is that of the forward pass whose output is differentiated.

    Args:
        model: The model.
        argument: Name of the argument of its forward pass that holds the time.
        scale: Times of the gates, which count from 0 to 1000, by those of the model.

    Attributes:
        time: (B,) or one number; None before the first forward pass.

    Raises:
        ValueError: The model has no such argument.
    """

    def __init__(self, model: nn.Module, argument: str = "timestep", scale: float = 1.0) -> None:
        self.time: Tensor | None = None
        self.argument, self.scale = argument, scale
        self._signature = inspect.signature(model.forward)
        if argument not in self._signature.parameters:
            raise ValueError(
                f"{type(model).__name__}.forward has no argument {argument!r}: it takes "
                f"{', '.join(self._signature.parameters)}"
            )
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._read, with_kwargs=True),
            model.register_forward_hook(self._return_to, with_kwargs=True),
        ]

    def stop(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    def _told(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        given = self._signature.bind_partial(*args, **kwargs).arguments.get(self.argument)
        return None if given is None else torch.as_tensor(given) * self.scale

    def _read(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.time = self._told(args, kwargs)

    def _return_to(
        self, _model: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
    ) -> None:
        time = self.time

        def set_back(_grad: Tensor) -> None:
            self.time = time

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(set_back)  # type: ignore[no-untyped-call]


def _tensors(output: Any) -> Iterable[Tensor]:
    """Return the tensors in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
