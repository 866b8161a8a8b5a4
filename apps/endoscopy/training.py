"""Sizing networks that an evaluation needs: found in the run folder or the package, or trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from apps.endoscopy.provenance import (
    Recipe,
    data_settings,
    file_hash,
    module_settings,
    rendering_settings,
)
from apps.endoscopy.rendering import SHORTCUT, Rendering
from core_gates.errors import GatesError
from endoscopy.bundles.building import bundle_of, refuse_trained
from endoscopy.bundles.contents import SizingBundle, load_bundle, read_training
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.data.provenance import Provenance, differences
from endoscopy.models import load_timm_weights
from endoscopy.training.module import SizingModule
from endoscopy.training.variants import CONFIGURED, VARIANTS, variant_of
from harness.runs.checkpoint import load_weights
from harness.runs.folder import RunFolder
from harness.runs.processes import Tick, in_processes
from harness.runs.ticker import ticking

WEIGHTS = "weights"


class Training(NamedTuple):
    """What tells one training of a configuration from another.

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

    @property
    def name(self) -> str:
        """Name of the folder of its weights, such as ``plain-n50-s0``."""
        parts = [self.variant]
        if self.objects is not None:
            parts.append(f"n{self.objects}")
        if self.fold is not None:
            parts.append(f"f{self.fold}")
        return "-".join([*parts, f"s{self.seed}"])


