"""Files and folders that are either the old or the new one, never partially written.

Also long work that a kill does not undo, and locks, which end with their process.
"""

import errno
import glob
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from core_gates.errors import GatesError

UNWRITABLE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""Reasons why a place cannot be written; a full disk is none of them."""


def require_free(
    path: Path, *, overwrite: bool, option: str = "--output", file: bool = False
) -> None:
    """Refuse a place for an output that cannot be written, before anything expensive is done.

    Args:
        path: The place; what lies above it is tried with a file that has no name.
        overwrite: Whether it may be taken.
        option: Option that names it.
        file: Whether the output is a file, which takes the place of no folder.

    Raises:
        GatesError: It is taken and ``overwrite`` is not asked for, is a folder and the output a
            file, lies below a file, or may not be written.
    """
    with writing(path):
        taken = path.exists()
        parent = next((ancestor for ancestor in path.parents if ancestor.exists()), path)
    if file:
        _refuse_folder(path)
    if taken and not overwrite:
        raise GatesError(f"{path} exists: choose another {option} or add --overwrite_output")
    if not parent.is_dir():
        raise GatesError(
            f"{path} cannot be written, {parent} is a file and no folder: choose another {option}"
        )
    try:
        TemporaryFile(dir=parent).close()
    except (
        OSError
    ) as error:  # permissions do not tell: root passes them all, and /proc takes no file
        raise GatesError(f"{path} cannot be written: choose another {option}") from error


def refuse_strangers(folder: Path, made: Sequence[str]) -> None:
    """Refuse to replace a folder that holds anything but an older output.

    Args:
        folder: What is replaced; hidden files do not count, and nothing does if it is no folder.
        made: Names, or patterns of names, of what is written; the first is always written.

    Raises:
        GatesError: It holds something else, or the first name is not there.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if not name.startswith(".")]
    strangers = [name for name in names if not any(fnmatch(name, pattern) for pattern in made)]
    if names and made[0] not in names:
        strangers = strangers or names
    if strangers:
        raise GatesError(
            f"{folder} holds {strangers[0]!r}, which is no older output and would be deleted: "
            "choose another folder"
        )


