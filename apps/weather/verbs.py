"""The verbs of ``gates weather``: functions are imported one at a time, the others together."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from harness.command.verbs import FunctionVerb, run_verb

DEFAULT_CONFIG = "era5_ensemble"  # of verbs that need none
SIZES = "official"  # configuration of `plan`
TRAINERS = "apps.weather.commands"  # of the other verbs: it imports Lightning
FUNCTIONS = {
    "ingest": FunctionVerb("apps.weather.ingest:ingest", "sources"),
    "plan": FunctionVerb("apps.weather.plan:plan"),
    "forecast": FunctionVerb("apps.weather.operations.forecast:forecast", ("analyses",)),
    "regrid": FunctionVerb(
        "apps.weather.operations.regrid:regrid", ("source", "target_grid", "output")
    ),
}
"""Verbs that need neither data nor a Trainer."""


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    if arguments[0] in FUNCTIONS:
        config = SIZES if arguments[0] == "plan" else DEFAULT_CONFIG
        run_verb("weather", FUNCTIONS, arguments, config=config)
        return
    importlib.import_module(TRAINERS).run(arguments)
