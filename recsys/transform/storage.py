"""A transform as a folder: one JSON file, and one Parquet file per vocabulary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core_gates.errors import GatesError
from harness.files import replacing, write_json
from recsys.schema import FeatureSchema
from recsys.transform.fitting import Fitted, Table
from recsys.transform.scaling import Buckets, Scaler
from recsys.vocabulary import HashedValues, Vocabulary

FILE, FORMAT = "transform.json", 1


class Stored(NamedTuple):
    """What a folder holds; see :class:`recsys.transform.FeatureTransform`."""

    schema: FeatureSchema
    fitted: Fitted
    tables: dict[str, Table]
    scalers: dict[str, Scaler | Buckets]
    missing: tuple[str, ...]


def write_folder(
    folder: Path,
    schema: FeatureSchema,
    fitted: Fitted,
    tables: Mapping[str, Table],
    scalers: Mapping[str, Scaler | Buckets],
    missing: Sequence[str] = (),
) -> Path:
    """Write a transform; the folder is the old or the new one, never a mixture."""
    stated: dict[str, Any] = {}
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        for number, (name, table) in enumerate(tables.items()):
            if isinstance(table, HashedValues):
                stated[name] = dataclasses.asdict(table)
            else:
                file = f"vocabulary_{number:03d}.parquet"
                table.save(temporary / file)
                stated[name] = {"file": file, "rows": len(table)}
        content = {
            "format": FORMAT,
            "schema": schema.to_dict(),
            "fitted": fitted._asdict(),
            "tables": stated,
            "dense": {name: _stated(scaler) for name, scaler in scalers.items()},
        }
        if missing:  # files of tables without such words are as they always were
            content["missing"] = list(missing)
        write_json(temporary / FILE, content)
    return folder


def read_folder(folder: Path) -> Stored:
    """Return what :func:`write_folder` wrote.

    Raises:
        GatesError: The folder is absent, incomplete, or of another format.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        tables = {name: _table(folder, stated) for name, stated in content["tables"].items()}
        scalers = {name: _scaler(stated) for name, stated in content["dense"].items()}
        schema, fitted = FeatureSchema.from_dict(content["schema"]), Fitted(**content["fitted"])
        missing = tuple(map(str, content.get("missing", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise GatesError(
            f"{path} holds no transform of features: {what}; name the folder that a training wrote"
        ) from error
    if lacking := {f.table_name for f in schema.sparse} - tables.keys():
        raise GatesError(f"{path} lacks the table {min(lacking)!r}: copy the whole folder again")
    return Stored(schema, fitted, tables, scalers, missing)


def _table(folder: Path, stated: Mapping[str, Any]) -> Table:
    if "file" not in stated:
        return HashedValues(**stated)
    table = Vocabulary.load(folder / stated["file"])
    if len(table) != stated["rows"]:
        raise ValueError(f"{stated['file']} has {len(table)} rows, not {stated['rows']}")
    return table


def _stated(scaler: Scaler | Buckets) -> dict[str, Any]:
    if isinstance(scaler, Scaler):
        return scaler._asdict()
    return {"edges": scaler.edges.tolist(), "buckets": scaler.buckets}


def _scaler(stated: Mapping[str, Any]) -> Scaler | Buckets:
    if "edges" in stated:
        return Buckets(np.asarray(stated["edges"], np.float64), stated["buckets"])
    return Scaler(**stated)
