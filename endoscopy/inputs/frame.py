"""One frame of an input, and counts of all of them."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from core_gates.errors import GatesError


@dataclass(frozen=True)
class SourceFrame:
    """A decoded frame.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        key: Stable name: the file name without its ending (with its folders below the source), the
            name of the video and the frame number, or the DICOM instance UID.
        index: Position in the source, from 0, counting unreadable frames too.
        number: Frame number in a video or a DICOM instance, from 0; 0 for single images.
    """

    image: np.ndarray
    key: str
    index: int
    number: int = 0


@dataclass
class InputReport:
    """Counts of a source, complete once all frames were read.

    Attributes:
        source: Name of the source, without patient data: the stem of its path, or a UID.
        kind: ``images``, ``video`` or ``dicom``.
        expected: Number of frames that the source states, if it does.
        read: Frames that were decoded.
        unreadable: (key, reason) of every frame that was skipped.
        converted: Number of frames by conversion, such as "16-bit to 8-bit".
    """

    source: str = ""
    kind: str = ""
    expected: int | None = None
    read: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)

    def skip(self, key: str, reason: str, max_unreadable: float) -> None:
        """Count a frame that cannot be read.

        Raises:
            GatesError: More than the fraction ``max_unreadable`` of the expected frames is skipped.
        """
        self.unreadable.append((key, reason))
        if self.expected is not None and len(self.unreadable) > max_unreadable * self.expected:
            self._refuse(self.expected, max_unreadable)

    def finish(self, max_unreadable: float) -> None:
        """Check the counts once all frames were read.

        Raises:
            GatesError: Nothing was read, or too many frames were skipped.
        """
        total = self.read + len(self.unreadable)
        if len(self.unreadable) > max_unreadable * total:
            self._refuse(total, max_unreadable)
        if not self.read:
            raise GatesError(f"{self.source}: holds no frame; name a source with at least one")

    def lines(self) -> list[str]:
        """Return what a reader should know, line by line."""
        lines = [f"{self.source}: {self.read} frames read ({self.kind})"]
        lines += [f"{count} frames: {name}" for name, count in sorted(self.converted.items())]
        lines += [f"skipped {key}: {reason}" for key, reason in self.unreadable]
        return lines

    def _refuse(self, total: int, max_unreadable: float) -> None:
        key, reason = self.unreadable[0]
        raise GatesError(
            f"{self.source}: {len(self.unreadable)} of {total} frames cannot be read, at most "
            f"{100 * max_unreadable:g} % may (first {key}: {reason}); repair or remove them, or "
            "raise max_unreadable"
        )
