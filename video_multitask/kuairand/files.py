"""Find the files of a release in a folder."""

from __future__ import annotations

from pathlib import Path

from core_gates.errors import GatesError
from video_multitask.kuairand.releases import LOGS, RELEASES, Part, parse_name


def find_files(folder: Path) -> tuple[str, dict[str, list[Path]]]:
    """Return the release of a folder and its files by table, in the order of their parts.

    Args:
        folder: With the files, with ``data`` in it, or with ``KuaiRand-…/data`` in it.

    Raises:
        GatesError: There are none, some are missing, or two releases are mixed.
    """
    places = [p for p in (folder, folder / "data", *sorted(folder.glob("KuaiRand-*/data")))
              if p.is_dir()]  # fmt: skip
    for place in places:
        named = {path: name for path in sorted(place.iterdir()) if (name := parse_name(path.name))}
        if named:
            break
    else:
        raise GatesError(
            f"{folder} holds no log of KuaiRand, such as {LOGS['first']}_pure.csv; name the folder "
            "that the archive was unpacked to"
        )
    releases = sorted({name.release for name in named.values()})
    if len(releases) > 1:
        raise GatesError(
            f"{place} mixes the releases {', '.join(releases)}, whose ids differ; keep one of them"
        )
    files: dict[str, list[Path]] = {}
    for path, name in sorted(named.items(), key=lambda item: (item[1].table, item[1].part)):
        files.setdefault(name.table, []).append(path)
        if len(files[name.table]) != name.part:
            raise GatesError(
                f"{path}: part {name.part} comes after {len(files[name.table]) - 1} parts; get "
                "the missing one, or remove its copy in another format"
            )
    _check_complete(place, releases[0], files)
    return releases[0], files


def _check_complete(folder: Path, release: str, files: dict[str, list[Path]]) -> None:
    """Refuse a published release that lacks logs, and any other without the first of them."""
    published = RELEASES.get(release)
    needed: tuple[Part, ...] = ("first", "second", "random") if published else ("first",)
    for part in needed:
        wanted = published.parts if published and part != "random" else 1
        if (found := len(files.get(LOGS[part], ()))) < wanted:
            raise GatesError(
                f"{folder} has {found} of {wanted} files {LOGS[part]}_{release}; unpack the whole "
                "archive"
            )
