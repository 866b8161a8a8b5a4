"""The model in service, and its replacement while requests are answered."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError
from harness.system import return_freed_memory
from video_multitask.service.contract import Scorer

LOG = logging.getLogger("gates.service")
Loader = Callable[[Path], Scorer[Any]]


def find_model(place: Path) -> Path:
    """Return the folder of a model: ``place`` itself, or what a manifest names.

    Args:
        place: A folder, a symbolic link to one, or a JSON file ``{"folder": "NAME"}``, relative to
            the folder of that file.

    Raises:
        GatesError: There is no such folder, or the manifest names none.
    """
    folder = place
    if place.suffix == ".json" and place.is_file():
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GatesError(f"{place} cannot be read as JSON: {error}") from error
        name = content.get("folder") if isinstance(content, dict) else None
        if not isinstance(name, str) or not name:
            raise GatesError(f'{place} names no model: expected {{"folder": "NAME"}}')
        folder = place.parent / name
    if not folder.is_dir():
        raise GatesError(f"{folder} is not a folder of a model: check the path")
    return folder.resolve()


def stamp(folder: Path) -> tuple[Any, ...]:
    """Return what changes when a folder or its content is replaced."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    states = [(str(path), path.stat()) for path in files]
    return str(folder), tuple((p, s.st_ino, s.st_size, s.st_mtime_ns) for p, s in states)


class Models:
    """The model in service.

    A thread looks at the folder (see :func:`find_model`). Another folder, or a changed one, that is
    the same at two looks is loaded next to the model in service, warmed up and put in its place by
    one assignment; requests that the old one has read are finished by it. A folder that cannot be
    loaded, or whose model has another interface, so that clients would fail, is refused once,
    logged, and the model in service stays.

    Args:
        place: Folder, link or manifest.
        load: Loads a folder.
        tell: Called with ``swapped`` or ``refused`` for each new folder.
        poll_s: Seconds between two looks.

    Attributes:
        current: Model in service.

    Raises:
        GatesError: The first model cannot be loaded.
    """

    def __init__(
        self,
        place: Path,
        load: Loader,
        tell: Callable[[str], None] = lambda _outcome: None,
        poll_s: float = 1.0,
    ) -> None:
        self.place, self.load, self.tell, self.poll_s = place, load, tell, poll_s
        folder = find_model(place)
        self._seen = self._settled = stamp(folder)
        self.current = self._loaded(folder)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watching", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def look(self) -> bool:
        """Look once, and return whether another model came into service."""
        try:
            folder = find_model(self.place)
            found = stamp(folder)
        except (GatesError, OSError) as error:
            found = (str(error),)
            if found not in (self._seen, self._settled):
                LOG.warning("%s; %s stays in service", error, self.current.version)
            self._seen = found
            return False
        stable, self._seen = found == self._seen, found
        if not stable or found == self._settled:
            return False
        self._settled = found
        return self._swap(folder)

    def _swap(self, folder: Path) -> bool:
        old = self.current.version
        try:
            found = self._loaded(folder)
            _refuse_other(found.interface, self.current.interface)
            self.current = found
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            LOG.error("%s is refused: %s; %s stays in service", folder, line, old)
            self.tell("refused")
            return False
        LOG.info("%s is in service instead of %s", self.current.version, old)
        self.tell("swapped")
        return True

    def _loaded(self, folder: Path) -> Scorer[Any]:
        scorer = self.load(folder)
        scorer.warm_up()
        return scorer

    def _watch(self) -> None:
        while not self._stopping.wait(self.poll_s):
            try:
                if self.look():
                    self._stopping.wait(self.poll_s)  # the old model finishes its requests
                    return_freed_memory()
            except Exception:
                LOG.exception("watching %s", self.place)


def _refuse_other(new: Mapping[str, str], old: Mapping[str, str]) -> None:
    """Refuse a model that requests for the old one do not fit."""
    changes = [
        *(f"lacks {name}" for name in old if name not in new),
        *(f"has in addition {name}, {new[name]}" for name in new if name not in old),
        *(f"has {n}, {new[n]} instead of {old[n]}" for n in new if old.get(n, new[n]) != new[n]),
    ]
    if changes:
        raise GatesError(
            f"it {'; it '.join(changes[:3])}{' …' if changes[3:] else ''}: clients would fail; "
            "start a separate service for it"
        )
