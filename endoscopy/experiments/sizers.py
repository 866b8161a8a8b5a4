"""The sizing networks of a configuration, each with the data that it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from core_gates.errors import GatesError
from core_gates.training import recalibrate_batch_norm
from endoscopy.bundles.building import refuse_trained
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.experiments.rendered_sets import SHORTCUT, Rendering
from endoscopy.experiments.settings import (
    data_settings,
    file_hash,
    module_settings,
    rendering_settings,
)
from endoscopy.models import load_timm_weights
from endoscopy.training.module import SizingModule
from endoscopy.training.variants import CONFIGURED, VARIANTS, variant_arguments, variant_of

NOISY = ("l0",)  # kinds of gates with noise in training


class Training(NamedTuple):
    """What identifies a training run of a configuration.

    Attributes:
        variant: Key of :data:`endoscopy.training.variants.VARIANTS`.
        seed: Of weights, order and augmentation.
        objects: Training objects, drawn by the seed; all of the training part when None.
        fold: Fold that tests; the configured one when None.
    """

    variant: str = CONFIGURED
    seed: int = 0
    objects: int | None = None
    fold: int | None = None


Networks = Callable[[Training], SizingBundle]


class Sizers:
    """The networks of a configuration, untrained.

    Args:
        module: The module of the configuration; it is not trained.
        datamodule: Its data.
        rendering: What rendered data look like; the variant ``shortcut`` has its own set.
        timm_weights: State dict of timm from which every training run starts.
    """

    def __init__(
        self,
        module: SizingModule,
        datamodule: PolypSizingDataModule,
        rendering: Rendering | None = None,
        timm_weights: str | None = None,
    ) -> None:
        self.module, self.datamodule = module, datamodule
        self.rendering, self.timm_weights = rendering, timm_weights

    def resolved(self, training: Training) -> Training:
        """Return a training with its fold: the configured one if none is named, None for counts."""
        data = self.datamodule
        fold = data.fold if training.fold is None else training.fold
        return training._replace(fold=None if data.split_kind == "counts" else fold)

    def settings(self) -> dict[str, Any]:
        """Return everything of model and data that determines the weights, by name."""
        found = module_settings(self.module) | data_settings(self.datamodule)
        if self.rendering is not None and "synthetic" in self.datamodule.sources:
            found |= rendering_settings(self.rendering.config)
        return found | {"timm_weights": file_hash(self.timm_weights)}

    def version(self, variant: str) -> dict[str, Any]:
        """Return the setting ``version`` of variants whose training has changed.

        Version 1 of noisy gates was scored with the running statistics of training.
        """
        return {"version": 2} if self._gates(variant) in NOISY else {}

    def untrained(self, training: Training, **settings: Any) -> SizingModule:
        """Return a new module, its weights drawn from the global generator or those of timm.

        Args:
            training: Which.
            settings: Arguments of :class:`SizingModule` that override those of the variant.
        """
        module = variant_of(self.module, training.variant, **settings)
        if self.timm_weights is not None:
            load_timm_weights(module.model, self.timm_weights)
        return module

    def data(self, training: Training) -> PolypSizingDataModule:
        """Return the data of a training."""
        streams = VARIANTS[training.variant].streams
        data = self.datamodule
        if training.variant == "shortcut" and self.rendering is not None:
            folder = self.rendering.set(data, SHORTCUT).folder
            data = data.elsewhere(str(folder), data.counts[0])
        return data.variant(
            seed=training.seed,
            streams=streams,
            fold=training.fold,
            train_objects=training.objects,
        )

    def settle(self, variant: str, module: SizingModule, data: PolypSizingDataModule) -> None:
        """Estimate the statistics after noisy gates again, with gates as in evaluation."""
        if self._gates(variant) in NOISY:
            recalibrate_batch_norm(module.model, data.loader("train"), run=_run)

    def epochs(self, steps: int, objects: int) -> int:
        """Return the epochs that give a number of steps, rounded up."""
        return -(-steps // len(self.datamodule.variant(train_objects=objects).loader("train")))

    def pinned(self, bundle: SizingBundle) -> Networks:
        """Return one network for all training runs; it is refused where it saw test objects.

        Args:
            bundle: The network.
        """

        def network(training: Training) -> SizingBundle:
            refuse_trained(bundle, self.data(training))
            return bundle

        return network

    def _gates(self, variant: str) -> str:
        return str(variant_arguments(self.module, variant)[0]["gates"])


def taking_part(variants: Sequence[str], only: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the variants among ``only``, all when that is empty.

    Raises:
        GatesError: A name is unknown, or none is left.
    """
    unknown = [name for name in (*variants, *only) if name not in VARIANTS]
    found = tuple(name for name in variants if not only or name in only)
    if unknown:
        raise GatesError(
            f"variant {', '.join(unknown)} is unknown: choose from {', '.join(VARIANTS)}"
        )
    if not found:
        raise GatesError(
            f"no variant takes part: --only names some of evaluate.variants, which are "
            f"{', '.join(variants) or 'none'}"
        )
    return found


@torch.no_grad()
def _run(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model(batch["streams"], batch.get("geometry"))
