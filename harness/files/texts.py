"""Text files, all of which are in UTF-8."""

import csv
from pathlib import Path

from core_gates.errors import GatesError


def read_utf8(path: Path) -> str:
    """Return the text of a file without its byte order mark, line ends as they are.

    Raises:
        GatesError: It cannot be read, or a byte is zero or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if "\0" in text:  # of letters in UTF-16 without a mark
        raise not_utf8(path)
    return text


def check_cells(path: Path) -> None:
    """Check the cells of a CSV file with a header, of which readers would drop some silently.

    Raises:
        GatesError: Two columns have one name, a row has more cells than the header, or the file is
            not UTF-8 or CSV.
        OSError: It cannot be opened.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if twice := sorted({name for name in header if name and header.count(name) > 1}):
                raise GatesError(
                    f"{path}, line 1: it has two columns named {twice[0]!r}: give each column its"
                    " name"
                )
            for row in reader:
                if len(row) > len(header) > 1:
                    raise GatesError(
                        f"{path}, line {reader.line_num}: it has {len(row)} cells, expected"
                        f" {len(header)} as in the header: write numbers with a decimal point, and"
                        " no comma at the end"
                    )
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except csv.Error as error:
        raise GatesError(f"{path} cannot be read as CSV: {error}; save it again") from error


def unreadable(path: Path, error: OSError) -> GatesError:
    """Return the error of a file that cannot be opened."""
    return GatesError(f"{path} cannot be read: {error.strerror or error}; check the path")


def not_utf8(path: Path) -> GatesError:
    """Return the error of a file with other bytes than UTF-8, with the first line of them."""
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            try:
                content.decode()
                place = content.find(b"\0")
            except UnicodeDecodeError as error:
                place = error.start
            if place >= 0:
                other = "UTF-16" if b"\0" in content else "LATIN1"
                return GatesError(
                    f"{path}, line {line}: byte {place + 1} is not UTF-8: save the file in that"
                    f" encoding, as iconv -f {other} -t UTF-8 does"
                )
    return GatesError(f"{path} is not UTF-8: save it in that encoding")