class Sizers:
    """The trained networks of a configuration.

    Args:
        run_folder: Trained networks are kept in its ``weights/``.
        config: Name of the configuration, whose shipped networks are in ``endoscopy/weights``.
        module: The module of the configuration.
        datamodule: Its data.
        epochs: Of a training.
        rendering: Where the set is that the variant ``shortcut`` is trained on.
        timm_weights: State dict of timm that every training starts from.
        recipe: How the configured Trainer trains.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        config: str,
        module: SizingModule,
        datamodule: PolypSizingDataModule,
        epochs: int,
        rendering: Rendering | None = None,
        timm_weights: str | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.run_folder, self.config = run_folder, config
        self.module, self.datamodule = module, datamodule
        self.epochs, self.rendering, self.timm_weights = epochs, rendering, timm_weights
        self.recipe = recipe or Recipe()
        self.timm_hash = file_hash(timm_weights)
        self.pinned: Path | None = None

    @property
    def folder(self) -> Path:
        """Where trained networks are kept."""
        return self.run_folder.path / WEIGHTS

    @property
    def shipped(self) -> Path:
        """Where those of the package are, if there are any."""
        return Path(str(files("endoscopy"))) / WEIGHTS / self.config

    def resolved(self, training: Training) -> Training:
        """Return a training with its fold: the configured one if none is named, None of counts."""
        data = self.datamodule
        fold = data.fold if training.fold is None else training.fold
        return training._replace(fold=None if data.split_kind == "counts" else fold)

    def settings(
        self, training: Training, *, steps: int | None = None, **settings: Any
    ) -> dict[str, Any]:
        """Return everything that decides the weights of a training, by name.

        Args:
            training: Which.
            steps: Optimizer steps in place of the configured epochs; the last weights are kept.
            settings: Arguments of the module that override the configuration.
        """
        training, data = self.resolved(training), self.datamodule
        found = self.recipe.settings(self.epochs, steps)
        found |= module_settings(self.module, training.variant, **settings)
        found |= data_settings(data, training.variant) | training._asdict()
        if self.rendering is not None:
            found |= rendering_settings(data, self.rendering.config)
        return found | {"timm_weights": self.timm_hash}

    def gap(self, folder: Path, training: Training) -> str:
        """Say in which settings a trained network differs from a training; empty if in none."""
        known = read_training(folder)
        return differences(known and known.settings, self.settings(training))

    def path(self, training: Training) -> Path | None:
        """Return the folder of a trained network, or None if it must be trained.

        Networks of the package that were trained with other settings are passed over.

        Raises:
            GatesError: The network of the run was trained with other settings, and it may not be
                overwritten.
        """
        if self.pinned is not None:
            return self.pinned
        training = self.resolved(training)
        own, shipped = (root / training.name for root in (self.folder, self.shipped))
        if own.is_dir():
            gap = self.gap(own, training)
            if not gap:
                return own
            if not self.run_folder.overwrite:
                raise GatesError(changed(own, gap))
        return shipped if shipped.is_dir() and not self.gap(shipped, training) else None

    def missing(self, trainings: Sequence[Training]) -> list[Training]:
        """Return what has to be trained.

        Raises:
            GatesError: See :meth:`path`.
        """
        wanted = dict.fromkeys(self.resolved(training) for training in trainings)
        return [training for training in wanted if self.path(training) is None]

    def reasons(self, missing: Sequence[Training]) -> str:
        """Name what has to be trained, and say why what is there does not do."""
        named = []
        for one in missing:
            found = [p for p in (self.folder / one.name, self.shipped / one.name) if p.is_dir()]
            why = f" ({found[0]} has {self.gap(found[0], one)})" if found else ""
            named.append(f"{one.name}{why}")
        return ", ".join(named)

    def load(self, training: Training) -> SizingBundle:
        """Return a trained network.

        Raises:
            GatesError: It is not there or damaged, or was trained on test objects.
        """
        path = self.path(training)
        if path is None:
            raise GatesError(f"{training.name} is not trained: run `gates endoscopy evaluate`")
        bundle = self.from_checkpoint(path) if path.suffix == ".ckpt" else load_bundle(path)
        refuse_trained(bundle, self.data(training))
        return bundle

    def from_checkpoint(self, path: Path) -> SizingBundle:
        """Return the network of a checkpoint of ``fit``, its intervals calibrated anew.

        Raises:
            GatesError: It is damaged or belongs to another configuration.
        """
        module = variant_of(self.module, CONFIGURED)
        trained_on = load_checkpoint(path, module)
        self.datamodule.setup("test")
        bundle = bundle_of(module, self.datamodule, facts={"checkpoint": str(path)})
        bundle.training = Provenance({}, trained_on)
        return bundle

    def train_missing(self, trainings: Sequence[Training]) -> None:
        """Build the caches that trainings and predictions read, and train what is missing.

        A CPU trains on all of its cores; only one process may build a cache.
        """
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        for training in trainings:
            self.data(training).prepare_data()
        missing = self.missing(trainings)
        if not missing:
            return
        with ticking("training", self.epochs * len(missing)) as tick:
            run_all(self.train, [(one,) for one in missing], tick)

    def train(self, training: Training, *, tick: Tick) -> Path:
        """Train one network with the configured data and keep it."""
        begin = time.monotonic()
        module, data = self.fit(training, tick=tick)
        facts = self.facts(training) | {"training seconds": round(time.monotonic() - begin)}
        bundle = bundle_of(module, data, facts=facts, settings=self.settings(training))
        return keep_bundle(bundle, self.folder / self.resolved(training).name)

    def fit(
        self,
        training: Training,
        *,
        tick: Tick,
        epochs: int | None = None,
        steps: int | None = None,
        **settings: Any,
    ) -> tuple[SizingModule, PolypSizingDataModule]:
        """Return a trained module and the data that it was trained on.

        Args:
            training: Which.
            tick: Called after each epoch.
            epochs: Length of the schedule; as configured when None.
            steps: Optimizer steps after which the training ends, if before its last epoch; then
                the last weights are returned, else the best ones where the recipe has a monitor.
            settings: Arguments of the module that override the configuration.
        """
        L.seed_everything(training.seed, verbose=False)
        module = variant_of(self.module, training.variant, **settings)
        if self.timm_weights is not None:
            load_timm_weights(module.model, self.timm_weights)
        data = self.data(training)
        best = BestWeights(self.recipe) if self.recipe.monitor and steps is None else None
        options = dict(self.recipe.options) | {"max_epochs": epochs or self.epochs}
        if best is None:
            options["limit_val_batches"] = 0
        if steps is not None:
            options["max_steps"] = steps
        trainer = L.Trainer(
            **options,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            callbacks=[EpochTicks(tick), *([best] if best else [])],
            default_root_dir=self.run_folder.path,
        )
        trainer.fit(module, data)
        if best is not None and best.weights is not None:
            module.load_state_dict(best.weights)
        return module.eval(), data

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

    def facts(self, training: Training) -> dict[str, Any]:
        """Return what a model card should say of a training."""
        return {
            "configuration": self.config,
            "variant": VARIANTS[training.variant].summary,
            "seed": training.seed,
            "epochs": self.epochs,
        }


class EpochTicks(Callback):
    """Call a function after every epoch."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tick."""
        self.tick()


