"""Download a release: resumable, verified by its published checksum, unpacked once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from core_gates.errors import GatesError, check_option
from harness.files.unpack import download_and_unpack
from video_multitask.kuairand.releases import RELEASES, URL


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
