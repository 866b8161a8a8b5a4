"""``gates study``: studies of training with gates, one command each."""

from collections.abc import Sequence
from pathlib import Path

from harness.command.parser import values
from harness.command.verbs import FunctionVerb, run_verb

FUNCTIONS = {
    "gaussian-rates": FunctionVerb("apps.study.gaussian_rates:gaussian_rates", flat=("flags",)),
    "gates": FunctionVerb("apps.study.gate_comparison:compare_gates", flat=("flags", "training")),
    "comet": FunctionVerb("apps.study.comet:comet", flat=("flags", "training")),
    "dense-to-sparse": FunctionVerb(
        "apps.study.dense_to_sparse:dense_to_sparse", flat=("flags", "training")
    ),
    "evomoe": FunctionVerb("apps.study.evomoe:evomoe", flat=("flags", "sizes")),
    "report": FunctionVerb("apps.study.report:report", ("run",)),
}


def main(arguments: Sequence[str]) -> None:
    """Run one verb; its run is named after the study and, if there is one, the configuration."""
    verb, *words = arguments
    configs = [value for _, value in values(words, ("--config", "-c"))]
    if configs and not any(values(words, ("--name",))):
        words += ["--name", f"{verb}-{Path(configs[-1]).stem}"]
    run_verb("study", FUNCTIONS, [verb, *words], config=verb)
