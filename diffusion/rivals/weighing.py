"""Methods that add outputs of adapters, each with a number: fixed, tuned, searched, switched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core_gates.adapters import OpenGate
from core_gates.adapters.lora_gate import AdapterContext
from core_gates.errors import GatesError, check_option
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.protocol import Adapters, by_name, one_family, weighted_sum
from diffusion.lora_file import LoraBundle


class Weighing(GatedFusion):
    """Add the outputs of adapters, ``o + Σ a_k y_k``.

    Args:
        model: See `diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.

    Raises:
        GatesError: An adapter is of another family or does not fit the model.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle]) -> None:
        super().__init__(model, adapters, mode="sum")
        self._handles: list[RemovableHandle] = []

    @property
    def on(self) -> list[str]:
        """Names of the adapters whose strength is not 0."""
        return [name for name, strength in self.strengths.items() if strength != 0]

    def detach(self) -> None:
        """Leave the model with its own layers and without hooks."""
        super().detach()
        while self._handles:
            self._handles.pop().remove()

    def _only(self, chosen: str | None) -> list[float]:
        """Return weights with which one adapter alone is in force."""
        return [s if name == chosen else 0.0 for name, s in self.strengths.items()]


class Sum(Weighing):
    """Add what all adapters do, ``o + Σ s_k y_k``."""

    @property
    def bundle(self) -> LoraBundle:
        """One static adapter that does the same; ranks add up.

        Raises:
            GatesError: An adapter is a DoRA.
        """
        weights = dict(zip(self.adapters, self._weights(), strict=True))
        on = {name: bundle for name, bundle in self.adapters.items() if weights[name] != 0}
        return weighted_sum(on, weights) if on else LoraBundle(one_family(self.adapters), {})


class Mean(Sum):
    """Average what adapters do, ``o + Σ s_k y_k / K``; those with strength 0 do not count."""

    def _weights(self) -> list[float]:
        return [strength / max(len(self.on), 1) for strength in self.strengths.values()]


class AdapterStrengths(Weighing):
    """Add what all adapters do, ``o + Σ f_k y_k``, a trained strength of each known adapter.

    Each has one for up to two adapters and one for more, the same in all layers; all begin at 1.

    Args:
        model: See `diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        names: Of all adapters that have strengths; those given at first if empty.

    Raises:
        GatesError: An adapter does not fit the model, or has no strengths.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, LoraBundle], *, names: Sequence[str] = ()
    ) -> None:
        self.names = [*(names or adapters)]
        super().__init__(model, adapters)
        self.context = AdapterContext(len(self.names) + 1)
        self.shared = OpenGate(0, kinds=self.context.kinds)
        self._weigh()

    def gate(self, site: str) -> OpenGate:
        """Return a gate of a site, which has the factors of all."""
        gate = OpenGate(super().gate(site).dim)
        gate.factors = self.shared.factors
        return gate

    def _weigh(self) -> None:
        if isinstance(self.context, AdapterContext):
            self.context.describe([self.names.index(name) + 1 for name in self.adapters])
        for layer in self.layers.values():
            layer.set_strengths(self._weights())

    def _take(self, adapters: Adapters) -> None:
        for name in by_name(adapters):
            check_option("adapter", name, self.names, GatesError)
        super()._take(adapters)


class Switch(Weighing):
    """LoRA Switch (Zhong et al., 2024): at step i only adapter ⌊i/τ⌋ mod K is in force.

    Those with strength 0 have no steps.

    Args:
        model: See `diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        tau: Steps that an adapter stays in force.

    Raises:
        GatesError: An adapter does not fit the model, or ``tau`` is below 1.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, LoraBundle], *, tau: float = 5
    ) -> None:
        if tau < 1:
            raise GatesError(f"tau is {tau}, expected at least one step")
        super().__init__(model, adapters)
        self.tau, self._step = tau, 0

    def at(self, step: int, steps: int) -> None:
        """Put the adapter of a step in force."""
        del steps
        self._step = step
        self._weigh()

    def _weights(self) -> list[float]:
        on = self.on
        return self._only(on[int(self._step // self.tau) % len(on)] if on else None)


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
        self._handles += [before, self.model.register_forward_hook(self._average, with_kwargs=True)]

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
        return type(first)(**{key: _mean([output[key] for output in outputs]) for key in first})
    if isinstance(first, list | tuple):
        means: Iterator[Any] = (_mean(list(parts)) for parts in zip(*outputs, strict=True))
        return type(first)(means)
    return first


BOUND = 1.5  # largest absolute value of a learned factor, as in LoraHub


class _SpentError(Exception):
    """No evaluation is left."""


class LoraHub(Sum):
    """LoraHub (Huang et al., 2023): learn one factor per adapter from the losses of a few examples.

    The search starts from zeros, stays within ±1.5 and adds ``regularization`` times the mean
    absolute factor to the loss, as published. The paper adds factors A and B of the adapters
    separately; here their outputs are added, so that ranks may differ and nothing is added that no
    adapter has. The examples are those of one task, so it has to see the pair.

    Args:
        model: See `diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        regularization: Weight of the mean absolute factor.

    Attributes:
        learned: Name -> factor, 1 before a search; it multiplies the strength.

    Raises:
        GatesError: An adapter does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        regularization: float = 0.05,
    ) -> None:
        super().__init__(model, adapters)
        self.regularization = regularization
        self.learned = dict.fromkeys(adapters, 1.0)

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the adapters; what was learned is forgotten, strengths are 1 again."""
        super().set_adapters(adapters)
        self.learned = dict.fromkeys(self.adapters, 1.0)
        self._weigh()

    def search(self, loss: Callable[[], float], budget: int = 40) -> dict[str, float]:
        """Learn the factors by COBYLA (Powell, 1994); the best that were tried stay in force.

        Args:
            loss: Runs the model on the examples and returns their loss; it is called while this is
                attached, and should return the same for the same factors.
            budget: Number of calls.

        Returns:
            Name -> factor.

        Raises:
            GatesError: This is not attached, there is no budget, or a loss is not finite.
        """
        if not self.attached or budget < 1:
            what = f"the budget is {budget}" if self.attached else "adapters are not attached"
            raise GatesError(f"{what}: attach them, and allow at least one evaluation")
        from scipy.optimize import minimize  # slow to import, and needed here alone

        before, tried = self.learned, list[tuple[float, dict[str, float]]]()

        def value(factors: Any) -> float:
            if len(tried) >= budget:
                raise _SpentError
            inside = np.clip(factors, -BOUND, BOUND)
            self.learned = dict(zip(self.adapters, map(float, inside), strict=True))
            self._weigh()
            objective = float(loss()) + self.regularization * float(np.abs(inside).mean())
            if not np.isfinite(objective):
                raise GatesError(f"the loss is {objective} at {self.learned}: it must be finite")
            tried.append((objective, self.learned))
            return objective

        try:
            bounds = [(-BOUND, BOUND)] * len(self.adapters)
            start = np.zeros(len(self.adapters))
            least = len(self.adapters) + 2  # COBYLA warns of fewer; the budget ends it before
            options = {"maxiter": max(budget, least), "rhobeg": 0.5}
            minimize(value, start, method="COBYLA", bounds=bounds, options=options)
        except _SpentError:
            pass
        except BaseException:
            self.learned = before
            self._weigh()
            raise
        self.learned = min(tried, key=lambda pair: pair[0])[1]
        self._weigh()
        return self.learned

    def _weights(self) -> list[float]:
        return [self.learned.get(name, 1.0) * s for name, s in self.strengths.items()]
