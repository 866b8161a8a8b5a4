"""ListOps: trees of operators on digits, made at random, written, read and evaluated.

The task is that of Nangia and Bowman (2018, arXiv 1804.06028) in the form of the Long Range Arena
(Tay et al., 2021, arXiv 2011.04006): ``[MAX 2 9 [MIN 4 7 ] 0 ]`` is 9.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least
from harness.files import replacing
from harness.files.texts import read_utf8
from language.seqboat.sequences import SPLITS, Part, SequenceData, Split

OPERATORS: Mapping[str, Callable[[Sequence[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: median(values),
    "[SM": lambda values: sum(values) % 10,
}
CLOSE, DIGITS = "]", tuple("0123456789")
SYMBOLS = (*OPERATORS, CLOSE, *DIGITS)
NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS, 1)}  # 0 is padding
FILES: Mapping[Split, str] = {
    "train": "basic_train.tsv",
    "validation": "basic_val.tsv",
    "test": "basic_test.tsv",
}
HEADER = "Source\tTarget"
OPERATOR_RATE = 0.25  # of nodes above the last level
PIECE = 250  # trees that a process makes at once
DRAWS = 20_000  # that may fail one after the other


@dataclass(frozen=True)
class TreeSettings:
    """Which trees are made.

    A tree is an operator with 2 to ``max_args`` arguments, each of which is such a tree with
    probability .25, otherwise a digit. Trees of other lengths are drawn again.

    Attributes:
        min_length: Fewest tokens of a tree; closing brackets count.
        max_length: Most tokens.
        sizes: Trees for training, validation and test.
        max_args: Most arguments of an operator.
        max_depth: Most levels; the last one has digits alone.
        seed: Of the random numbers.

    Raises:
        ValueError: A number is too small, or the lengths are in the wrong order.
    """

    min_length: int
    max_length: int
    sizes: tuple[int, int, int]
    max_args: int = 10
    max_depth: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_at_least(4, min_length=self.min_length)  # an operator, two digits, a bracket
        check_at_least(2, max_args=self.max_args, max_depth=self.max_depth)
        check_at_least(0, seed=self.seed)
        check_at_least(1, **dict(zip(SPLITS, self.sizes, strict=True)))
        if self.max_length < self.min_length:
            raise ValueError(
                f"max_length must be at least min_length, {self.min_length}, got {self.max_length}"
            )


PRESETS: Mapping[str, TreeSettings] = {
    "tiny": TreeSettings(50, 200, (12_000, 1_000, 1_000)),
    "lra": TreeSettings(500, 2_000, (96_000, 2_000, 2_000)),
}


def median(values: Sequence[int]) -> int:
    """Return the median of integers; of an even number the mean of the middle two, rounded down."""
    ordered, last = sorted(values), len(values) - 1
    return (ordered[last // 2] + ordered[(last + 1) // 2]) // 2


def value_of(tokens: Sequence[str]) -> int:
    """Return the value of a tree, from 0 to 9.

    Raises:
        GatesError: The tokens are no tree.
    """
    levels: list[tuple[str, list[int]]] = [("", [])]
    for place, token in enumerate(tokens, 1):
        if token in OPERATORS:
            levels.append((token, []))
        elif token in DIGITS:
            levels[-1][1].append(int(token))
        elif token != CLOSE:
            raise GatesError(
                f"token {place} is {token!r}, expected a digit from 0 to 9, ] or an operator, "
                f"{', '.join(OPERATORS)}"
            )
        elif len(levels) == 1:
            raise GatesError(f"token {place} is a ], but no operator is open: the tree is cut off")
        else:
            operator, values = levels.pop()
            if not values:
                raise GatesError(f"the {operator} that ends at token {place} has no arguments")
            levels[-1][1].append(OPERATORS[operator](values))
    if len(levels) > 1:
        raise GatesError(f"{len(levels) - 1} operators are not closed by ]: the tree is cut off")
    if len(levels[0][1]) != 1:
        raise GatesError(f"{len(levels[0][1])} values in a line, expected one tree")
    return levels[0][1][0]


def draw_tree(settings: TreeSettings, draws: Random) -> list[str] | None:
    """Return the tokens of a random tree, or None if it gets another length."""
    drawn, operators = draws.random, tuple(OPERATORS)  # the same numbers in every Python
    tokens: list[str] = []
    missing: list[int] = []  # arguments that each open operator lacks
    length = 1  # once each of these is a digit
    while not tokens or missing:
        depth = len(missing) + 1
        if not tokens or (depth < settings.max_depth and drawn() < OPERATOR_RATE):
            tokens.append(operators[int(drawn() * len(operators))])
            missing.append(2 + int(drawn() * (settings.max_args - 1)))
            length += 1 + missing[-1]
            if length > settings.max_length:
                return None
            continue
        tokens.append(DIGITS[int(drawn() * 10)])
        missing[-1] -= 1
        while missing and not missing[-1]:
            tokens.append(CLOSE)
            missing.pop()
            if missing:
                missing[-1] -= 1
    return tokens if length >= settings.min_length else None


def draw_rows(
    settings: TreeSettings, number: int, tick: Callable[[], None] = lambda: None
) -> list[str]:
    """Return trees with their values, as rows of a file.

    Args:
        settings: Which trees.
        number: Which piece of them.
        tick: Called after each tree.

    Raises:
        GatesError: No tree has such a length, or hardly any.
    """
    draws = Random(f"{settings.seed} {number}")
    rows: list[str] = []
    while len(rows) < PIECE:
        trees = (draw_tree(settings, draws) for _ in range(DRAWS))
        tokens = next(filter(None, trees), None)
        if tokens is None:
            raise GatesError(
                f"none of {DRAWS:,} random trees has {settings.min_length} to "
                f"{settings.max_length} tokens, with at most {settings.max_args} arguments and "
                f"{settings.max_depth} levels: choose other lengths, or raise max_args or max_depth"
            )
        rows.append(f"{' '.join(tokens)}\t{value_of(tokens)}")
        tick()
    return rows


Run = Callable[[Callable[..., list[str]], Iterable[tuple[Any, ...]]], Iterable[list[str]]]


def draw_splits(settings: TreeSettings, run: Run) -> dict[Split, list[str]]:
    """Return the rows of every split; no tree is in two of them, none twice in one.

    Args:
        settings: Which trees.
        run: Returns ``work(*call)`` of each call, in their order, from however many processes.

    Raises:
        GatesError: No tree has such a length, or there are too few of them.
    """
    total, made, pieces = sum(settings.sizes), dict[str, None](), 0
    while len(made) < total:
        before, first = len(made), pieces
        pieces += -(-(total - before) // PIECE)
        calls = [(settings, number) for number in range(first, pieces)]
        made.update(dict.fromkeys(itertools.chain.from_iterable(run(draw_rows, calls))))
        if len(made) == before:
            raise GatesError(
                f"{pieces * PIECE:,} random trees of {settings.min_length} to "
                f"{settings.max_length} tokens are {before:,} different ones, expected {total:,}: "
                "choose longer trees, or fewer of them"
            )
    rows = iter(made)
    sizes = zip(SPLITS, settings.sizes, strict=True)
    return {split: list(itertools.islice(rows, size)) for split, size in sizes}


def write_splits(folder: Path, splits: Mapping[Split, Sequence[str]]) -> None:
    """Write the files of a data set, as the Long Range Arena names them; all or none."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        for split, rows in splits.items():
            text = "".join(f"{row}\n" for row in (HEADER, *rows))
            (temporary / FILES[split]).write_bytes(text.encode())


