"""Frames as arrays: reading, caching, streams, samplers."""