def require_apart(output: Path, inputs: Iterable[Path], option: str = "--output") -> None:
    """Refuse an output that would replace what is read.

    Args:
        output: File or folder that is replaced.
        inputs: Files and folders that are read.
        option: Option that names the output.

    Raises:
        GatesError: An input is the output, or lies in it.
    """
    for path in inputs:
        for form in (path.absolute(), path.resolve()):  # a link, and what it points to
            if any(
                place in (form, *form.parents) for place in (output.absolute(), output.resolve())
            ):
                what = "is" if output.resolve() == path.resolve() else "lies in"
                raise GatesError(f"{path} {what} the output {output}: choose another {option}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path for a new file or folder, which replaces ``path`` when the block succeeds.

    After an exception what was written is deleted and ``path`` is as before. A folder that is to be
    replaced is first renamed, and comes back at the next call if the process is killed right then.

    Args:
        path: Target; the path that is yielded lies in the same folder and has the same suffix.

    Raises:
        GatesError: It cannot be written, is a folder that a file would replace, or another process
            replaces the same folder.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    previous = path.with_name(f".{path.name}.previous")
    if previous.exists() and not path.exists():
        previous.rename(path)
    remove(previous)
    _clear(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    remove(temporary)
    try:
        with writing(path, temporary):
            yield temporary
        if not temporary.is_dir():
            _refuse_folder(path)
        with writing(path), _alone(path):
            if path.is_dir():
                path.rename(previous)
            temporary.replace(path)
        remove(previous)
    finally:
        remove(temporary)


def _refuse_folder(path: Path) -> None:
    """Refuse to put a file where a folder is.

    Raises:
        GatesError: There is one.
    """
    if path.is_dir():
        raise GatesError(f"{path} is a folder, a file is written: give the name of a file")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Refuse to swap a folder that another process is swapping.

    Raises:
        GatesError: It is.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise GatesError(
            f"{path} was written by another process at the same time: run one command after the "
            "other, or give each its own folder"
        ) from error


@contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name the place that cannot be written; of a file ``temporary`` and what lies in it, if given.

    Raises:
        GatesError: The place does not exist, is of another kind, or may not be written.
    """
    try:
        yield
    except OSError as error:
        place = Path(str(error.filename or ""))
        is_ours = temporary is None or temporary in (place, *place.parents)
        if error.errno not in UNWRITABLE or not is_ours:
            raise
        reason = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno
        raise GatesError(f"{path} cannot be written: {os.strerror(reason)}") from error


def _clear(path: Path) -> None:
    """Delete what killed processes have left behind of earlier attempts."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"):
        process = left.name.removesuffix(path.suffix).split(".")[-2]
        if process.isdigit() and not Path("/proc", process).exists() and Path("/proc").is_dir():
            remove(left)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically, in UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a binary file atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write JSON atomically; NaN and infinities become null, since JSON has no such numbers."""
    return write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return plain values in which NaN and infinities are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def locked(path: Path, place: Path, remedy: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock, whose file goes when the block ends.

    A process that is killed lets it go at once, even if processes that it forked live on.

    Args:
        path: File of the lock. Folders above it that do not exist are made, and go with it unless
            the block has filled them.
        place: What is worked on, for the message.
        remedy: What to do instead of waiting.
        wait: Wait until no other process holds it.

    Raises:
        GatesError: Another process holds it and ``wait`` is not asked for, or its file cannot be
            written.
    """
    from filelock import FileLock, Timeout  # only what locks waits for it

    lock = FileLock(path, blocking=wait)
    try:
        with writing(place):
            made = [folder for folder in path.parents if not folder.exists()]
            lock.acquire()
    except Timeout as error:
        raise GatesError(
            f"another process is at work on {place}: wait for it, or {remedy}"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


SETTINGS, STATE, CONTENT = "settings.json", "state.json", "content"


class Partial:
    """A file or folder that is being made.

    Args:
        folder: ``.NAME.partial``, next to what is made.

    Attributes:
        content: Where the file or folder is made.
        state: What the last `save` was given; empty at first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.content = folder, folder / CONTENT
        self.state: dict[str, Any] = _read(folder / STATE) or {}

    def save(self, state: Mapping[str, Any]) -> None:
        """Record how far the work is, atomically; what was written before belongs to it."""
        self.state = dict(state)
        write_json(self.folder / STATE, self.state)


@contextmanager
def resuming(
    target: Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Partial]:
    """Yield partial work on ``target``, which takes its place when the block succeeds.

    After a kill or an exception the partial work stays as it is, and the next call with the same
    settings is given it; work of which nothing was saved goes at once.

    Args:
        target: File or folder that is made.
        settings: All that decides the content, as plain JSON values.
        overwrite: Replace an existing target, and partial work of other settings.

    Raises:
        GatesError: The target is taken or cannot be written, the partial work has other settings,
            or another process is at work on it.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        previous.rename(target)
    require_free(target, overwrite=overwrite)
    folder = target.with_name(f".{target.name}.partial")
    with ExitStack() as held:
        with writing(target):
            lock = target.with_name(f".{target.name}.lock")
            held.enter_context(locked(lock, target, "choose another --output"))
            remove(previous)
            _begin(folder, target, dict(settings), overwrite=overwrite)
        partial = Partial(folder)
        try:
            with writing(target, folder):
                yield partial
        except BaseException:
            if not partial.state:
                remove(folder)
            raise
        with writing(target):
            if target.is_dir():
                target.rename(previous)
            partial.content.replace(target)
            remove(previous)
            remove(folder)


def _begin(folder: Path, target: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Leave only partial work of these settings, or none."""
    settings = json.loads(json.dumps(settings))
    begun = _read(folder / SETTINGS)
    if begun != settings:
        if begun and (folder / STATE).is_file() and not overwrite:
            raise GatesError(
                f"{target} was begun with other settings ({_difference(begun, settings)}): give "
                "those to continue it, choose another output, or add --overwrite_output"
            )
        remove(folder)
    if not (folder / STATE).is_file():
        remove(folder)
        folder.mkdir()
        write_json(folder / SETTINGS, settings)


def _difference(begun: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the first setting that differs, with both values."""
    name = next(n for n in sorted({*begun, *expected}) if begun.get(n) != expected.get(n))
    before, now = (str(settings.get(name))[:60] for settings in (begun, expected))
    return f"{name} {before}, now {now}"


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a file that a killed process may not have written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