class BestWeights(Callback):
    """Hold the weights with the best validation score, by the rule of ``best.ckpt``.

    Attributes:
        weights: State of the module; None before the first score.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.monitor, self.sign = str(recipe.monitor), 1 if recipe.mode == "min" else -1
        self.score = math.inf
        self.weights: dict[str, torch.Tensor] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights if they are better than all before.

        Raises:
            GatesError: The score is not logged.
        """
        if self.monitor not in trainer.callback_metrics:
            raise GatesError(
                f"checkpoint.monitor {self.monitor!r} is not logged; logged are "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'no scores'}"
            )
        score = self.sign * float(trainer.callback_metrics[self.monitor])
        if score < self.score or (self.weights is None and not math.isnan(score)):
            self.score = score
            self.weights = {n: v.detach().clone() for n, v in pl_module.state_dict().items()}


def run_all(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], tick: Tick
) -> list[Any]:
    """Run pieces of work side by side on a CPU, one after the other where there is a GPU."""
    if torch.cuda.is_available():
        return [work(*one, tick=tick) for one in arguments]
    return in_processes(work, arguments, tick)


def keep_bundle(bundle: SizingBundle, folder: Path) -> Path:
    """Write a network in bfloat16, in which it was calibrated; the folder is whole or absent."""
    partial = folder.with_name(f".{folder.name}.partial")
    bundle.save(partial, torch.bfloat16)
    if folder.is_dir():
        for path in partial.iterdir():
            path.replace(folder / path.name)
        partial.rmdir()
    else:
        partial.rename(folder)
    return folder


def changed(path: Path, gap: str) -> str:
    """Say that something was trained with other settings, and how to go on."""
    return (
        f"{path} was trained with other settings ({gap}): give those, or --name NEW to train "
        "beside it, or --overwrite to replace it"
    )


def load_checkpoint(path: Path, module: SizingModule) -> tuple[str, ...]:
    """Read the weights of a checkpoint into a module; return the keys of its training objects.

    Raises:
        GatesError: It is damaged or belongs to another configuration.
    """
    checkpoint = load_weights(path)
    try:
        module.load_state_dict(checkpoint.get("state_dict", {}))
    except RuntimeError as error:
        raise GatesError(
            f"{path} is a checkpoint of another configuration: give the one it was trained with"
        ) from error
    return tuple(checkpoint.get(PolypSizingDataModule.__name__, {}).get("trained_on", ()))


def keep_fit(sizers: Sizers) -> Path:
    """Keep the network that ``fit`` trained, the best one where a best one is kept."""
    best = sizers.run_folder.best_checkpoint
    if best is not None:
        load_checkpoint(best, sizers.module)
    training = sizers.resolved(Training(CONFIGURED, sizers.datamodule.seed))
    facts, settings = sizers.facts(training), sizers.settings(training)
    bundle = bundle_of(sizers.module, sizers.datamodule, facts=facts, settings=settings)
    return keep_bundle(bundle, sizers.folder / training.name)
