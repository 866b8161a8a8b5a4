"""What of a parsed configuration decides a result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from harness.experiment.piece import flatten
from harness.files import sha256

TRAINER = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches",
    "limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "reload_dataloaders_every_n_epochs", "callbacks", "plugins", "sync_batchnorm",
)  # fmt: skip
"""Options of the Trainer that change what is trained; devices, processes and logs do not."""

IF_GIVEN = ("callbacks", "plugins", "sync_batchnorm")
"""Those that count only where they are given: without them, settings are as they always were."""

WATCHING = (
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelSummary", "RichModelSummary",
    "RichProgressBar", "ThroughputMonitor", "TQDMProgressBar",
)  # fmt: skip
"""Callbacks of Lightning that change nothing."""

CHECKPOINT = ("monitor", "mode")


def decisive_settings(options: Mapping[str, Any], neutral: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of model, data and training under dotted names.

    Args:
        options: The parsed configuration of a verb, nested.
        neutral: Dotted names, or beginnings of them, of options that decide nothing: folders,
            processes, logs.
    """
    found = {
        "seed": options.get("seed_everything"),
        **_of_trainer(options.get("trainer") or {}),
        **{
            f"checkpoint.{name}": (options.get("checkpoint") or {}).get(name) for name in CHECKPOINT
        },
    }
    for group in ("model", "data"):
        value = options.get(group)
        found |= flatten(value, f"{group}.") if isinstance(value, Mapping) else {group: value}
    return {
        name: value
        for name, value in found.items()
        if value is not None
        and not any(name == one or name.startswith(f"{one}.") for one in neutral)
    }


def _of_trainer(options: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: options.get(name) for name in TRAINER}
    given = found["callbacks"] or []
    found["callbacks"] = [
        one for one in (given if isinstance(given, list) else [given]) if not _watches(one)
    ]
    return {f"trainer.{n}": (v or None) if n in IF_GIVEN else v for n, v in found.items()}


def _watches(callback: Any) -> bool:
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    package, _, name = str(path).rpartition(".")
    return name in WATCHING and package.startswith("lightning.pytorch.callbacks")


def start_of(path: str | None) -> str | None:
    """Return a short hash of the checkpoint that a training run starts from; None for none."""
    return None if path is None else sha256(Path(path))[:16]
