"""Vocabularies and scales that were learned from shards, kept next to them.

Learning takes a pass over all training days. What is learned depends on those days and on how the
schema reads its columns, not on embeddings or tasks, so one folder serves many networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.files import short_digest
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform
from video_multitask.stream.shards import Shards

FOLDER = ".transforms"
"""In the folder of the shards; hidden, since their content does not include it."""

_LEARNED = {
    "sparse": ("name", "min_count", "storage", "buckets", "table"),
    "dense": ("name", "scaling", "buckets"),
    "crossed": ("of", "buckets"),
    "sequences": ("name", "of"),
}


def place_of(train: Shards, schema: FeatureSchema) -> Path:
    """Return the folder of what a schema learns from training shards, whether it exists or not."""
    values = schema.to_dict()
    learned: dict[str, Any] = {
        kind: [{name: entry[name] for name in names} for entry in values[kind]]
        for kind, names in _LEARNED.items()
    }
    learned |= {"time": schema.time, "files": {f.name: f.sha256 for f in train.files}}
    return train.folder / FOLDER / short_digest(learned)


def store(train: Shards, transform: FeatureTransform) -> Path:
    """Keep a transform that was fitted to training shards; return its folder."""
    return transform.save(place_of(train, transform.schema))


def load_stored(train: Shards, schema: FeatureSchema) -> FeatureTransform | None:
    """Return the transform that was kept for these training shards and a schema, None if none was.

    Raises:
        GatesError: It is damaged.
    """
    place = place_of(train, schema)
    if not place.is_dir():
        return None
    found, made = FeatureTransform.load(place), FeatureTransform(schema)
    made.tables, made.scalers, made.fitted = found.tables, found.scalers, found.fitted
    return made
