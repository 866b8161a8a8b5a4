"""Boxes from a folder of Pascal VOC files, one for each frame."""

import math
from pathlib import Path

from core_gates.errors import GatesError
from endoscopy.data.readers.voc import read_voc
from endoscopy.inputs.locations import AnnotatedLocations, Annotation, Lesion


class VocLocations(AnnotatedLocations):
    """Boxes from Pascal VOC files named like their frames.

    Args:
        path: Folder, searched to any depth.

    Raises:
        GatesError: The folder holds no XML file. Files that are not annotations are counted,
            and their frames have no location.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        files = folder.rglob("*.xml")
        self._files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
        if not self._files:
            raise GatesError(f"{path}: holds no .xml file; expected Pascal VOC annotations")
        super().__init__(str(path), "boxes", list(self._files))

    def annotation(self, name: str) -> Annotation:
        """Read the file of a frame."""
        self.report.files += 1
        try:
            content = read_voc(self._files[name])
        except GatesError as error:
            return self.unreadable(self._files[name], error)
        stated = math.isfinite(content.width) and math.isfinite(content.height)
        stated = stated and content.width > 0 and content.height > 0
        size = (round(content.width), round(content.height)) if stated else None
        return Annotation(tuple(Lesion(item.box, item.unique_id) for item in content.objects), size)
