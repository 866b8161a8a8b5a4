"""Data and networks from settings: what a piece of work needs to begin in another process."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule, data_module
from recsys.data.tables import RankingTables, StreamSource, TableSource
from recsys.experiments.contest import MODEL
from recsys.experiments.mappings import mapping_in, nested
from recsys.module import MultiTaskModule

DATA = "data."
Made = TypeVar("Made")
CACHED = 2  # tables that a process keeps: those of two data sets


def class_of(settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the class of the source of the rows.

    Args:
        settings: With ``data.source.class_path``.

    Raises:
        GatesError: No class is named, or there is none.
    """
    path = str(settings.get("data.source.class_path") or "")
    module, _, name = path.rpartition(".")
    if not module:
        raise GatesError(
            f"data.source.class_path is {path or 'missing'}, expected a class with its package, "
            "such as recsys.data.readers.own_table.OwnTable"
        )
    try:
        return cast(Callable[..., Any], getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        raise GatesError(f"data.source {path}: {error}") from error


def source_of(settings: Mapping[str, Any]) -> TableSource | StreamSource:
    """Return the source of the rows.

    Args:
        settings: With ``data.source.class_path`` and ``data.source.init_args.…``.

    Raises:
        GatesError: No class is named, there is none, or it refuses an argument.
    """
    kind = class_of(settings)
    try:
        return cast(TableSource | StreamSource, kind(**nested(settings, "data.source.init_args.")))
    except (TypeError, ValueError) as error:
        raise GatesError(f"data.source {settings['data.source.class_path']}: {error}") from error


def data_of(settings: Mapping[str, Any], seed: int = 0) -> TableDataModule:
    """Return the data that settings name; a process reads tables again only if files change.

    Args:
        settings: With names that begin by ``data.``.
        seed: Of the order of training rows.

    Raises:
        GatesError: A setting is unknown or wrong, or the tables cannot be read.
    """
    source = {n: v for n, v in settings.items() if n.startswith("data.source.")}
    options = {
        n.removeprefix(DATA): v
        for n, v in settings.items()
        if n.startswith(DATA) and n not in source and n != "data.seed"
    }
    found = _read(json.dumps(source, sort_keys=True), _state(source.values()))
    return _made(DATA, data_module, found, seed=seed, **options)


def require_tables(data: object, needs: str, fix: str) -> None:
    """Refuse data that are read part by part, where all rows are needed at once.

    Args:
        data: A data module.
        needs: Who needs the rows, such as ``--slices needs``.
        fix: What to do.

    Raises:
        GatesError: The data are a stream.
    """
    if not isinstance(data, TableDataModule):
        raise GatesError(
            f"{needs} all rows in memory, but data.source is a stream, which reads them part by "
            f"part: {fix}"
        )


def module_of(settings: Mapping[str, Any]) -> MultiTaskModule:
    """Return the untrained module that settings name.

    Raises:
        GatesError: A setting is unknown or wrong.
    """
    chosen = mapping_in(settings, f"{MODEL}options")
    others = {n: v for n, v in settings.items() if not n.startswith(f"{MODEL}options")}
    return _made(MODEL, MultiTaskModule, **nested(others, MODEL), options=chosen)


def _made(group: str, kind: Callable[..., Made], *args: Any, **options: Any) -> Made:
    try:
        return kind(*args, **options)
    except (TypeError, ValueError) as error:
        raise GatesError(f"{group.rstrip('.')}: {error}") from error


def _state(values: Iterable[Any]) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether files among the values of settings have changed."""
    paths = [Path(value).absolute() for value in values if isinstance(value, str) and value]
    stats = [(str(path), path.stat()) for path in paths if path.exists()]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@lru_cache(maxsize=CACHED)
def _read(source: str, state: object) -> RankingTables | StreamSource:
    del state
    found = source_of(json.loads(source))
    return (
        cast(StreamSource, found) if hasattr(found, "stream") else cast(TableSource, found).read()
    )
