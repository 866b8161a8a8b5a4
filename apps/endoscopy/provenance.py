"""Everything that decides a training of a sizing network, as plain values to compare and hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.data.provenance import plain
from endoscopy.renderer.config import RendererConfig
from endoscopy.training.module import SizingModule
from endoscopy.training.variants import VARIANTS, variant_arguments
from harness.runs.checkpoint import RunCheckpoint

TRAINER = ("max_steps", "precision", "limit_train_batches")
VALIDATING = ("check_val_every_n_epoch", "limit_val_batches", "val_check_interval")
"""Options of the Trainer that decide the weights, the latter only where the best are kept."""

STEPS = "trainer.max_steps"
DEFAULTS = {
    "max_steps": -1,
    "precision": "32-true",
    "limit_train_batches": 1.0,
    "check_val_every_n_epoch": 1,
    "limit_val_batches": 1.0,
    "val_check_interval": 1.0,
}
PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
SCORED = ("cut_offs_mm",)  # of validation alone


class Recipe(NamedTuple):
    """How the configured Trainer trains.

    Attributes:
        options: Its options among ``TRAINER`` and ``VALIDATING``.
        monitor: Validation score that chooses the weights that are kept; the last ones when None.
        mode: Whether it is to be small (``min``) or large (``max``).
    """

    options: Mapping[str, Any] = {}
    monitor: str | None = None
    mode: str = "min"

    @classmethod
    def of(cls, trainer: Mapping[str, Any], checkpoint: RunCheckpoint) -> Recipe:
        """Return the recipe of the section ``trainer`` and what ``checkpoint`` keeps."""
        options = {
            name: DEFAULTS[name] if trainer[name] is None else trainer[name]
            for name in (*TRAINER, *VALIDATING)
        }
        precision = str(options["precision"])
        options["precision"] = PRECISIONS.get(precision, precision)
        return cls(options, checkpoint.monitor, checkpoint.mode)

    def settings(self, epochs: int, steps: int | None = None) -> dict[str, Any]:
        """Return what decides the weights after some epochs, or the last ones after some steps."""
        chosen = self.monitor is not None and steps is None
        names = TRAINER + VALIDATING if chosen else TRAINER
        found = {f"trainer.{n}": self.options[n] for n in names if n in self.options}
        found |= {STEPS: steps} if steps is not None else {"trainer.max_epochs": epochs}
        if chosen:
            found |= {"checkpoint.monitor": self.monitor, "checkpoint.mode": self.mode}
        return found


def module_settings(module: SizingModule, variant: str, **settings: Any) -> dict[str, Any]:
    """Return network, targets and optimization of a variant, by the names of the configuration."""
    network, options = variant_arguments(module, variant, **settings)
    kept = {name: value for name, value in options.items() if name not in SCORED}
    named = {f"model.model.{name}": value for name, value in network.items()}
    named |= {f"model.{name}": value for name, value in kept.items()}
    return {name: plain(value) for name, value in named.items()}


def data_settings(data: PolypSizingDataModule, variant: str) -> dict[str, Any]:
    """Return what decides samples and images: neither folders nor processes."""
    found = {
        "streams": list(VARIANTS[variant].streams or data.streams),
        "size": data.size,
        "aperture": data.aperture,
        "batch_size": data.batch_size,
        "sampler": data.sampler,
        "frames_per_object": data.frames_per_object,
        "augmentation": data.augmentation,
        "cache_form": data.cache_form if data.cache_folder is not None else "raw",
    }
    return {f"data.{name}": value for name, value in found.items()} | split_settings(data)


def split_settings(data: PolypSizingDataModule) -> dict[str, Any]:
    """Return what decides which objects are trained on and which are tested."""
    found: dict[str, Any] = {"sources": sorted(data.sources), "split": data.split_kind}
    if data.split_kind == "counts":
        names = ("train", "validation", "test", "calibration")
        found |= {f"{name}_objects": n for name, n in zip(names, data.counts, strict=True)}
    if data.split_kind in ("counts", "made"):
        found["split_seed"] = data.split_seed
    if data.split_kind == "made":
        found |= {"num_folds": data.num_folds, "level": data.level}
    if data.split_kind in ("hag6", "file"):
        found["split_file"] = file_hash(data.split_file)
    return {f"data.{name}": value for name, value in found.items()}


def rendering_settings(data: PolypSizingDataModule, config: RendererConfig) -> dict[str, Any]:
    """Return what rendered frames look like; nothing for data of other kinds."""
    if "synthetic" not in data.sources:
        return {}
    config_values = asdict(config)
    del config_values["side"], config_values["depth"]  # that of the data, and always metric
    return {f"rendering.{name}": value for name, value in config_values.items()}


def file_hash(path: str | None) -> str | None:
    """Return a short hash of the content of a file, wherever it lies; None without a path."""
    if path is None:
        return None
    if not Path(path).is_file():
        return "no file"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
