"""Networks and training runs to be compared with the configured one."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core_gates.errors import GatesError, check_option
from core_gates.training import recalibrate_batch_norm
from core_gates.training.gradient_routing import Mode
from endoscopy.bundles.bundle_fitting import refuse_trained
from endoscopy.bundles.sizing_bundle import SizingBundle
from endoscopy.data.frame_cache import FrameReader
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.data.samples import LesionDataset
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.models import GateKind, MultiStreamSizer, load_timm_weights
from endoscopy.renderer.rendered_dataset import is_complete
from endoscopy.renderer.scene import BrandName, Exposure, Frequencies, RendererConfig
from endoscopy.training.losses import SizeWeightedLoss
from endoscopy.training.sizing_module import SizingModule
from endoscopy.training.targets import ScaledMillimeters, SizeTarget
from harness.files import sha256

L0_WEIGHT = 1e-4  # of a gate; some hundred gates then cost about as much as the loss at its end


class Variant(NamedTuple):
    """What differs from the configuration; None leaves it as configured.

    Attributes:
        summary: A few words for tables.
        gates: Kind of the gates.
        gradient_routing: How the gates learn.
        l0_weight: Of the expected number of open gates.
        streams: Inputs of the network.
        millimeters: Train on millimeters under the size-weighted loss of arXiv 2407.04400.
    """

    summary: str
    gates: GateKind | None = None
    gradient_routing: Mode | None = None
    l0_weight: float | None = None
    streams: tuple[str, ...] | None = None
    millimeters: bool = False


CONFIGURED = "configured"
VARIANTS: dict[str, Variant] = {
    CONFIGURED: Variant("as configured"),
    "plain": Variant("no gates", "none", "off", 0.0),
    "dual": Variant("gates, gradient routing in two passes", "fsg", "dual", 0.0),
    "joint": Variant("gates, one pass with two learning rates", "fsg", "joint", 0.0),
    "frozen": Variant("gates that never learn", "fsg", "off", 0.0),
    "layer_scale": Variant("LayerScale", "layer_scale", "off", 0.0),
    "l0": Variant("hard-concrete gates with an L0 penalty", "l0", "joint", L0_WEIGHT),
    "se": Variant("squeeze and excitation", "se", "off", 0.0),
    "millimeters": Variant("size-weighted loss in millimeters", millimeters=True),
    "crop": Variant("box crop only, apparent size lost", streams=("crop",)),
    "depth": Variant("metric depth besides", streams=("rgb_mask_depth",)),
    "shortcut": Variant("trained where the distance goes with the size"),
}
"""By their names in configurations and score tables."""


def variant_of(module: SizingModule, name: str, **settings: Any) -> SizingModule:
    """Return an untrained module that differs from a configured one by a variant.

    Weights are drawn from the global generator, whatever those of ``module`` are.

    Args:
        module: The configured module; it is not changed.
        name: Key of ``VARIANTS``.
        settings: Arguments of `SizingModule` that override both, such as
            ``learning_rate``.

    Raises:
        ValueError: The name is unknown, or the arguments do not fit each other.
    """
    network, options = variant_arguments(module, name, **settings)
    return SizingModule(MultiStreamSizer(**network), **options)


def variant_arguments(
    module: SizingModule, name: str, **settings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `MultiStreamSizer` and of `SizingModule` of a variant.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant {name!r} is unknown; choose from {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    arguments = dict(module.model.arguments)
    if variant.gates is not None:
        arguments["gates"] = variant.gates
    if variant.streams is not None:
        arguments["streams"] = variant.streams
    if variant.millimeters:
        arguments["outputs"] = 1
    target, gate_target = _targets(module, variant)
    options = _options(module) | {"target": target, "gate_target": gate_target}
    changed = {"gradient_routing": variant.gradient_routing, "l0_weight": variant.l0_weight}
    options |= {name: value for name, value in changed.items() if value is not None}
    return arguments, options | settings


def _options(module: SizingModule) -> dict[str, Any]:
    """Return the arguments of the training, all but network and targets."""
    kept = (
        "gradient_routing", "every_k", "learning_rate", "min_learning_rate", "weight_decay",
        "gate_learning_rate", "clip", "gate_clip", "cycles", "accumulate", "l0_weight",
        "sync_batch_norm",
    )  # fmt: skip
    cut_offs = (module.cut_offs.small, module.cut_offs.large)
    return {
        **{name: getattr(module, name) for name in kept},
        "optimizer": module.optimizer_name,
        "cut_offs_mm": cut_offs,
    }


def _targets(module: SizingModule, variant: Variant) -> tuple[SizeTarget, SizeTarget]:
    if variant.millimeters:  # the weights of the published configurations
        return (
            ScaledMillimeters(SizeWeightedLoss(weights=(3.0, 5.0))),
            ScaledMillimeters(SizeWeightedLoss(weights=(5.0, 10.0))),
        )
    return copy.deepcopy((module.target, module.gate_target))


def module_settings(module: SizingModule) -> dict[str, Any]:
    """Return network, targets and optimization."""
    network, options = variant_arguments(module, CONFIGURED)
    named = {f"model.model.{name}": value for name, value in network.items()}
    del options["cut_offs_mm"]  # of validation alone
    return named | {f"model.{name}": value for name, value in options.items()}


def data_settings(data: PolypSizingDataModule) -> dict[str, Any]:
    """Return the settings that determine samples and images, without folders and processes."""
    data_options = {
        "streams": list(data.streams),
        "size": data.size,
        "aperture": data.aperture,
        "batch_size": data.batch_size,
        "sampler": data.sampler,
        "frames_per_object": data.frames_per_object,
        "augmentation": data.augmentation,
        "cache_form": data.cache_form if data.cache_folder is not None else "raw",
    }
    return {f"data.{name}": value for name, value in data_options.items()} | split_settings(data)


def split_settings(data: PolypSizingDataModule) -> dict[str, Any]:
    """Return the settings that determine the training and test objects."""
    split_options: dict[str, Any] = {"sources": sorted(data.sources), "split": data.split_kind}
    if data.split_kind == "counts":
        names = ("train", "validation", "test", "calibration")
        split_options |= {f"{name}_objects": n for name, n in zip(names, data.counts, strict=True)}
    if data.split_kind in ("counts", "made"):
        split_options["split_seed"] = data.split_seed
    if data.split_kind == "made":
        split_options |= {"num_folds": data.num_folds, "level": data.level}
    if data.split_kind in ("hag6", "file"):
        split_options["split_file"] = file_hash(data.split_file)
    return {f"data.{name}": value for name, value in split_options.items()}


def rendering_settings(config: RendererConfig) -> dict[str, Any]:
    """Return the appearance of rendered frames, without their size, which is that of the data."""
    values = asdict(config)
    del values["side"], values["depth"]  # depth is always metric
    return {f"rendering.{name}": value for name, value in values.items()}


def file_hash(path: str | None) -> str | None:
    """Return a short hash of the content of a file, ``no file`` if it is absent; None for None."""
    if path is None:
        return None
    return sha256(Path(path))[:16] if Path(path).is_file() else "no file"


MAIN, SHORTCUT = "main", "rho 0.8, training"
SHIFTS: dict[str, dict[str, Any]] = {"agc": {"exposure": "agc"}, "brand_b": {"brand": "B"}}
RHOS: dict[str, dict[str, Any]] = {
    f"rho {rho:g}": {"shortcut_rho": rho} for rho in (0.8, 0.0, -0.8)
}


class RenderedSet(NamedTuple):
    """A set of rendered objects on disk.

    Attributes:
        name: Of the set, for messages.
        folder: Where it is.
        config: What its objects look like.
        objects: Number of objects, from 0 on.
    """

    name: str
    folder: Path
    config: RendererConfig
    objects: int


class Rendering:
    """What the rendered data of a configuration look like.

    The training set is in ``data.synthetic``, the others next to it. Sets of one kind hold the
    same objects under other conditions.

    Args:
        seed: Seed of all sets.
        frames: Frames per object.
        exposure: Exposure of the main set: ``fixed`` gain, or ``agc``.
        frequencies: Distribution of sizes: ``balanced``, or the ``real`` 76, 14 and 10 % of the
            three classes.
        brand: Endoscope of the main set: ``A``, ``B`` or ``mixed``.
        shortcut_rho: How strongly the distance of the camera follows the size in the main set.
        shift_objects: Number of objects in every other set.
    """

    def __init__(
        self,
        seed: int = 0,
        frames: int = 6,
        exposure: Exposure = "fixed",
        frequencies: Frequencies = "balanced",
        brand: BrandName = "A",
        shortcut_rho: float = 0.0,
        shift_objects: int = 500,
    ) -> None:
        self.config = RendererConfig(
            seed=seed,
            frames=frames,
            exposure=exposure,
            frequencies=frequencies,
            brand=brand,
            shortcut_rho=shortcut_rho,
        )
        self.shift_objects = shift_objects

    def set(self, data: PolypSizingDataModule, name: str = MAIN) -> RenderedSet:
        """Return one of the sets.

        Raises:
            GatesError: The name is unknown, or the configuration has no rendered data.
        """
        main = data.sources.get("synthetic")
        if main is None:
            raise GatesError(
                "this configuration has no rendered data: set data.synthetic to a folder, or take "
                "the configuration synthetic"
            )
        config = replace(self.config, side=data.size)
        if name == MAIN:
            return RenderedSet(name, Path(main), config, sum(data.counts))
        folder = Path(f"{main}-{name.replace(', ', '-').replace(' ', '_')}")
        if name in SHIFTS:
            offset, looks, objects = 1, SHIFTS[name], self.shift_objects
        elif name in RHOS:
            offset, looks, objects = 2, RHOS[name], self.shift_objects
        elif name == SHORTCUT:
            offset, looks, objects = 3, RHOS["rho 0.8"], data.counts[0] + 2
        else:
            choices = ", ".join((MAIN, *SHIFTS, *RHOS, SHORTCUT))
            raise GatesError(f"no rendered set {name!r}: choose from {choices}")
        return RenderedSet(
            name, folder, replace(config, seed=config.seed + offset, **looks), objects
        )

    def missing(self, data: PolypSizingDataModule, names: Sequence[str]) -> list[RenderedSet]:
        """Return the sets that must be rendered, wholly or in part.

        Raises:
            GatesError: A folder holds another set, or a source to be joined to them is absent.
        """
        data.check_sources()
        sets = [self.set(data, name) for name in names]
        return [
            rendered_set
            for rendered_set in sets
            if not is_complete(rendered_set.folder, rendered_set.config, rendered_set.objects)
        ]

    def shifted(self, data: PolypSizingDataModule, name: str) -> LesionDataset:
        """Return all frames of a rendered set, at the size of the data."""
        table, _ = read_real_colon(self.set(data, name).folder, check_images=False)
        return LesionDataset(FrameReader(table, data.size, masks=True, depths=True))


class Training(NamedTuple):
    """What identifies a training run of a configuration.

    Attributes:
        variant: Key of `endoscopy.experiments.sizers.VARIANTS`.
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
        settings = module_settings(self.module) | data_settings(self.datamodule)
        if self.rendering is not None and "synthetic" in self.datamodule.sources:
            settings |= rendering_settings(self.rendering.config)
        return settings | {"timm_weights": file_hash(self.timm_weights)}

    def version(self, variant: str) -> dict[str, Any]:
        """Return the setting ``version`` of variants whose training has changed.

        Version 1 of noisy gates was scored with the running statistics of training.
        """
        return {"version": 2} if self._is_noisy(variant) else {}

    def untrained(self, training: Training, **settings: Any) -> SizingModule:
        """Return a new module, its weights drawn from the global generator or those of timm.

        Args:
            training: Which.
            settings: Arguments of `SizingModule` that override those of the variant.
        """
        module = variant_of(self.module, training.variant, **settings)
        if self.timm_weights is not None:
            load_timm_weights(module.model, self.timm_weights)
        return module

    def data(self, training: Training) -> PolypSizingDataModule:
        """Return the data of a training."""
        data = self.datamodule
        if training.variant == "shortcut" and self.rendering is not None:
            folder = self.rendering.set(data, SHORTCUT).folder
            data = data.elsewhere(str(folder), data.counts[0])
        return data.variant(
            seed=training.seed,
            streams=VARIANTS[training.variant].streams,
            fold=training.fold,
            train_objects=training.objects,
        )

    def settle(self, variant: str, module: SizingModule, data: PolypSizingDataModule) -> None:
        """Estimate the statistics after noisy gates again, with gates as in evaluation."""
        if self._is_noisy(variant):
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

    def _is_noisy(self, variant: str) -> bool:
        return variant_arguments(self.module, variant)[0]["gates"] == "l0"


def taking_part(variants: Sequence[str], only: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the variants among ``only``, all when that is empty.

    Raises:
        GatesError: There is no variant, or a name is not known or not compared.
    """
    if not variants:
        raise GatesError(f"evaluate.variants is empty: name some of {', '.join(VARIANTS)}")
    for name in variants:
        check_option("variant", name, VARIANTS, GatesError)
    for name in only:
        check_option("--only", name, variants, GatesError)
    return tuple(name for name in variants if not only or name in only)


@torch.no_grad()
def _run(model: torch.nn.Module, batch: dict[str, Any]) -> None:
    model(batch["streams"], batch.get("geometry"))
