"""Measurements: ratios of interleaved runs in one process, beside the machine's limits."""
