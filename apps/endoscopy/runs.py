"""Small tables of finished trainings that tell what they were made with."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from endoscopy.data.provenance import fingerprint
from harness.files.atomic import write_bytes

KEY = b"training"


def write_run(path: Path, table: pd.DataFrame, settings: Mapping[str, Any]) -> Path:
    """Write a table as Parquet, its settings and their fingerprint in the metadata."""
    content = pa.Table.from_pandas(table, preserve_index=False)
    record = json.dumps({"fingerprint": fingerprint(settings), "settings": dict(settings)})
    metadata = {**(content.schema.metadata or {}), KEY: record.encode()}
    buffer = io.BytesIO()
    parquet.write_table(content.replace_schema_metadata(metadata), buffer)
    return write_bytes(path, buffer.getvalue())


def run_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings of a table; None if it does not tell them, or is damaged."""
    try:
        metadata = parquet.read_schema(path).metadata or {}
        settings: dict[str, Any] = json.loads(metadata[KEY])["settings"]
    except (OSError, ValueError, KeyError):  # pa.ArrowInvalid is a ValueError
        return None
    return settings


def json_record(path: Path) -> dict[str, Any] | None:
    """Return a JSON file that holds ``settings``; None if it is absent, or does not."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
