"""Labeled texts of a folder: TSV with or without names of columns, JSON lines, folders of GLUE."""

import csv
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core_gates.errors import GatesError
from harness.files import short_digest
from harness.files.texts import read_utf8

Part = Literal["train", "validation", "test"]
PARTS: Mapping[str, Part] = {
    "train": "train",
    **dict.fromkeys(("dev", "val", "valid", "validation"), "validation"),
    **dict.fromkeys(("dev_matched", "validation_matched"), "validation"),
    **dict.fromkeys(("test", "test_matched"), "test"),
}  # type: ignore[assignment]
"""Parts of the names of files, between dots, and what their rows are for."""

TABLES, LINES, LABEL_FIRST = (".tsv",), (".jsonl", ".ndjson"), (".txt", *(f".{n}" for n in PARTS))
"""Ends of the names of files: tables, JSON lines, and lines of a label and a text."""

TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
"""Names of columns of texts, in small letters; the first that a file has are taken."""

LABELS = ("label", "gold_label", "is_duplicate", "score", "similarity", "quality")
BY_POSITION = {
    2: ("text", "label"),
    3: ("text1", "text2", "label"),
    4: ("source", "label", "mark", "text"),  # CoLA
}
"""Names of the columns of a table that has none, by their number."""

QUOTED = re.compile(r'(?:^|(?<=\t))"(?:[^"]|"")*"(?=\t|\r?\n|$)')
"""A field of a table in quotes, those of its text doubled."""

COMMA = re.compile(r"[-+]?\d+,\d+")

HIDDEN = {None, "-1"}
"""What stands for labels that are not given."""

Fields = tuple[str, list[str], list[Any]]
"""File and line of a row, the names of its columns in small letters, and its values."""


class Row(NamedTuple):
    """Texts with a label.

    Attributes:
        texts: One text or two.
        label: A class or a number as it is written, whole ones without a fraction; None where there
            is none.
        place: File and line.
    """

    texts: tuple[str, ...]
    label: str | None
    place: str


