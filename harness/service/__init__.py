"""A scoring service over HTTP: batches, limits, health, metrics, hot swap of the model."""

from harness.service.columns import Kind, columns_of, mapping_of
from harness.service.scorer import Arrays, Limits, RefusedError, Scorer

__all__ = ["Arrays", "Kind", "Limits", "RefusedError", "Scorer", "columns_of", "mapping_of"]
