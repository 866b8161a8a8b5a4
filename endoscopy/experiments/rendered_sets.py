"""The rendered sets of a configuration: for training, shifted, and with shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from core_gates.errors import GatesError
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.data.frames.dataset import LesionDataset
from endoscopy.data.frames.reader import FrameReader
from endoscopy.data.readers.real_colon import read_real_colon
from endoscopy.renderer.config import BrandName, Exposure, Frequencies, RendererConfig
from endoscopy.renderer.dataset import is_complete

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
            config = replace(config, seed=config.seed + 1, **SHIFTS[name])
            return RenderedSet(name, folder, config, self.shift_objects)
        if name in RHOS:
            config = replace(config, seed=config.seed + 2, **RHOS[name])
            return RenderedSet(name, folder, config, self.shift_objects)
        if name == SHORTCUT:
            config = replace(config, seed=config.seed + 3, **RHOS["rho 0.8"])
            return RenderedSet(name, folder, config, data.counts[0] + 2)
        known = ", ".join((MAIN, *SHIFTS, *RHOS, SHORTCUT))
        raise GatesError(f"no rendered set {name!r}: choose from {known}")

    def missing(self, data: PolypSizingDataModule, names: Sequence[str]) -> list[RenderedSet]:
        """Return the sets that must be rendered, wholly or in part.

        Raises:
            GatesError: A folder holds another set, or a source to be joined to them is absent.
        """
        data.check_sources()
        sets = [self.set(data, name) for name in names]
        return [one for one in sets if not is_complete(one.folder, one.config, one.objects)]

    def shifted(self, data: PolypSizingDataModule, name: str) -> LesionDataset:
        """Return all frames of a rendered set, at the size of the data."""
        table, _ = read_real_colon(self.set(data, name).folder, check_images=False)
        return LesionDataset(FrameReader(table, data.size, masks=True, depths=True))
