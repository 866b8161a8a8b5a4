"""What every application shares: runs, experiments, evidence, reports, commands."""

import core_gates  # noqa: F401 - which names the extra of a library that is missing
