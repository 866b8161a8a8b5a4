"""Benchmarks of gated adapters and their peers."""
