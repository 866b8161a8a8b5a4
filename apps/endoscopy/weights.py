"""Which trained network a verb uses: the one named, that of the run, or the shipped one."""

from __future__ import annotations

from typing import NamedTuple

from apps.endoscopy.training import WEIGHTS
from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle, load_bundle
from endoscopy.bundles.form import shipped_folder
from endoscopy.segmentation.segmenter import Segmenter, load_segmenter, shipped_segmenter
from endoscopy.training.variants import CONFIGURED
from harness.command.verbs import Place

NAME, FOLDS = f"{CONFIGURED}-s0", f"{CONFIGURED}-f[0-9]*-s0"


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

    Of a run with several folds it is that of the lowest, and its name states it: networks of
    several folds have no common intervals.

    Args:
        place: Run folder and configuration.
        weights: A folder of weights.

    Raises:
        GatesError: There is none, or it is damaged.
    """
    if weights is not None:
        return NamedBundle(weights, load_bundle(weights))
    folder = place.run_folder.path / WEIGHTS
    folds = sorted(folder.glob(FOLDS), key=lambda path: int(path.name.split("-")[1][1:]))
    for own in (folder / NAME, *folds):
        if own.is_dir():
            others = f" (one of {len(folds)} folds; --weights takes another)"
            said = others if own in folds and len(folds) > 1 else ""
            return NamedBundle(f"{own}{said}", load_bundle(own))
    shipped = shipped_folder(place.config, NAME)
    if shipped.is_dir():
        return NamedBundle(f"shipped {place.config}/{NAME}", load_bundle(shipped))
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
    segmenter = shipped_segmenter() if path is None else load_segmenter(path)
    if segmenter is None:
        raise GatesError("no segmenter is shipped: give the polyps with --boxes or --masks")
    return segmenter
