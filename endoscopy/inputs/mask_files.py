"""Lesions from mask images, one file for each frame."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from core_gates.errors import GatesError
from endoscopy.data.images import read_mask
from endoscopy.inputs.image_files import ImageFiles, stem
from endoscopy.inputs.locations import AnnotatedLocations, Annotation, Box, Lesion

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MIN_AREA = 16  # pixels; smaller parts are noise, unless nothing else was drawn


class MaskLocations(AnnotatedLocations):
    """Lesions from masks named like their frames; every connected part is a lesion.

    Parts below 16 pixels are left out if there is a larger one: a distant polyp on a small frame
    may have no more pixels.

    A pixel belongs to a lesion if it is above the middle of the range, or, in a file without
    values above 1, if it is 1.

    Args:
        path: Folder of PNG files, searched to any depth; JPEG works too.

    Raises:
        GatesError: It holds no mask. Files that cannot be read are counted, and their frames have
            no location.
    """

    def __init__(self, path: str | Path) -> None:
        files = ImageFiles(path, ENDINGS)
        if not files.names or not Path(path).is_dir():
            raise GatesError(
                f"{path}: holds no mask; name a folder of .png files named like frames"
            )
        self._files = {stem(name): Path(path) / name for name in files.names}
        super().__init__(str(path), "masks", list(self._files))

    def annotation(self, name: str) -> Annotation:
        """Read the mask of a frame."""
        self.report.files += 1
        try:
            mask = read_mask(self._files[name]) > 0
        except GatesError as error:
            return self.unreadable(self._files[name], error)
        return Annotation(
            tuple(lesions_of(mask, keep_largest=True)), (mask.shape[1], mask.shape[0])
        )


def lesions_of(mask: np.ndarray, *, keep_largest: bool = False) -> list[Lesion]:
    """Return the connected parts (8 neighbors) of at least 16 pixels, the largest first.

    Args:
        mask: Boolean (H, W).
        keep_largest: Keep the largest parts however small they are.
    """
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    least = min(MIN_AREA, areas.max(initial=0)) if keep_largest else MIN_AREA
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= least]
    slices = ndimage.find_objects(labels)
    return [Lesion(_box(slices[i]), mask=labels == i + 1) for i in order]


def _box(part: tuple[slice, slice]) -> Box:
    rows, columns = part
    return float(columns.start), float(columns.stop), float(rows.start), float(rows.stop)