class LabeledTexts(NamedTuple):
    """What an adapter is trained and scored on.

    Attributes:
        name: Of the folder.
        train: Rows with labels.
        held_out: Rows with labels: those for the test, or else for validation.
        classes: Classes in the order of their numbers; empty where labels are numbers.
        unlabeled: Name of the file for the test if it has no labels, else empty.
        unused: Names of other files of the folder, from which nothing is taken.
    """

    name: str
    train: Sequence[Row]
    held_out: Sequence[Row]
    classes: tuple[str, ...]
    unlabeled: str = ""
    unused: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Short hash of all rows in their order."""
        return short_digest([[[*row.texts, row.label] for row in part] for part in self[1:3]])

    @property
    def outputs(self) -> int:
        """Numbers that a model returns for a row."""
        return len(self.classes) or 1

    def targets(self, rows: Sequence[Row]) -> list[float]:
        """Return the number of the class of each row, or the number itself."""
        if not self.classes:
            return [float(row.label or "nan") for row in rows]
        numbers = {label: number for number, label in enumerate(self.classes)}
        return [float(numbers[row.label or ""]) for row in rows]

    def remarks(self) -> list[str]:
        """Return remarks on suspicious rows, a line each."""
        trained = {row.texts for row in self.train}
        empty = sum("" in row.texts for row in (*self.train, *self.held_out))
        seen = sum(row.texts in trained for row in self.held_out)
        odd = {"rows have an empty text": empty, "held-out rows occur in training": seen}
        lines = [f"{self.unlabeled} has no labels: others are held out"] if self.unlabeled else []
        more = f" and {len(self.unused) - 20} more" * (len(self.unused) > 20)
        lines += [f"not used: {', '.join(self.unused[:20])}{more}"] if self.unused else []
        return lines + [f"{number:,} {what}" for what, number in odd.items() if number]


def read_folder(folder: str | Path, columns: Sequence[str] = ()) -> LabeledTexts:
    """Read the rows of a folder.

    It holds a file for training and one for validation or the test, such as ``train.tsv`` and
    ``dev.tsv``, ``train.jsonl`` and ``val.jsonl``, or ``x.train`` and ``x.test``. Those for the
    test are held out if they have labels, else those for validation.

    Args:
        folder: The folder.
        columns: Names of one or two columns of texts and of that of labels; those of GLUE and
            SuperGLUE are known.

    Raises:
        GatesError: A file is missing, twice there or unreadable, has no such columns, a line with
            another number of them or one that is not JSON; or see `labeled`.
    """
    folder = Path(folder)
    paths: dict[Part, Path] = {}
    if not folder.is_dir():
        raise GatesError(f"{folder} is not a folder: give one with train.tsv and dev.tsv")
    for path in sorted(folder.iterdir()):
        ends = path.name.lower().split(".")
        part = next((PARTS[word] for word in ends if word in PARTS), None)
        if part is None or f".{ends[-1]}" not in (*TABLES, *LINES, *LABEL_FIRST):
            continue
        if part in paths:
            raise GatesError(f"{paths[part]} and {path} are both for {part}: remove one of them")
        paths[part] = path
    if "train" not in paths or len(paths) < 2:
        raise GatesError(
            f"{folder} holds {', '.join(p.name for p in paths.values()) or 'no data'}: give files"
            " for training and validation or test, such as train.tsv and dev.tsv or .jsonl"
        )
    parts = {part: read_rows(path, columns) for part, path in paths.items()}
    hidden = HIDDEN - {row.label for row in parts["train"]}
    given = {p: rows for p, rows in parts.items() if {row.label for row in rows} - hidden}
    held_out = given.get("test", given.get("validation", []))
    texts = labeled(folder.resolve().name, parts["train"], held_out)
    unlabeled = "" if "test" in given else paths.get("test", Path()).name
    used = {paths["train"].name, paths["test" if "test" in given else "validation"].name, unlabeled}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    unused = tuple(name for name in names if name not in used and not name.startswith("."))
    return texts._replace(unlabeled=unlabeled, unused=unused)


def labeled(name: str, train: Sequence[Row], held_out: Sequence[Row]) -> LabeledTexts:
    """Return checked rows; labels that are numbers, one of them not whole, are predicted as such.

    Raises:
        GatesError: There is no row or no label, one has a decimal comma, rows have one and two
            texts, training rows have a single class, or a held-out label is unknown.
    """
    for what, rows in (("training", train), ("held-out", held_out)):
        if not rows:
            raise GatesError(f"{name} has no {what} rows with labels: give some")
    for row in (*train, *held_out):
        if not row.label:
            raise GatesError(f"{row.place} has no label: give one to every row, or name its column")
        if COMMA.fullmatch(row.label):
            raise GatesError(
                f"{row.place} has the label {row.label!r}, a number with a decimal comma: write it"
                " with a point"
            )
        if len(row.texts) != len(train[0].texts):
            raise GatesError(
                f"{row.place} has {len(row.texts)} texts, {train[0].place} {len(train[0].texts)}:"
                " give every row the same number"
            )
    classes = sorted({str(row.label) for row in train})
    if any(_number(label) % 1 > 0 for label in classes):
        classes = []
    if len(classes) == 1:
        raise GatesError(f"all training rows of {name} have the label {classes[0]!r}: give two")
    for row in (*train, *held_out):
        if row.label not in classes if classes else not math.isfinite(_number(row.label)):
            expected = ", ".join(classes[:20]) or "a number"
            raise GatesError(f"{row.place} has the label {row.label!r}, expected {expected}")
    return LabeledTexts(name, train, held_out, tuple(classes))


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Read the rows of a file.

    Raises:
        GatesError: See `read_folder`.
    """
    wanted = [name.lower() for name in columns]
    if len(wanted) == 1 or len(wanted) > 3:
        raise GatesError(
            f"--columns names {', '.join(columns)}, expected one or two of texts and that of labels"
        )
    suffix = path.suffix.lower()
    reader = _tables if suffix in TABLES else _json_lines if suffix in LINES else _labels
    return [_row(*fields, wanted) for fields in reader(path, wanted)]


