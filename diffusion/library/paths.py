"""Files of a library: those below its root, by names that hold whatever a disk allows."""

import contextlib
import hashlib
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from errno import ENOENT, ENOTDIR
from pathlib import Path
from typing import NamedTuple

from core_gates.errors import GatesError
from diffusion.lora_file.container import clean, label
from diffusion.lora_file.scales import CONFIG, UNTELLING, WEIGHTS


class LibraryError(GatesError):
    """A library, its index or a search is not as expected."""


SUFFIX = ".safetensors"

_SIGNS = ("Mn", "Mc", "So")  # marks of letters, and pictures
_LONGEST = 128
_OUTSIDE, _NO_FILE, _UNREAD = "it leads out of the library", "it is not a file", "it cannot be read"
_GONE = {_OUTSIDE, _NO_FILE, *(f"{_UNREAD}: {os.strerror(n)}" for n in (ENOENT, ENOTDIR))}


class Found(NamedTuple):
    """A file as it lies on the disk.

    Attributes:
        location: Path below the root, as bytes.
        target: Where it is read from: links are followed.
        size: Bytes.
        mtime_ns: When its content changed.
        ctime_ns: When its content or its permissions changed.
        config: Size and time of the configuration of PEFT next to it; empty if there is none.
    """

    location: bytes
    target: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    config: str = ""


class Refused(NamedTuple):
    """A file that is left out, or found by its metadata alone, and why.

    Attributes:
        path: Below the root, as text.
        reason: In a few words.
    """

    path: str
    reason: str


