"""Searches of an index."""
