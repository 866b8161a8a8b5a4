"""The command ``gates``: check that the packages are ours, then hand over to ``apps.main``.

It lies here because the names ``apps`` and ``harness`` are common: where a foreign package of such
a name comes first on the path, a script that imports ``apps.main`` ends in a traceback or runs it.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from core_gates.extras import PACKAGES

ROOT = Path(__file__).parents[1]


def gates() -> int:
    """Run ``gates APP VERB ...`` and return the exit code, 2 where foreign packages shadow ours."""
    for package in sorted({*PACKAGES} - {"benchmarks"}):  # which no command needs
        spec = find_spec(package)
        folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
        if spec is not None and ROOT / package not in folders:
            sys.stderr.write(
                f"gates: error: {folders[0] if folders else spec.origin} comes before "
                f"{ROOT / package} on the path: rename it, or take its folder out of PYTHONPATH\n"
            )
            return 2
    return int(import_module("apps.main").main())