class Line(NamedTuple):
    """A sequence in a file, and its label.

    Attributes:
        place: File and line.
        source: The sequence.
        target: The label.
    """

    place: str
    source: str
    target: str


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file, however they end.

    Raises:
        GatesError: It cannot be read, or is not UTF-8.
    """
    lines = [line.removesuffix("\r") for line in read_utf8(path).split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def read_tsv(path: Path) -> list[Line]:
    """Return the rows of a file of the Long Range Arena.

    Raises:
        GatesError: It cannot be read, or has another header or other columns.
    """
    header, *rows = lines_of(path) or [""]
    if header != HEADER:
        raise GatesError(
            f"{path}, line 1: it is {header[:40]!r}, expected {HEADER!r}: give a file with two "
            "columns of these names, with a tab between them"
        )
    lines = [Line(f"{path}, line {n}", *row.partition("\t")[::2]) for n, row in enumerate(rows, 2)]
    for line in lines:
        if not line.target or "\t" in line.target:
            raise GatesError(f"{line.place}: expected a tree, a tab and its value")
    return lines


def trees_of(lines: Sequence[Line]) -> Part:
    """Return trees as symbols, parentheses left out.

    Raises:
        GatesError: A line has no tree, parentheses that do not match, or another value than its
            label.
    """
    inputs, labels = [], []
    for line in lines:
        characters = np.frombuffer(line.source.encode(), np.uint8)
        depth = ((characters == ord("(")).astype(int) - (characters == ord(")"))).cumsum()
        if depth.min(initial=0) < 0 or depth[-1:].any():
            raise GatesError(
                f"{line.place}: parentheses do not match: get the file again, or leave all out"
            )
        tokens = line.source.replace("(", " ").replace(")", " ").split()
        try:
            labels.append(value_of(tokens))
        except GatesError as error:
            raise GatesError(f"{line.place}: {error}") from error
        if line.target.strip() != str(labels[-1]):
            raise GatesError(
                f"{line.place}: the tree gives {labels[-1]}, but its label is {line.target!r}: "
                "get the file again"
            )
        inputs.append(np.array([NUMBERS[token] for token in tokens], dtype=np.int8))
    return Part(inputs, np.array(labels, dtype=np.int64), [line.place for line in lines])


class ListOpsData(SequenceData):
    """Trees of ListOps; the class of a tree is its value.

    Args:
        folder: Of the files ``basic_train.tsv``, ``basic_val.tsv`` and ``basic_test.tsv``, see
            `draw_splits` and `write_splits`.
        batch_size: Trees of a step over all ranks.
        seed: Of the order.

    Raises:
        ValueError: The size is below 1, or the seed is negative.
    """

    classes, symbols = DIGITS, 1 + len(SYMBOLS)

    def __init__(self, folder: str, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__(batch_size, seed)
        self.folder = Path(folder)

    def read(self) -> Mapping[Split, Part]:
        """Read the files."""
        if not (self.folder / FILES["train"]).is_file():
            raise GatesError(
                f"{self.folder} has no {FILES['train']}: make it by gates language prepare "
                "--config listops_tiny, or name another --data.init_args.folder"
            )
        return {split: trees_of(read_tsv(self.folder / name)) for split, name in FILES.items()}


def majority(train: Part, test: Part) -> NDArray[np.float64]:
    """Return 1 where the most frequent training label is right, else 0 (N,)."""
    return (test.labels == np.bincount(train.labels).argmax()).astype(np.float64)


def root_on_digits(test: Part) -> NDArray[np.float64]:
    """Return 1 where the operator at the root of the digits right below it alone is right (N,)."""
    right = []
    for x, label in zip(test.inputs, test.labels, strict=True):
        symbols = [SYMBOLS[number - 1] for number in x]
        levels = np.cumsum([(s in OPERATORS) - (s == CLOSE) for s in symbols])
        digits = [int(s) for s, n in zip(symbols, levels, strict=True) if n == 1 and s in DIGITS]
        right.append(bool(digits) and OPERATORS[symbols[0]](digits) == label)
    return np.array(right, dtype=np.float64)


def majority_by_root(train: Part, test: Part) -> NDArray[np.float64]:
    """Return 1 where the most frequent label of training trees with this root is right (N,)."""
    counts = np.zeros((1 + len(SYMBOLS), len(DIGITS)))
    np.add.at(counts, ([x[0] for x in train.inputs], train.labels), 1)
    guesses = counts.argmax(1)[[x[0] for x in test.inputs]]
    return (test.labels == guesses).astype(np.float64)
