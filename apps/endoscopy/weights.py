"""Which trained network a verb uses: the one named, that of the run, or the shipped one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from apps.endoscopy.training import WEIGHTS, Training
from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle, load_bundle
from endoscopy.segmentation.segmenter import Segmenter, load_segmenter
from endoscopy.training.variants import CONFIGURED
from harness.command.verbs import Place

SEGMENTER = "segmenter.safetensors"
FOLDS = f"{CONFIGURED}-f[0-9]*-s0"


class NamedBundle(NamedTuple):
    """A trained network and where it came from.

    Attributes:
        name: For people: a folder, perhaps one of several folds, or ``shipped synthetic/...``.
        bundle: The network.
    """

    name: str
    bundle: SizingBundle


def find_bundle(place: Place, weights: str | None) -> NamedBundle:
    """Return the network of ``weights``, or of the run folder, or the shipped one, in this order.

    Of a run with several folds it is that of the lowest, and its name says so: networks of several
    folds have no common intervals.

    Args:
        place: Run folder and configuration.
        weights: A folder of weights.

    Raises:
        GatesError: There is none, or it is damaged.
    """
    if weights is not None:
        return NamedBundle(weights, load_bundle(weights))
    folder, name = place.run_folder.path / WEIGHTS, Training().name
    folds = sorted(folder.glob(FOLDS), key=lambda path: int(path.name.split("-")[1][1:]))
    for own in (folder / name, *folds):
        if own.is_dir():
            others = f" (one of {len(folds)} folds; --weights takes another)"
            said = others if own in folds and len(folds) > 1 else ""
            return NamedBundle(f"{own}{said}", load_bundle(own))
    shipped = _shipped() / place.config / name
    if shipped.is_dir():
        return NamedBundle(f"shipped {place.config}/{name}", load_bundle(shipped))
    raise GatesError(
        f"there are no weights in {folder} and none are shipped for the configuration "
        f"{place.config!r}: train them with `gates endoscopy fit --config {place.config}`, or "
        "give --weights"
    )


def find_segmenter(path: str | None = None) -> Segmenter:
    """Return the segmenter of a file, or the shipped one.

    Raises:
        GatesError: There is none, or it is damaged.
    """
    file = _shipped() / SEGMENTER if path is None else Path(path)
    if path is None and not file.is_file():
        raise GatesError(
            "no segmenter is shipped: say where the polyps are with --boxes or --masks"
        )
    return load_segmenter(file)


def _shipped() -> Path:
    return Path(str(files("endoscopy"))) / WEIGHTS
