"""Compress the active tokens of sequences to the front, and extract them back to their places."""
