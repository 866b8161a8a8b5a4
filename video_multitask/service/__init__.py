"""A scoring service over HTTP: batches, limits, health, metrics, hot swap of the model."""
