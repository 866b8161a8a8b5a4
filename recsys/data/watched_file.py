"""Blank lines of a text file, found while another reader takes its bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from core_gates.errors import GatesError


class WatchedFile(io.FileIO):
    """A file, read from its start to its end, that notes blank lines outside of quotes.

    Args:
        path: A text file, lines ending in LF or CRLF.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path, self._left, self._line = path, b"", 1
        self._quoted = self._followed = False
        self._blank = 0  # number of the first blank line

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, and look at their lines."""
        content = super().read(size) or b""
        if content:
            self._look(self._left + content)
        elif self._left:
            self._look(self._left + b"\n")
        return content

    def check(self) -> None:
        """Refuse what has been read so far if other lines follow a blank one.

        Raises:
            GatesError: They do; with the line.
        """
        if self._followed:
            raise blank_line(self._path, self._blank)

    def _look(self, content: bytes) -> None:
        letters = np.frombuffer(content, np.uint8)
        ends = np.flatnonzero(letters == ord("\n"))
        complete = int(ends[-1]) + 1 if len(ends) else 0
        quotes = np.flatnonzero(letters[:complete] == ord('"'))
        outside = (np.searchsorted(quotes, ends) + self._quoted) % 2 == 0
        lengths = np.diff(ends, prepend=-1) - 1
        returns = (letters[np.maximum(ends - 1, 0)] == ord("\r")) & (lengths == 1)
        blank = outside & ((lengths == 0) | returns)
        first = 0 if self._blank else int(blank.argmax()) if blank.any() else len(blank)
        if not self._blank and first < len(blank):
            self._blank = self._line + first
        self._followed |= not blank[first:].all()
        self._left, self._line = content[complete:], self._line + len(ends)
        self._quoted ^= len(quotes) % 2 == 1


def blank_line(path: Path, line: int) -> GatesError:
    """Return the error of a file with a blank line before others."""
    return GatesError(f"{path}, line {line}: it is blank, but not the last: delete it")
