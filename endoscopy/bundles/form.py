"""Trained networks as results of experiments, and those that ship with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch

from endoscopy.bundles.contents import SizingBundle, load_bundle


class Bundles:
    """The form of results that are networks: in bfloat16, in which they were calibrated."""

    def save(self, folder: Path, result: SizingBundle) -> None:
        """Write weights, configuration and model card."""
        result.save(folder, dtype=torch.bfloat16)

    def load(self, folder: Path) -> SizingBundle:
        """Read what :meth:`save` wrote.

        Raises:
            GatesError: A file is missing or damaged.
        """
        return load_bundle(folder)


def shipped_folder(config: str, name: str) -> Path:
    """Return where the package has a network of a configuration, if it has it.

    Args:
        config: Name of the configuration.
        name: Of the network, such as ``configured-s0``.
    """
    return Path(str(files("endoscopy"))) / "weights" / config / "weights" / name
