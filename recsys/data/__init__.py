"""Batches, loaders and readers of tables."""
