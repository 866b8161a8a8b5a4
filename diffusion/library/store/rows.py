"""Records as rows of the table of adapters, and back."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.library.adapter import Adapter
from diffusion.library.describe import Description
from diffusion.library.paths import Found, shown
from diffusion.library.record import READER, REASONS, Record
from diffusion.library.store.schema import COLUMNS

_ID, _NORM = np.dtype("<i4"), np.dtype("<f8")


def row_of(record: Record, name: str, number: Callable[[str], int]) -> tuple[Any, ...]:
    """Return the values of a row, in the order of ``COLUMNS``.

    Args:
        record: What it holds.
        name: Of the adapter.
        number: Returns the id of a layer.
    """
    found, told = record.found, record.description
    norms = sorted((number(module), norm) for module, norm in record.norms.items())
    searchable = not record.error and not set(record.flags) & set(REASONS)
    values: dict[str, Any] = {
        "location": found.location,
        "name": name,
        "size": found.size,
        "mtime_ns": found.mtime_ns,
        "ctime_ns": found.ctime_ns,
        "config": found.config,
        "reader": READER,
        "sha256": record.sha256,
        "digest": record.digest,
        "family": record.family,
        "dialect": record.dialect,
        "rank_min": record.ranks[0],
        "rank_mean": record.ranks[1],
        "rank_max": record.ranks[2],
        "norm": record.norm,
        "modules": np.array([n for n, _ in norms], _ID).tobytes(),
        "norms": np.array([norm for _, norm in norms], _NORM).tobytes(),
        "title": told.title,
        "triggers": json.dumps(told.triggers),
        "tags": json.dumps(told.tags),
        "license": told.license,
        "text": told.text,
        "flags": json.dumps(record.flags),
        "searchable": int(searchable),
        "problem": record.problem,
        "error": record.error,
    }
    return tuple(values[column] for column in COLUMNS)


def norms_of(row: Mapping[str, Any]) -> dict[int, float]:
    """Return ‖ΔW‖ of each layer, by the id of the layer."""
    modules, norms = np.frombuffer(row["modules"], _ID), np.frombuffer(row["norms"], _NORM)
    return dict(zip(modules.tolist(), norms.tolist(), strict=True))


def record_of(row: Mapping[str, Any], names: Mapping[int, str]) -> Record:
    """Return the record of a row.

    Args:
        row: By column.
        names: Of layers, by id.
    """
    triggers, tags = (tuple(json.loads(row[column])) for column in ("triggers", "tags"))
    place = (row["location"], Path(), row["size"], row["mtime_ns"], row["ctime_ns"], row["config"])
    return Record(
        Found(*place),
        row["sha256"],
        row["digest"],
        row["family"],
        row["dialect"],
        (row["rank_min"], row["rank_mean"], row["rank_max"]),
        {names[module]: norm for module, norm in norms_of(row).items()},
        Description(row["title"], triggers, tags, row["license"], row["text"]),
        tuple(json.loads(row["flags"])),
        row["problem"],
        row["error"],
    )


def adapter_of(row: Mapping[str, Any]) -> Adapter:
    """Return the adapter of a row, given by column."""
    return Adapter(
        row["id"],
        row["name"],
        shown(row["location"]),
        row["title"] or row["name"],
        row["size"],
        row["family"],
        row["dialect"],
        len(row["modules"]) // _ID.itemsize,
        (row["rank_min"], row["rank_mean"], row["rank_max"]),
        math.nan if row["norm"] is None else row["norm"],
        tuple(json.loads(row["triggers"])),
        tuple(json.loads(row["tags"])),
        row["license"],
        row["text"],
        tuple(json.loads(row["flags"])),
        row["problem"],
        row["error"],
        row["sha256"],
        row["digest"],
    )
