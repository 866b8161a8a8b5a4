"""``gates video prepare`` and ``simulate``: shards of a log, a table's schema, simulated logs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml

from core_gates.errors import GatesError
from harness.command.verbs import Place, refuse_existing
from harness.files import refuse_strangers, replacing, require_apart, write_text
from harness.runs.terminal import working
from recsys.data.leaks import report
from recsys.data.readers.files import files_of
from recsys.data.readers.own_table import OwnTable
from recsys.infer import plain
from video_multitask.kuairand.folder import KuaiRand
from video_multitask.kuairand.prepare import prepare as write_release
from video_multitask.kuairand.releases import download_release
from video_multitask.leaks import checked_history
from video_multitask.simulator.log import export_kuairand
from video_multitask.simulator.log import simulate as simulate_feed
from video_multitask.stream.shards import MANIFEST

CONFIG, REPORT, TRUTH = "table.yaml", "report.md", "truth.parquet"
Archive = Literal["pure", "1k", "27k"]
Prepared = Literal["standard", "unbiased", "random_in", "none"]


@dataclasses.dataclass(frozen=True)
class Columns:
    """What you know of the columns of your table.

    Attributes:
        labels: Columns with 0 and 1 that are predicted, as click,buy, or each with its category,
            as {click: look, buy: act}, for which HoME has experts; next to them also numbers
            (more than 50, never 0, or not whole), whose logarithm is predicted.
        user: Column of the user.
        item: Column of what is ranked.
        time: Column that orders the rows.
        weight: Column of sample weights.
        drop: Columns that must not be features, such as what happens after the label.
        missing: Words in text that are null, such as NA, also wherever the model is used.
        dim: Features of an embedding.
    """

    labels: tuple[str, ...] | dict[str, str] = ()
    user: str = ""
    item: str = ""
    time: str = ""
    weight: str = ""
    drop: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    dim: int = 8


NO_TABLE = Columns()


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
    them. With --table.labels, SOURCES is any table, Parquet or CSV: its schema is drafted and
    written as a configuration that trains, with a report of what each column is and may leak.

    Args:
        place: Filled in by the command line.
        sources: Folder of a release of KuaiRand, or files of a log or of a table.
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
    source, named = Path(sources[0]), {"download": download, "history": history, "means": means}
    folder = Path(output) if output else place.run_folder.path / "prepared"
    refuse_existing(folder, overwrite=overwrite_output)
    require_apart(folder, [source])
    if folder.is_file():
        raise GatesError(f"{folder} is a file and no folder: choose another --output")
    if table != NO_TABLE:
        named |= {"strict": strict, "split": split != "standard", "drop_invalid": drop_invalid}
        _refuse_unread(named)
        _draft(source, table, folder)
        return
    if download is not None:
        source = download_release(download, source, notify=print)
    data = _opened(source, drop_invalid=drop_invalid)
    require_apart(folder, data.files)
    refuse_strangers(folder, (MANIFEST, "*.parquet"))
    _print_counts(data, strict=strict)
    past = checked_history(next(data.log()), history, means) if history or means else None
    shards = write_release(data, folder, history=past)
    print(f"{shards.rows:,} rows of {len({file.date for file in shards.files})} days")
    if split != "none":
        _learn(folder, split, history, means)
    print(folder)


def _refuse_unread(options: Mapping[str, object]) -> None:
    if unread := [name for name, value in options.items() if value]:
        raise GatesError(
            f"--{unread[0]} is for logs in KuaiRand's format, and not for a --table: leave it out"
        )


def _opened(source: Path, *, drop_invalid: bool) -> KuaiRand:
    """Return a release of which all columns are kept, and print which ones are further ones."""
    data = KuaiRand(source, drop_invalid=drop_invalid)
    kept, lost = data.keep_further()
    if kept:
        print(f"further columns of the log: {', '.join(kept)}")
    if lost:
        print(f"left out, since another table has them or a log lacks them: {', '.join(lost)}")
    return data


def _print_counts(data: KuaiRand, *, strict: bool) -> None:
    """Print what a pass over the logs finds; counts of a release are those published."""
    for which, overview in data.overviews(strict=strict):
        users, videos, rows = overview.counts
        print(
            f"{which}: {users:,} users, {videos:,} videos, {rows:,} rows; {overview.repeated:,} "
            f"repeated, {overview.unordered:,} out of order, {overview.without_duration:,} without "
            "duration"
        )


def _draft(source: Path, columns: Columns, folder: Path) -> None:
    """Write a configuration with the drafted schema of a table, and the report of its columns."""
    if not columns.labels:
        named = [n for n, value in dataclasses.asdict(columns).items() if value and n != "dim"]
        raise GatesError(
            f"--table.{(*named, 'dim')[0]} is of a table without labels: name them by "
            "--table.labels, as click,buy"
        )
    require_apart(folder, files_of(source))
    refuse_strangers(folder, (CONFIG, REPORT))
    try:
        table = OwnTable(str(source.absolute()), **dataclasses.asdict(columns))
    except ValueError as error:
        raise GatesError(f"--table is wrong: {error}") from error
    tables = table.read()
    init = {
        "path": table.path,
        "split": tables.notes[0].removeprefix("split by "),
        "missing": list(columns.missing),
        "schema": plain(tables.schema),
    }
    kind = "recsys.data.readers.own_table.OwnTable"
    source_of = {"class_path": kind, "init_args": init}
    content = {"model": {"intercepts": "validation"}, "data": {"source": source_of}}
    text = report(tables, [name for name in (columns.user, columns.item, columns.time) if name])
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        write_text(temporary / CONFIG, yaml.safe_dump(content, sort_keys=False))
        write_text(temporary / REPORT, text)
    print(text)
    words = f"--config table --config {folder / CONFIG} --name {folder.name}"
    print(f"train on it by: gates video fit {words}")
    print(f"compare networks and baselines on it by: gates video evaluate {words}")
    print(folder)


def _learn(folder: Path, split: str, history: int, means: tuple[str, ...]) -> None:
    """Keep what the training days of a split teach."""
    from video_multitask.sources.kuairand import KuaiRandStream  # waits for Lightning
    from video_multitask.stream.parquet_stream import ParquetStream

    source = KuaiRandStream(str(folder), split, history, means=means)
    stream = source.stream(1024, "given", 0, None)
    assert isinstance(stream, ParquetStream)
    try:
        train = stream.parts["train"]
    except GatesError as error:
        raise GatesError(f"{error}; {folder} is complete, give --split none") from error
    dates = [file.date for file in train.files]
    sizes = stream.keep_transform().sizes
    tables = "  ".join(f"{n} {sizes[n]:,}" for n in ("user_id", "video_id", "author_id"))
    print(f"rows of tables, from {train.rows:,} rows of {min(dates)} … {max(dates)}: {tables}")


def simulate(
    place: Place,
    rows: int = 200_000,
    users: int = 2_000,
    videos: int = 3_000,
    days: int = 14,
    seed: int = 0,
    groups: bool = False,
    heavy_counts: bool = False,
    output: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Write a simulated feed in KuaiRand's format, and the true probability of every label.

    Args:
        place: Filled in by the command line.
        rows: Rows of the log, spread evenly over the days.
        users: Number of users.
        videos: Number of videos.
        days: Days of the log, at most 31.
        seed: Seed of the world and of the log.
        groups: Let interactions depend on other fields than watching does.
        heavy_counts: Add four raw heavy-tailed counts to each row.
        output: Folder that is written; the folder ``simulated`` of the run if null.
        overwrite_output: Replace the folder if it exists and holds an older output, nothing else.
    """
    folder = Path(output) if output else place.run_folder.path / "simulated"
    refuse_existing(folder, overwrite=overwrite_output)
    refuse_strangers(folder, (TRUTH, "data"))
    try:
        with working(f"simulating {rows:,} rows"):
            feed = simulate_feed(
                rows, users, videos, days, seed, groups=groups, heavy_counts=heavy_counts
            )
    except ValueError as error:
        raise GatesError(str(error)) from error
    with working("writing files"), replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        export_kuairand(feed, temporary)
        truth = feed.truth_table()
        truth.write_parquet(temporary / TRUTH)
    rates = dict(zip(truth.columns, feed.truth.mean(0), strict=True))
    print(f"{len(feed.log):,} rows; mean true probabilities:")
    print("  " + "  ".join(f"{task} {rate:.3g}" for task, rate in rates.items()))
    print(folder)
