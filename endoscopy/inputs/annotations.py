"""Annotated locations, whatever their files are."""

from pathlib import Path

from core_gates.errors import GatesError
from endoscopy.inputs.boxes_csv import CsvLocations
from endoscopy.inputs.locations import AnnotatedLocations
from endoscopy.inputs.mask_files import MaskLocations
from endoscopy.inputs.voc_folder import VocLocations


def annotated_locations(
    boxes: str | Path | None = None, masks: str | Path | None = None
) -> AnnotatedLocations | None:
    """Return the locations that a user gives, None if there are none.

    Args:
        boxes: A CSV file, or a folder of Pascal VOC files.
        masks: A folder of mask images, or of Pascal VOC files.

    Raises:
        GatesError: Both are given, or they cannot be read.
    """
    if boxes is not None and masks is not None:
        raise GatesError(f"found boxes {boxes} and masks {masks}, expected one of them; drop one")
    given = Path(boxes or masks or "")
    if boxes is None and masks is None:
        return None
    if not given.exists():
        raise GatesError(f"{given}: does not exist; check the path")
    if boxes is not None and given.is_file():
        return CsvLocations(given)
    if boxes is not None or (given.is_dir() and next(given.rglob("*.xml"), None) is not None):
        return VocLocations(given)
    return MaskLocations(given)
