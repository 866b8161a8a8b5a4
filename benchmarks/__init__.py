"""Measurements: ratios of interleaved runs in one process, compared with the machine's limits."""
