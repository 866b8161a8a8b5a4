"""Measurements: ratios of interleaved runs in one process, compared with the machine's limits."""

import core_gates  # noqa: F401 - which names the extra of a library that is missing