def texts_of_file(path: Path, columns: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Return the texts of a file: those of a table or of JSON lines, else of every line.

    Raises:
        GatesError: There is none, or see `read_rows`.
    """
    if path.suffix.lower() in (*TABLES, *LINES):
        texts = [row.texts for row in read_rows(path, columns)]
    else:
        texts = [(line.strip(),) for _, line in _lines(path)]
    if not texts:
        raise GatesError(f"{path} holds no text: give some lines")
    return texts


def _lines(path: Path, *, blank: bool = False) -> list[tuple[int, str]]:
    """Return number and text of the lines of a file, without those that are blank.

    Raises:
        GatesError: It cannot be read, or is not in UTF-8.
    """
    lines = read_utf8(path).split("\n")
    return [(n, line) for n, line in enumerate(lines, 1) if blank or line.strip()]


def _cells(path: Path) -> list[tuple[int, list[str]]]:
    """Return last line and cells of the rows of a table, quoted as ``csv`` writes them or not.

    Where a quote opens a field and does not end it, as in GLUE, all quotes are part of the text. A
    file with quotes of both kinds warns.
    """
    plain = [(number, line.rstrip("\r").split("\t")) for number, line in _lines(path)]
    if not any('"' in cell for _, cells in plain for cell in cells):
        return plain
    raw = [f"{line}\n" for _, line in _lines(path, blank=True)]
    reader = csv.reader(raw, delimiter="\t", strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if "".join(cells).strip()]
    except csv.Error:
        rows = plain
    if len(rows) != len(plain) and len({len(cells) for _, cells in plain}) == 1:
        rows = plain  # a quote opens a text, and would take the lines to the next one with it
    ends = pairwise([0, *(number for number, _ in rows)])
    records = {end: "".join(raw[start:end]) for start, end in ends}
    fields = next((number for number, record in records.items() if QUOTED.search(record)), 0)
    inside = next((n for n, record in records.items() if '"' in QUOTED.sub("", record)), 0)
    if fields and inside:
        how = "all quotes are read as text" if rows is plain else "it is read as csv reads it"
        warnings.warn(
            f"{path} has fields in quotes (line {fields}) and quotes in the text of others (line"
            f" {inside}): {how}; put all fields with a quote in quotes, or none",
            stacklevel=2,
        )
    return rows


def _tables(path: Path, wanted: Sequence[str]) -> Iterator[Fields]:
    """Yield the fields of the rows of a table, whose first line may name its columns."""
    rows = _cells(path)
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if wanted or len(header) not in BY_POSITION or _columns(header, wanted):
        rows = rows[1:]
    else:
        header = list(BY_POSITION[len(header)])
        _refuse_names(path, rows, header.index("label"))
    for number, cells in rows:
        yield f"{path}, line {number}", header, cells


def _refuse_names(path: Path, rows: Sequence[tuple[int, list[str]]], place: int) -> None:
    """Refuse a table whose first line has a label that no other one has, though these are few.

    Raises:
        GatesError: It looks like names of columns that are not known.
    """
    first, *others = (cells[place:][:1] for _, cells in rows)
    if first not in others and 0 < 2 * len({*map(tuple, others)}) <= len(others):
        raise GatesError(
            f"{path}, line {rows[0][0]} has a label that no other line has, {first[0].strip()!r}:"
            " name its columns by --columns, or put a line of names before it"
        )


def _json_lines(path: Path, _: Sequence[str]) -> Iterator[Fields]:
    """Yield the fields of the rows of a file with an object per line."""
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=tuple)  # keeps names that come twice
        except ValueError as error:
            raise GatesError(f"{place} is not JSON ({error}): repair or remove it") from error
        fields = value if isinstance(value, tuple) else ()
        yield place, [name.lower() for name, _ in fields], [field for _, field in fields]


def _labels(path: Path, _: Sequence[str]) -> Iterator[Fields]:
    """Yield the fields of the rows of a file with a label, a space and a text per line."""
    for number, line in _lines(path):
        yield f"{path}, line {number}", ["label", "text"], line.strip().split(" ", 1)


def _row(place: str, names: list[str], values: list[Any], wanted: Sequence[str]) -> Row:
    """Return the row of some fields.

    Raises:
        GatesError: They have other names, one twice, or another number, or a text is none.
    """
    named = _columns(names, wanted)
    if named is None:
        what = f"no columns {', '.join(wanted)}" if wanted else "no names of columns that are known"
        columns = ", ".join(names) or "none"
        raise GatesError(f"{place} has {what}, but {columns}: name them by --columns")
    if twice := [name for name in named if names.count(name) > 1]:
        raise GatesError(f"{place} has two columns {twice[0]!r}: rename one of them")
    if len(values) != len(names):
        raise GatesError(f"{place} has {len(values)} columns, expected {len(names)}")
    fields = dict(zip(names, values, strict=True))
    *texts, label = [fields.get(name) for name in named]
    if not all(isinstance(text, str) for text in texts):
        raise GatesError(f"{place} has no text in {' and '.join(named[:-1])}: write strings")
    text_of_label = "" if label is None else re.sub(r"^(-?\d+)\.0+$", r"\1", str(label).strip())
    given = text_of_label.lower() not in ("", "nan")
    return Row(tuple(str(text).strip() for text in texts), text_of_label if given else None, place)


def _columns(names: Sequence[str], wanted: Sequence[str]) -> list[str] | None:
    """Return the names of texts and label, the last of which may be missing from a file."""
    if wanted:
        return list(wanted) if set(wanted[:-1]) <= set(names) else None
    texts = next((fields for fields in TEXTS if set(fields) <= set(names)), None)
    if texts is None:
        return None
    return [*texts, next((label for label in LABELS if label in names), "label")]


def _number(label: str | None) -> float:
    try:
        return float(label or "nan")
    except ValueError:
        return math.nan
