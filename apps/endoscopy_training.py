"""Sizing networks that an evaluation needs: found in the run folder or the package, or trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from apps.checkpoint import load_weights
from apps.endoscopy_rendering import SHORTCUT, Rendering
from apps.processes import Tick, in_processes
from apps.runs import RunFolder
from apps.ticker import ticking
from core_gates.errors import GatesError
from endoscopy.bundle import SizingBundle, load_bundle
from endoscopy.bundling import bundle_of
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.models import load_timm_weights
from endoscopy.module import SizingModule
from endoscopy.variants import CONFIGURED, VARIANTS, variant_of

WEIGHTS = "weights"


class Training(NamedTuple):
    """What tells one training of a configuration from another.

    Attributes:
        variant: Key of :data:`endoscopy.variants.VARIANTS`.
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
    ) -> None:
        self.run_folder, self.config = run_folder, config
        self.module, self.datamodule = module, datamodule
        self.epochs, self.rendering, self.timm_weights = epochs, rendering, timm_weights
        self.pinned: Path | None = None

    def path(self, training: Training) -> Path | None:
        """Return the folder of a trained network, or None if it must be trained."""
        if self.pinned is not None:
            return self.pinned
        names = [training.name]
        if training.fold == self.datamodule.fold:
            names.append(training._replace(fold=None).name)  # what fit leaves
        shipped = Path(str(files("endoscopy"))) / WEIGHTS / self.config
        roots = (self.run_folder.path / WEIGHTS, shipped)
        places = [root / name for root in roots for name in names]
        return next((place for place in places if place.is_dir()), None)

    def missing(self, trainings: Sequence[Training]) -> list[Training]:
        """Return what has to be trained."""
        return [training for training in trainings if self.path(training) is None]

    def load(self, training: Training) -> SizingBundle:
        """Return a trained network.

        Raises:
            GatesError: It is not there or damaged.
        """
        path = self.path(training)
        if path is None:
            raise GatesError(f"{training.name} is not trained: run `gates endoscopy evaluate`")
        if path.suffix == ".ckpt":
            return self.from_checkpoint(path)
        return load_bundle(path)

    def from_checkpoint(self, path: Path) -> SizingBundle:
        """Return the network of a checkpoint of ``fit``, its intervals calibrated anew.

        Raises:
            GatesError: It is damaged or belongs to another configuration.
        """
        module = variant_of(self.module, CONFIGURED)
        load_checkpoint(path, module)
        self.datamodule.setup("test")
        return bundle_of(module, self.datamodule, facts={"checkpoint": str(path)})

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
        bundle = bundle_of(module, data, facts=facts)
        return keep_bundle(bundle, self.run_folder.path / WEIGHTS / training.name)

    def fit(
        self,
        training: Training,
        *,
        tick: Tick,
        epochs: int | None = None,
        steps: int = -1,
        **settings: Any,
    ) -> tuple[SizingModule, PolypSizingDataModule]:
        """Return a trained module and the data that it was trained on.

        Args:
            training: Which.
            tick: Called after each epoch.
            epochs: Length of the schedule; as configured when None.
            steps: Optimizer steps after which the training ends, if before its last epoch.
            settings: Arguments of the module that override the configuration.
        """
        L.seed_everything(training.seed, verbose=False)
        module = variant_of(self.module, training.variant, **settings)
        if self.timm_weights is not None:
            load_timm_weights(module.model, self.timm_weights)
        data = self.data(training)
        trainer = L.Trainer(
            max_epochs=epochs or self.epochs,
            max_steps=steps,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            callbacks=[EpochTicks(tick)],
            default_root_dir=self.run_folder.path,
        )
        trainer.fit(module, data)
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


def load_checkpoint(path: Path, module: SizingModule) -> None:
    """Read the weights of a checkpoint into a module.

    Raises:
        GatesError: It is damaged or belongs to another configuration.
    """
    try:
        module.load_state_dict(load_weights(path).get("state_dict", {}))
    except RuntimeError as error:
        raise GatesError(
            f"{path} is a checkpoint of another configuration: give the one it was trained with"
        ) from error


def keep_fit(sizers: Sizers) -> Path:
    """Keep the network that ``fit`` trained, the best one where a best one is kept."""
    best = sizers.run_folder.best_checkpoint
    if best is not None:
        load_checkpoint(best, sizers.module)
    training = Training(CONFIGURED, sizers.datamodule.seed)
    facts = sizers.facts(training)
    bundle = bundle_of(sizers.module, sizers.datamodule, facts=facts)
    return keep_bundle(bundle, sizers.run_folder.path / WEIGHTS / training.name)
