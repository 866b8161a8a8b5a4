"""Files of the Long Range Arena: a sequence a line, with the labels in a second file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_option, check_positive
from language.seqboat.listops import DIGITS, FILES, SYMBOLS, Line, lines_of, read_tsv, trees_of
from language.seqboat.sequences import SPLITS, Part, SequenceData, Split

Kind = Literal["trees", "symbols", "bytes", "pixels"]
STEMS: Mapping[Split, str] = {"train": "train", "validation": "valid", "test": "test"}


class LraData(SequenceData):
    """Sequences of a folder with ``train.src``, ``train.label``, ``valid.src`` and so on.

    Args:
        folder: Of these files; or, of trees, of ``basic_train.tsv``, ``basic_val.tsv`` and
            ``basic_test.tsv``.
        kind: What a line has: ``trees`` of ListOps, whose labels are checked; ``symbols`` between
            spaces, of which the training part has all; ``bytes``; or ``pixels``, numbers from 0 to
            255 between spaces.
        mean: Of pixels from 0 to 1, which becomes 0.
        std: Their standard deviation, which becomes 1.
        batch_size: Sequences of a step over all ranks.
        seed: Of the order.

    Raises:
        ValueError: A number is out of range, or the kind is unknown.
    """

    def __init__(
        self,
        folder: str,
        kind: Kind,
        mean: float = 0.5,
        std: float = 0.5,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        check_option("kind", kind, get_args(Kind))
        check_positive(std=std)
        self.folder, self.kind, self.mean, self.std = Path(folder), kind, mean, std

    def read(self) -> Mapping[Split, Part]:
        """Read the files."""
        lines = {split: self._lines(split) for split in SPLITS}
        if self.kind == "trees":
            self.classes, self.symbols = DIGITS, 1 + len(SYMBOLS)
            return {split: trees_of(some) for split, some in lines.items()}
        self.classes = sorted({line.target for line in lines["train"]}, key=lambda c: (len(c), c))
        labels = {name: number for number, name in enumerate(self.classes)}
        read = lines["train"] if self.kind == "symbols" else []
        words = {word for line in read for word in line.source.split()}
        numbers = {word: number for number, word in enumerate(sorted(words), 1)}
        self.symbols = {"symbols": 1 + len(words), "bytes": 257}.get(self.kind, 0)
        return {
            split: Part(
                [self._sequence(line, numbers) for line in some],
                np.array([_number(line, line.target, labels, "label") for line in some], np.int64),
                [line.place for line in some],
            )
            for split, some in lines.items()
        }

    def _lines(self, split: Split) -> Sequence[Line]:
        """Return the lines of a split with their labels."""
        if self.kind == "trees" and (self.folder / FILES[split]).is_file():
            return read_tsv(self.folder / FILES[split])
        path = self.folder / f"{STEMS[split]}.src"
        targets, sources = lines_of(path.with_suffix(".label")), lines_of(path)
        if len(targets) != len(sources):
            raise GatesError(
                f"{path.with_suffix('.label')} has {len(targets)} lines, but {path.name} "
                f"{len(sources)}: give one label for each line"
            )
        lines = [
            Line(f"{path}, line {number}", source, target.strip())
            for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1)
        ]
        for line in lines:
            if not line.source.strip() or not line.target:
                what = "label" if line.source.strip() else "sequence"
                raise GatesError(f"{line.place} has no {what}: leave it out of both files")
        return lines

    def _sequence(self, line: Line, numbers: Mapping[str, int]) -> NDArray[Any]:
        """Return symbols or bytes from 1, or pixels about 0."""
        if self.kind == "bytes":
            return np.frombuffer(line.source.encode(), np.uint8).astype(np.int16) + np.int16(1)
        words = line.source.split()
        if self.kind == "symbols":
            return np.array([_number(line, word, numbers, "symbol") for word in words], np.int32)
        pixels = [int(word) if word.isdecimal() else -1 for word in words]
        for word, pixel in zip(words, pixels, strict=True):
            if not 0 <= pixel <= 255:
                raise GatesError(f"{line.place}: {word!r} is no pixel, a number from 0 to 255")
        return ((np.array(pixels) / 255 - self.mean) / self.std).astype(np.float32)


def _number(line: Line, word: str, numbers: Mapping[str, int], what: str) -> int:
    """Return the number of a label or symbol.

    Raises:
        GatesError: The training part has no such one.
    """
    if word not in numbers:
        raise GatesError(
            f"{line.place}: no training sequence has the {what} {word!r}: check the split"
        )
    return numbers[word]
