"""``gates diffusion``: adapters of image models: read, converted, merged, found, fused."""

from collections.abc import Sequence

from harness.command.verbs import FunctionVerb, run_verb

DEFAULT_CONFIG = "embedded"  # of verbs that need no configuration
FUNCTIONS = {
    "train-base": FunctionVerb("apps.diffusion.training.train_lora:train_embedded"),
    "train-lora": FunctionVerb(
        "apps.diffusion.training.train_lora:train_adapter", "images", flat=("card", "training")
    ),
    "train-retriever": FunctionVerb(
        "apps.diffusion.training.train_retriever:train", flat=("training", "machine")
    ),
    "train-gates": FunctionVerb(
        "apps.diffusion.training.train_gates:train", flat=("gates", "training", "machine")
    ),
    "evaluate": FunctionVerb("apps.diffusion.evaluate:evaluate"),
    "generate": FunctionVerb(
        "apps.diffusion.generate:generate", "prompt", flat=("sources", "sampling")
    ),
    "demo": FunctionVerb("apps.diffusion.demo:demo", flat=("sources",)),
    "report": FunctionVerb("apps.diffusion.report:report"),
    "index": FunctionVerb("apps.diffusion.search:index", ("folder",)),
    "search": FunctionVerb("apps.diffusion.search:search", "prompt"),
    "inspect": FunctionVerb("apps.diffusion.inspect:inspect", "paths"),
    "convert": FunctionVerb("apps.diffusion.merge:convert", ("file", "output")),
    "merge": FunctionVerb("apps.diffusion.merge:merge", "files"),
}  # verbs without a Trainer, each imported only when it is called


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    run_verb("diffusion", FUNCTIONS, arguments, config=DEFAULT_CONFIG)
