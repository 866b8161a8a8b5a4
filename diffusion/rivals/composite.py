"""The mean of the predictions with each adapter alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffusion.rivals.weighing import Weighing


class Composite(Weighing):
    """LoRA Composite (Zhong et al., 2024): average what the model predicts with one adapter each.

    The paper averages predictions with classifier-free guidance, ``u_k + g (c_k - u_k)`` for the
    predictions ``u_k`` without and ``c_k`` with the prompt. That is linear in both, so it is the
    same as guidance of the averages, and averaging the output of every forward pass is enough. A
    pass costs K passes. An adapter with strength 0 does not count.

    It is for inference: layers know one set of strengths, which is that of the last adapter when
    activations are recomputed in a backward pass.
    """

    def _attach(self) -> None:
        super()._attach()
        before = self.model.register_forward_pre_hook(self._begin)
        after = self.model.register_forward_hook(self._average, with_kwargs=True)
        self._handles += [before, after]

    def _begin(self, _model: nn.Module, _args: tuple[Any, ...]) -> None:
        self._alone(next(iter(self.on), None))

    def _average(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        outputs = [output]
        for name in self.on[1:]:
            self._alone(name)
            outputs.append(model.forward(*args, **kwargs))
        return _mean(outputs)

    def _alone(self, chosen: str | None) -> None:
        for layer in self.layers.values():
            layer.set_strengths(self._only(chosen))


def _mean(outputs: list[Any]) -> Any:
    """Return the means of the tensors in what a model returns."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return first if len(outputs) == 1 else sum(outputs) / len(outputs)
    if isinstance(first, Mapping):  # such as the outputs of diffusers, made from keywords
        return type(first)(**{key: _mean([one[key] for one in outputs]) for key in first})
    if isinstance(first, list | tuple):
        found: Iterator[Any] = (_mean(list(parts)) for parts in zip(*outputs, strict=True))
        return type(first)(found)
    return first
