"""Long work that a kill does not undo, and locks, which end with their process."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError
from harness.files.atomic import remove, require_free, write_json, writing


@contextmanager
def locked(path: Path, place: Path, remedy: str) -> Iterator[None]:
    """Hold a lock, whose file goes when the block ends.

    A process that is killed lets it go at once, even if processes that it forked live on.

    Args:
        path: File of the lock. Folders above it that do not exist are made, and go with it unless
            the block has filled them.
        place: What is worked on, for the message.
        remedy: What to do instead of waiting.

    Raises:
        GatesError: Another process holds it, or its file cannot be written.
    """
    from filelock import FileLock, Timeout  # only what locks waits for it

    lock = FileLock(path, blocking=False)
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
        state: What the last :meth:`save` was given; empty at first.
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
    found = _read(folder / SETTINGS)
    if found != settings:
        if found and (folder / STATE).is_file() and not overwrite:
            raise GatesError(
                f"{target} was begun with other settings ({_difference(found, settings)}): give "
                "those to continue it, choose another output, or add --overwrite_output"
            )
        remove(folder)
    if not (folder / STATE).is_file():
        remove(folder)
        folder.mkdir()
        write_json(folder / SETTINGS, settings)


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return the first setting that differs, with both values."""
    name = next(n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n))
    before, now = (str(one.get(name))[:60] for one in (found, expected))
    return f"{name} {before}, now {now}"


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a file that a killed process may not have written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