def place_of(path: str | Path) -> Path:
    """Return a path with ``~`` replaced.

    Raises:
        LibraryError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LibraryError(f"{label(path)} is in the home of no user") from error


def shown(location: bytes | str) -> str:
    """Return a location as text in one line."""
    return clean(os.fsencode(location).decode("utf-8", "backslashreplace"), 400)


def walk(root: Path) -> tuple[list[Found], list[Refused]]:
    """Return all adapters below a folder in the order of their locations, and what is refused.

    Hidden files and folders are passed over, links to folders are not followed.

    Raises:
        LibraryError: The folder cannot be read.
    """
    top = real_root(root)
    seen: list[Found | Refused] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(top / folder) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            if not folder:
                raise LibraryError(f"{label(root)} cannot be read: {error.strerror}") from error
            seen.append(Refused(shown(folder), f"{_UNREAD}: {error.strerror}"))
            continue
        names = {entry.name for entry in entries}
        for entry in entries:
            place = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(place)
            elif entry.name.lower().endswith(SUFFIX):
                seen.append(_look(top, place, names if not entry.is_symlink() else None))
            elif entry.is_symlink() and entry.is_dir() and _target(top, place) is None:
                seen.append(Refused(shown(place), _OUTSIDE))
    files = sorted(entry for entry in seen if isinstance(entry, Found))
    return files, sorted(entry for entry in seen if isinstance(entry, Refused))


def look(root: Path, location: bytes) -> Found:
    """Return a file of a library as it lies now.

    Raises:
        LibraryError: It is missing, leads outside of the library, or is no file.
    """
    entry = _look(real_root(root), os.fsdecode(location), None)
    if isinstance(entry, Refused):
        raise LibraryError(f"{entry.path} is refused: {entry.reason}")
    return entry


def location_of(root: Path, path: Path) -> bytes:
    """Return where a file lies in a library.

    Args:
        root: Of the library.
        path: Of the file, below the root or relative to it.

    Raises:
        LibraryError: It is missing, lies outside of the library, or has another suffix.
    """
    top = real_root(root)
    try:
        place = top / path if not path.is_absolute() and (top / path).exists() else path
        place = place.parent.resolve(strict=True) / place.name
        location = os.fsencode(place.relative_to(top))
    except OSError as error:
        raise LibraryError(f"{label(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LibraryError(
            f"{label(path)} lies outside of the library {label(root)}: move it there"
        ) from error
    if path.suffix.lower() != SUFFIX:
        raise LibraryError(f"{label(path)} must end with {SUFFIX}")
    return location


def real_root(root: Path) -> Path:
    """Return the folder of a library with all links followed.

    Raises:
        LibraryError: There is none.
    """
    try:
        if root.is_dir():
            return root.resolve(strict=True)
    except (OSError, ValueError) as error:
        raise LibraryError(f"{label(root)} cannot be read: {error}") from error
    raise LibraryError(
        f"the library {label(root)} is {'a file' if root.exists() else 'missing'}: "
        "name a folder of adapters"
    )


def gone(root: Path, location: bytes) -> bool:
    """Return whether a location certainly holds no adapter of the library any more."""
    name = os.fsdecode(location)
    entry = _look(real_root(root), name, None)
    hidden = any(part.startswith(".") for part in name.split("/"))
    return hidden or (isinstance(entry, Refused) and entry.reason in _GONE)


def names_of(locations: Iterable[bytes]) -> dict[bytes, str]:
    """Return a name for each file, whatever their order: its stem, after the folders it needs.

    Files with the same stem have as many of the folders in their names as distinguish them, the
    nearest ones; the name of what even these do not distinguish ends with a hash of its location.
    Each has 1 to 128 letters, digits, signs, dots, dashes and underscores, and starts with no dot.
    """
    named: dict[bytes, str] = {}
    left = {location: _parts(location) for location in locations}
    for depth in range(1, 1 + max(map(len, left.values()), default=0)):
        names = {location: slug("-".join(parts[-depth:])) for location, parts in left.items()}
        times = Counter([*names.values(), *named.values()])
        named |= {location: name for location, name in names.items() if times[name] == 1}
        left = {location: parts for location, parts in left.items() if location not in named}
    return named | {location: unique_name(location) for location in left}


def unique_name(location: bytes) -> str:
    """Return a name that no other file has."""
    return f"{slug(_parts(location)[-1])[:100]}-{hashlib.sha256(location).hexdigest()[:16]}"


def _parts(location: bytes) -> tuple[str, ...]:
    """Return folders and stem; files that are all called the same are called like their folder."""
    path = Path(location.decode("utf-8", "ignore"))
    return (
        path.parent if path.stem in UNTELLING and path.parent.name else path.with_suffix("")
    ).parts


def slug(text: str) -> str:
    """Return a text as a name: 1 to 128 letters, digits, signs, dots, dashes and underscores."""
    kept = (letter if _in_name(letter) else " " for letter in unicodedata.normalize("NFC", text))
    return "-".join("".join(kept).split()).strip("-").lstrip(".-")[:_LONGEST] or "adapter"


def _in_name(letter: str) -> bool:
    """Return whether names may hold a letter, of any script, or a sign such as an emoji."""
    return letter in "._-" or letter.isalnum() or unicodedata.category(letter) in _SIGNS


def _look(top: Path, name: str, names: set[str] | None) -> Found | Refused:
    """Return what a file is.

    Args:
        top: Folder of the library, with all links followed.
        name: Path below it.
        names: Those of all files of its folder, if no part of the path is a link.
    """
    target: Path | None = top / name
    try:
        if names is None:
            target = _target(top, name)
        if target is None:
            return Refused(shown(name), _OUTSIDE)
        status = target.stat()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "its link is a circle"
        return Refused(shown(name), f"{_UNREAD}: {reason}")
    if not stat.S_ISREG(status.st_mode):
        return Refused(shown(name), _NO_FILE)
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return Found(os.fsencode(name), target, status.st_size, *times, _config(target, names))


def _config(target: Path, names: set[str] | None) -> str:
    """Return size and time of the configuration that the reader takes; empty if there is none."""
    for name in (f"{target.stem}.{CONFIG}", *([CONFIG] if target.name == WEIGHTS else [])):
        if names is None or name in names:
            with contextlib.suppress(OSError):
                status = target.with_name(name).stat()
                return f"{status.st_size} {status.st_mtime_ns}"
    return ""


def _target(top: Path, name: str) -> Path | None:
    """Return a path with all links followed; None if it leads out of the library."""
    target = (top / name).resolve(strict=True)
    return target if top in (target, *target.parents) else None
