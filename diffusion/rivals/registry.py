"""All rivals by name, with what they need."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from core_gates.errors import GatesError, check_option
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.protocol import Fusion
from diffusion.lora_file import LoraBundle
from diffusion.rivals.k_lora import KLora
from diffusion.rivals.merged import METHODS, Merged, merge
from diffusion.rivals.weighing import AdapterStrengths, Composite, LoraHub, Mean, Sum, Switch
from diffusion.rivals.x_lora import XLora


class Rival(NamedTuple):
    """A way to use several adapters at once.

    Attributes:
        factory: Called with a model, adapters by name, and settings.
        summary: One line.
        trainable: Whether it has parameters, which have to be trained.
        sees_pair: Whether it learns from examples of the very adapters that it combines.
        static: Whether it adds the same to the weights in every call; its ``bundle`` is that one
            adapter, which can be written to a file.
    """

    factory: Callable[..., Fusion]
    summary: str
    trainable: bool = False
    sees_pair: bool = False
    static: bool = False


def make_rival(
    name: str, model: nn.Module, adapters: Mapping[str, LoraBundle], **settings: Any
) -> Fusion:
    """Return a rival for adapters of a model, not attached.

    Args:
        name: One of `RIVALS`.
        model: The model.
        adapters: Name -> adapter; by convention the subject is first.
        settings: Of the rival.

    Raises:
        GatesError: There is no such rival, or the adapters do not suit it.
    """
    check_option("rival", name, RIVALS, GatesError)
    return RIVALS[name].factory(model, adapters, **settings)


def _merge(
    method: str,
    model: nn.Module,
    adapters: Mapping[str, LoraBundle],
    *,
    weight: float = 1.0,
    **options: Any,
) -> Merged:
    """Return adapters merged by a method of PEFT, each with a weight times its strength."""

    def merged(on: Mapping[str, LoraBundle], strengths: Mapping[str, float]) -> LoraBundle:
        weights = {name: weight * strength for name, strength in strengths.items()}
        return merge(on, weights, method, **options)

    if not abs(weight) < float("inf"):
        raise GatesError(f"weight is {weight}, expected a finite number")
    return Merged(model, adapters, merged)


_SUMMARIES = {
    "cat": "factors side by side, exact",
    "svd": "best approximation of the sum, of the largest rank",
    "linear": "A and B added separately",
    "ties": "largest entries of A and B that agree in sign",
    "dare_linear": "random entries of A and B, added",
    "dare_ties": "random entries of A and B that agree in sign",
    "magnitude_prune": "largest entries of A and B, added",
    "ties_svd": "largest entries of ΔW that agree in sign, approximated",
    "dare_linear_svd": "random entries of ΔW, added and approximated",
    "dare_ties_svd": "random entries of ΔW that agree in sign, approximated",
    "magnitude_prune_svd": "largest entries of ΔW, added and approximated",
}


RIVALS: dict[str, Rival] = {
    "sum": Rival(Sum, "sum of all adapters", static=True),
    "mean": Rival(Mean, "mean of all adapters", static=True),
    **{
        method: Rival(partial(_merge, method), _SUMMARIES[method], static=True)
        for method in METHODS
    },
    "switch": Rival(Switch, "one adapter after another, some steps each"),
    "composite": Rival(Composite, "mean of the predictions with each adapter alone"),
    "k_lora": Rival(
        KLora,
        "in each layer the adapter with the largest entries, by a schedule over the run",
    ),
    "adapter_strengths": Rival(
        AdapterStrengths, "trained strengths by adapter, in all layers alike", trainable=True
    ),
    "x_lora": Rival(
        XLora, "a classifier of the last hidden state weighs adapters by token", trainable=True
    ),
    "layer_strengths": Rival(
        partial(GatedFusion, mode="strengths"),
        "trained strengths by layer, number and role of adapters, whatever the input",
        trainable=True,
    ),
    "lora_hub": Rival(
        LoraHub,
        "one factor per adapter, searched on examples of the pair",
        sees_pair=True,
        static=True,
    ),
}
