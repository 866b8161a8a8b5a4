"""Boxes that a program has at hand, such as those that a user draws."""

from collections.abc import Mapping, Sequence

from endoscopy.inputs.frame import SourceFrame
from endoscopy.inputs.locations import AnnotatedLocations, Annotation, Box, Lesion


class GivenBoxes(AnnotatedLocations):
    """Boxes by the position of their frame; frames without one are left aside.

    Args:
        boxes: Position of a frame in its source, from 0, to xmin, xmax, ymin, ymax of its lesions,
            in pixels of the frame.
    """

    def __init__(self, boxes: Mapping[int, Sequence[Box]]) -> None:
        super().__init__("given boxes", "boxes", [str(index) for index in boxes])
        self._boxes = boxes

    def annotation(self, name: str) -> Annotation:
        """Return the boxes of a frame."""
        return Annotation(tuple(Lesion(box) for box in self._boxes[int(name)]))

    def _name_of(self, frame: SourceFrame) -> str | None:
        return str(frame.index) if frame.index in self._boxes else None
