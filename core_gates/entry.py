"""The command ``gates``: check that the packages are ours, then hand over to ``apps.main``.

It lies here because the names ``apps`` and ``harness`` are common: where a foreign package of such
a name comes first on the path, a script that imports ``apps.main`` ends in a traceback or runs it.
"""

import sys
from importlib import import_module

from core_gates.extras import PACKAGES, foreign


def gates() -> int:
    """Run ``gates APP VERB ...`` and return the exit code, 2 where foreign packages shadow ours."""
    if line := foreign(sorted({*PACKAGES} - {"benchmarks"})):  # which no command needs
        sys.stderr.write(f"gates: error: {line}\n")
        return 2
    return int(import_module("apps.main").main())
