"""Batch normalization and the activation after it, in one pass."""
