"""``gates weather ingest``: observation files of any format to one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.files import require_free, sha256
from harness.runs.ticker import ticking
from weather.observations.ingest import Account, Ingested, files_in
from weather.observations.ingest import ingest as ingest_files
from weather.observations.period import Period
from weather.observations.table import table_format

HEADS = ("file", "format", "reports", "kept", "rejected")


def ingest(
    sources: list[str],
    start: str | None = None,
    end: str | None = None,
    output: str = "observations.parquet",
    overwrite_output: bool = False,
) -> None:
    """Read the observation files of SOURCES, folders or files, into one table for assimilate.

    METAR as Parquet or text, radiosondes as text, IGRA-2 or BUFR, stations and aircraft as BUFR,
    IODA NetCDF, and tables, mixed as they are: the content of each file decides. Values are
    converted to SI units, wind to components, dewpoint to specific humidity, height to
    geopotential; soundings must be hydrostatic. A file that cannot be read is named with the
    reason and stops nothing; where no value is left, nothing is written.

    Args:
        sources: Filled in by the command line.
        start: First time that is kept, such as 2017-01-02T09:00, UTC; all if null.
        end: Time from which on nothing is kept; all if null.
        output: Table that is written, as Parquet or CSV by its suffix.
        overwrite_output: Replace the table if it exists.
    """
    target = Path(output)
    require_free(target, overwrite=overwrite_output)
    table_format(target)
    period = Period.parse(start, end)
    files = files_in(map(Path, sources), leave_out=target)
    found = ingest_files(files, period, ticking)
    _print_accounts(found.files)
    found.table.frame.attrs["files"] = {
        name: {"sha256": sha256(one.path), "format": one.format, "kept": one.kept}
        for name, one in zip(_names(found.files), found.files, strict=True)
        if one.kept
    }
    written = found.table.write(target)
    print(_summary(found))
    print(written)


def _print_accounts(accounts: Sequence[Account]) -> None:
    """Print a row of numbers per file, then a line for each of which something is left out."""
    names = _names(accounts)
    rows = [HEADS] + [
        (name, one.format or "-", f"{one.reports:,}", f"{one.kept:,}", f"{one.rejected.total():,}")
        for name, one in zip(names, accounts, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*left, *right]))
    for name, one in zip(names, accounts, strict=True):
        if one.why:
            print(f"{name}: {'refused: ' if one.failed else ''}{one.why}")


def _names(accounts: Sequence[Account]) -> list[str]:
    """Return the names of files, with their folders where a name occurs twice."""
    times = Counter(one.path.name for one in accounts)
    return [one.path.name if times[one.path.name] == 1 else str(one.path) for one in accounts]


def _summary(found: Ingested) -> str:
    frame = found.table.frame
    used = sum(one.kept > 0 for one in found.files)
    failed = sum(one.failed for one in found.files)
    refused = f", {failed} refused" if failed else ""
    return (
        f"{len(frame):,} values of {frame['station'].nunique()} stations, "
        f"{frame['time'].min():%Y-%m-%dT%H:%M} to {frame['time'].max():%Y-%m-%dT%H:%M}, "
        f"from {used} of {len(found.files)} files{refused}"
    )
