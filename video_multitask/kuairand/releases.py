"""What was published of KuaiRand: files, their names, counts, and archives to download."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from core_gates.errors import GatesError, check_option
from harness.files.digest import RemoteFile
from harness.files.download import download_and_unpack

Part = Literal["first", "second", "random"]

URL = "https://zenodo.org/records/10439422/files"
LOGS: Mapping[Part, str] = {
    "first": "log_standard_4_08_to_4_21",
    "second": "log_standard_4_22_to_5_08",
    "random": "log_random_4_22_to_5_08",
}
SIDES = ("user_features", "video_features_basic", "video_features_statistic")
_NAME = re.compile(
    rf"(?P<table>{'|'.join([*LOGS.values(), *SIDES])})_(?P<release>\w+?)(_part(?P<part>\d+))?"
    r"\.(csv|parquet)"
)


class Count(NamedTuple):
    """Distinct users, distinct videos and rows of a log."""

    users: int
    videos: int
    rows: int


class Release(NamedTuple):
    """A version of KuaiRand.

    Attributes:
        archive: Name on Zenodo, record 10439422.
        md5: Published checksum of the archive.
        unpacked: Bytes of its files.
        standard: Counts of the two logs of recommended videos together.
        random: Counts of the log of random videos.
        parts: Number of files of each log of recommended videos.
    """

    archive: str
    md5: str
    unpacked: int
    standard: Count
    random: Count
    parts: int = 1

    def remote(self, url: str = URL) -> RemoteFile:
        """Return what is downloaded."""
        return RemoteFile(self.archive, f"{url}/{self.archive}", -1, "md5", self.md5)


RELEASES: Mapping[str, Release] = {
    "pure": Release(
        "KuaiRand-Pure.tar.gz",
        "0820331067a3784d9691136f772b35a7",
        194 * 10**6,
        Count(27_285, 7_551, 1_436_609),
        Count(27_285, 7_583, 1_186_059),
    ),
    "1k": Release(
        "KuaiRand-1K.tar.gz",
        "6b0b9c8222d67fcd4c676218edca3f1f",
        4_300 * 10**6,
        Count(1_000, 4_369_953, 11_713_045),
        Count(1_000, 7_388, 43_028),
    ),
    "27k": Release(
        "KuaiRand-27K.tar.gz",
        "3e3c799a24e2d23a4d2c757fbf9adf59",
        46_000 * 10**6,
        Count(27_285, 32_038_725, 322_278_385),
        Count(27_285, 7_583, 1_186_059),
        parts=2,
    ),
}
"""By the suffix of its files."""


class FileName(NamedTuple):
    """What the name of a file says: table, suffix of the release, number of the part from 1."""

    table: str
    release: str
    part: int


def parse_name(name: str) -> FileName | None:
    """Return the meaning of a file name, None if it is not one of KuaiRand's."""
    if match := _NAME.fullmatch(name):
        return FileName(match["table"], match["release"], int(match["part"] or 1))
    return None


def check_counts(release: str, which: str, found: Count, where: str, *, strict: bool) -> None:
    """Compare counts with the published ones; other releases, such as simulated ones, have none.

    Args:
        release: Suffix of the files.
        which: ``standard`` or ``random``.
        found: Counts of the log.
        where: Files, for the message.
        strict: Raise an error instead of a warning.

    Raises:
        GatesError: They differ, and ``strict`` is asked for.
    """
    check_option("which", which, ("standard", "random"))
    if release not in RELEASES:
        return
    expected: Count = getattr(RELEASES[release], which)
    differing = [
        f"{have:,} {name}, expected {want:,}"
        for name, have, want in zip(Count._fields, found, expected, strict=True)
        if have != want
    ]
    if not differing:
        return
    message = f"{where}: {'; '.join(differing)} as published; get KuaiRand-{release} again"
    if strict:
        raise GatesError(message)
    warnings.warn(message, stacklevel=2)


def download_release(
    release: str,
    folder: str | Path,
    *,
    url: str = URL,
    tell: Callable[[str], object] = lambda _: None,
    pause: float = 1.0,
) -> Path:
    """Download and unpack a release; continue where an earlier call stopped.

    Args:
        release: ``pure`` (194 MB unpacked), ``1k`` (4.3 GB) or ``27k`` (46 GB).
        folder: Where ``KuaiRand-…/data`` goes.
        url: Folder of the archives.
        tell: Called with a line before the download.
        pause: Seconds before a broken connection is tried again, doubled each time.

    Returns:
        The folder with the files.

    Raises:
        GatesError: The release is unknown, the disk too small, the server refuses, or the checksum
            is wrong twice.
    """
    check_option("release", release, RELEASES, GatesError)
    found, folder = RELEASES[release], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / found.archive.removesuffix(".tar.gz") / "data"
    if not data.exists() and found.unpacked > (free := shutil.disk_usage(folder).free):
        raise GatesError(
            f"{folder} has {free / 1e9:.1f} GB free and KuaiRand-{release} needs "
            f"{found.unpacked / 1e9:.1f} GB; choose another folder or a smaller release"
        )
    if not data.exists():
        tell(f"{found.archive}, {found.unpacked / 1e6:,.0f} MB unpacked")
    download_and_unpack([found.remote(url)], folder, pause=pause)
    if not data.is_dir():
        raise GatesError(f"{found.archive} has no folder {data.relative_to(folder)}; get it again")
    return data
