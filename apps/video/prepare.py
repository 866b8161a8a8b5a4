"""``gates video prepare``: a release of KuaiRand to shards; one's own table to a schema."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl

from apps.video.drafting import CONFIG, REPORT, Columns, draft
from core_gates.errors import GatesError
from harness.command.verbs import Place, refuse_existing, refuse_strangers
from harness.files import require_apart
from recsys.data.readers.files import files_of
from video_multitask.history import PREFIX, UserHistory, add_history
from video_multitask.kuairand.archives import download_release
from video_multitask.kuairand.folder import KuaiRand
from video_multitask.kuairand.prepare import prepare as write_release
from video_multitask.kuairand.releases import Part
from video_multitask.labels import add_labels
from video_multitask.leaks import check_causal
from video_multitask.sources.kuairand_stream import KuaiRandStream
from video_multitask.stream.parquet_stream import ParquetStream
from video_multitask.stream.shards import MANIFEST
from video_multitask.stream.stored import store

Archive = Literal["pure", "1k", "27k"]
Prepared = Literal["standard", "unbiased", "random_in", "none"]
NO_TABLE = Columns()
PAST = ("video_id",)
CHECKED = 5_000  # first rows, which are computed again with another future
MADE = (
    "has_duration", "complete", "replay", "skip", "comment_stay",
    "hour", "weekday", "video_age_days", "first_tag",
)  # fmt: skip
"""Columns that are made of others, whatever the log has under these names."""


def prepare(
    place: Place,
    sources: list[str],
    output: str | None = None,
    download: Archive | None = None,
    history: int = 0,
    means: tuple[str, ...] = (),
    split: Prepared = "standard",
    strict: bool = False,
    drop_invalid: bool = False,
    table: Columns = NO_TABLE,
    overwrite_output: bool = False,
) -> None:
    """Convert SOURCES, one release of KuaiRand or a log in its format, to Parquet shards.

    Rows are sorted by time, labelled and joined with the tables of users and videos; further
    columns of the log are kept. What training days teach, vocabularies and scales, is kept with
    them. With --table.labels, SOURCES is any
    table, Parquet or CSV: its schema is drafted and written as a configuration that trains,
    with a report of why each column became what it is, and which ones may leak.

    Args:
        place: Filled in by the command line.
        sources: Filled in by the command line.
        output: Folder that is written; the folder ``prepared`` of the run if null.
        download: Release that is downloaded to SOURCES first, 0.2, 4.3 or 46 GB unpacked; an
            interrupted download continues, and its checksum is verified.
        history: Newest videos of each user's past to add to a row.
        means: Outcomes whose mean over the user's past is added, such as is_click.
        split: Split whose training days teach vocabularies and scales; none to leave that to the
            training.
        strict: Refuse a release whose counts are not those published, instead of a warning.
        drop_invalid: Leave out rows with wrong values, instead of refusing the file.
        table: Columns of your table.
        overwrite_output: Replace the folder if it exists and holds an older output, nothing else.
    """
    if len(sources) > 1:
        raise GatesError(f"prepare takes one folder or table at a time, found {len(sources)}")
    source = Path(sources[0])
    folder = Path(output) if output else place.run_folder.path / "prepared"
    refuse_existing(folder, overwrite=overwrite_output)
    require_apart(folder, [source])
    if folder.is_file():
        raise GatesError(f"{folder} is a file and no folder: choose another --output")
    if table.labels:
        _draft(source, table, folder)
        return
    if download is not None:
        source = download_release(download, source, tell=print)
    data = _opened(source, drop_invalid=drop_invalid)
    require_apart(folder, data.files)
    refuse_strangers(folder, (MANIFEST, "*.parquet"))
    _print_counts(data, strict=strict)
    past = _past(data, history, means) if history or means else None
    shards = write_release(data, folder, history=past)
    print(f"{shards.rows:,} rows of {len({file.date for file in shards.files})} days")
    if split != "none":
        _learn(folder, split, history, means)
    print(folder)


def _draft(source: Path, table: Columns, folder: Path) -> None:
    """Draft the schema of a table into a folder that can be replaced."""
    require_apart(folder, files_of(source))
    refuse_strangers(folder, (CONFIG, REPORT))
    draft(source, table, folder)


def _opened(source: Path, *, drop_invalid: bool) -> KuaiRand:
    """Return a release of which all columns are kept, and print which ones are further ones."""
    data = KuaiRand(source, drop_invalid=drop_invalid)
    free, taken = data.further()
    data.keep = tuple(name for name in free if name not in MADE and not name.startswith(PREFIX))
    if data.keep:
        print(f"further columns of the log: {', '.join(data.keep)}")
    if lost := [*taken, *(name for name in free if name.startswith(PREFIX))]:
        print(f"left out, since another table has them or a log lacks them: {', '.join(lost)}")
    return data


def _print_counts(data: KuaiRand, *, strict: bool) -> None:
    """Print what a pass over the logs finds; counts of a release are those published."""
    logs: dict[str, tuple[Part, ...]] = {"standard": ("first", "second"), "random": ("random",)}
    for which, parts in logs.items():
        if not any(data.has(part) for part in parts):
            continue
        found = data.overview(which, strict=strict)
        users, videos, rows = found.counts
        print(
            f"{which}: {users:,} users, {videos:,} videos, {rows:,} rows; {found.repeated:,} "
            f"repeated, {found.unordered:,} out of order, {found.without_duration:,} without "
            "duration"
        )


def _past(data: KuaiRand, history: int, means: tuple[str, ...]) -> UserHistory:
    """Return what adds the past to rows; refuse it if it knows their present or future."""
    past = UserHistory(history, PAST, means)
    log = add_labels(next(data.log()).head(CHECKED)).sort("time_ms", maintain_order=True)

    def with_past(log: pl.DataFrame) -> pl.DataFrame:
        return add_history(log, history, PAST, means)

    if len(log):
        check_causal(with_past, log, past.names)
    return past


def _learn(folder: Path, split: str, history: int, means: tuple[str, ...]) -> None:
    """Keep what the training days of a split teach."""
    source = KuaiRandStream(str(folder), split, history, means=means)
    stream = source.stream(1024, "given", 0, None)
    assert isinstance(stream, ParquetStream)
    try:
        train = stream.parts["train"]
    except GatesError as error:
        raise GatesError(f"{error}; {folder} is complete, give --split none") from error
    dates = [file.date for file in train.files]
    store(train, stream.transform)
    sizes = stream.transform.sizes
    tables = "  ".join(f"{n} {sizes[n]:,}" for n in ("user_id", "video_id", "author_id"))
    print(f"rows of tables, from {train.rows:,} rows of {min(dates)} … {max(dates)}: {tables}")
