"""Everything that determines a sizing network, under the names of the configuration."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.renderer.config import RendererConfig
from endoscopy.training.module import SizingModule
from endoscopy.training.variants import CONFIGURED, variant_arguments
from harness.files import sha256

SCORED = ("cut_offs_mm",)  # of validation alone


def module_settings(module: SizingModule) -> dict[str, Any]:
    """Return network, targets and optimization."""
    network, options = variant_arguments(module, CONFIGURED)
    named = {f"model.model.{name}": value for name, value in network.items()}
    return named | {f"model.{n}": value for n, value in options.items() if n not in SCORED}


def data_settings(data: PolypSizingDataModule) -> dict[str, Any]:
    """Return what determines samples and images: neither folders nor processes."""
    found = {
        "streams": list(data.streams),
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
    """Return what determines the training and test objects."""
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


def rendering_settings(config: RendererConfig) -> dict[str, Any]:
    """Return the appearance of rendered frames, without their size, which is that of the data."""
    values = asdict(config)
    del values["side"], values["depth"]  # depth is always metric
    return {f"rendering.{name}": value for name, value in values.items()}


def file_hash(path: str | None) -> str | None:
    """Return a short hash of the content of a file, whatever its path; None without one."""
    if path is None:
        return None
    return sha256(Path(path))[:16] if Path(path).is_file() else "no file"
