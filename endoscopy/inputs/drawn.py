"""Boxes drawn by hand, frame by frame."""

from collections.abc import Mapping

from endoscopy.inputs.locations import AnnotatedLocations, Annotation, Box, Lesion


class DrawnLocations(AnnotatedLocations):
    """One lesion on some frames.

    Args:
        boxes: Key of the frame to xmin, xmax, ymin, ymax in its pixels.
    """

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__("drawn boxes", "boxes", list(boxes))
        self.boxes = dict(boxes)

    def annotation(self, name: str) -> Annotation:
        """Return the box of a frame."""
        return Annotation((Lesion(self.boxes[name]),))
