"""``gates language``: a small decoder, from a folder of text to a model that transformers opens."""

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from core_gates.errors import GatesError, check_option
from harness.command.configfile import find_config, read_config
from harness.command.parser import values
from harness.command.verbs import FunctionVerb, run_verb
from harness.files import refuse_strangers, require_apart, require_free
from harness.runs.folder import RunFolder

DEFAULT_CONFIG = "base"  # of verbs that need no data
SPEECH_CONFIG = "fsdd"
TRAINERS = "apps.language.training_verbs"  # of the other verbs: it imports Lightning
SEQBOAT, PACKAGE = "apps.language.seqboat.training", "language.seqboat."
FUNCTIONS = {
    "adapt": FunctionVerb("apps.language.adapt:adapt", flat=("recipe",)),
    "calibrate": FunctionVerb("apps.language.seer.calibrate:calibrate"),
    "export": FunctionVerb("apps.language.apply_adapter:export"),
    "predict": FunctionVerb("apps.language.apply_adapter:predict"),
    "generate": FunctionVerb("apps.language.generate:generate", literal=("prompt", "stop")),
    "classify": FunctionVerb("apps.language.seqboat.classify:classify", "files"),
    "convert": FunctionVerb("apps.language.commands:convert", ("folder",)),
    "diagnose": FunctionVerb("apps.language.diagnose:diagnose"),
    "distill": FunctionVerb("apps.language.seer.distill:distill", flat=("recipe",)),
    "fit-gates": FunctionVerb("apps.language.fit_gates:fit_gates", flat=("gates", "training")),
    "plan": FunctionVerb("apps.language.model_sizes:plan"),
    "pregate": FunctionVerb("apps.language.pregate:pregate_models", flat=("recipe",)),
    "scbench": FunctionVerb("apps.language.scbench.benchmark:scbench", flat=("questions",)),
}
"""Verbs that need neither data nor a Trainer."""

OFFLOAD = {
    "offload profile": FunctionVerb("apps.language.offload.replaying:profile", ("model", "output")),
    "offload replay": FunctionVerb("apps.language.offload.replaying:replay", ("trace",)),
    "offload generate": FunctionVerb(
        "apps.language.offload.running:generate", ("model",), flat=("setup",), literal=("prompt",)
    ),
    "offload bench": FunctionVerb(
        "apps.language.offload.running:bench", ("model",), flat=("setup",)
    ),
}
"""Verbs of mixture models whose experts stay on disk."""

OFFLOAD_HELP = """usage: gates language offload {profile,replay,generate,bench} ...

  profile    record which experts the tokens of documents use, and which are guessed
  replay     simulate what recorded documents take within a budget, by every method
  generate   continue a prompt within a budget for experts
  bench      measure generation within a budget next to the whole model

gates language offload VERB --help lists the options of a verb."""

SEQBOAT_HELP = (
    "Options of a decoder. Those of SeqBoat: gates language {verb} --config fsdd --help\n"
)

BYTES = "bytes"  # the study that is a verb of the Trainer
STUDIES = {
    "blocks": FunctionVerb(
        "apps.language.seer.study:evaluate", flat=("recipe", "measured", "bars")
    ),
    "adapters": FunctionVerb("apps.language.adapter_study:evaluate", flat=("recipe", "bars")),
    "offload": FunctionVerb("apps.language.offload.budget_study:evaluate", flat=("measured",)),
    "scbench": FunctionVerb("apps.language.scbench.reuse_study:evaluate", flat=("texts", "bars")),
}
"""What ``evaluate`` does where ``study`` in its section, or ``--study``, names it."""

ON_MODELS = {
    "adapt": "", "calibrate": "", "diagnose": "", "distill": "", "fit-gates": "",
    "pregate": "-pregated", "scbench": "-scbench",
}  # fmt: skip
"""Those of a trained model, after which the run is named, and how that name ends."""

Numbers = Literal["float32", "bfloat16", "float16"]


def convert(
    folder: str, output: str, dtype: Numbers | None = None, overwrite_output: bool = False
) -> None:
    """Write the model in FOLDER, of Llama, Qwen3, Mixtral or Qwen3-MoE, as a folder of ours.

    What the folder holds is read as transformers writes it, in one file or several, and written in
    one file that transformers opens too. A model that computes something else is refused.

    Args:
        folder: Folder of the model.
        output: Folder that is written.
        dtype: Type of the weights; that in which they are stored if null.
        overwrite_output: Replace the output if it exists and holds a model alone.
    """
    import torch

    from language.hf.model_folder import MADE, read_marks, read_model, write_model

    source, path = Path(folder), Path(output).resolve()
    require_free(path, overwrite=overwrite_output)
    require_apart(path, [source])
    refuse_strangers(path, MADE)
    model, tokenizer = read_model(source)
    read_marks(source)  # a damaged generation_config.json is not copied
    numbers = None if dtype is None else getattr(torch, dtype)
    write_model(path, model, tokenizer, dtype=numbers, source=source)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights")
    print(output)


def run_name(options: Mapping[str, Any], end: str = "") -> str:
    """Return the name of a run by its trained model, and by the file of its gates if there is one.

    With gates, it has other figures than without: folder and name of their file follow.
    """
    model, gates = Path(str(options["model"])).name, options.get("gates")
    if not isinstance(gates, str):
        return model + end
    path = Path(gates).resolve()
    return f"{model}-{path.parent.name}-{path.stem}"


def _study(arguments: Sequence[str]) -> str:
    """Return the study that the options of ``evaluate`` name, or their configuration.

    Raises:
        GatesError: There is no such study, or a configuration of one does not name it.
    """
    named = [value for _, value in values(arguments, ["--config", "-c"])]
    path = find_config(named[-1], "language") if named and named[-1] else None
    section = read_config(path).get("evaluate") if path else None
    study = section.get("study", BYTES) if isinstance(section, dict) else BYTES
    for _, value in values(arguments, ["--study"]):
        study = value
    check_option("study", study, (BYTES, *STUDIES), GatesError)
    if study == BYTES and isinstance(section, dict) and isinstance(section.get("model"), str):
        raise GatesError(
            f"{path}: its section `evaluate` has a model and no study: add `study: blocks`, "
            "`study: adapters` or `study: offload` to the section"
        )
    return str(study)


def _of_seqboat(arguments: Sequence[str]) -> bool:
    """Return whether the configuration, or that of the run to be resumed, describes a SeqBoat."""
    name, root = (
        next((value for _, value in values(arguments, [option])), usual)
        for option, usual in (("--name", "default"), ("--root", "runs"))
    )
    config = ["", *(value for _, value in values(arguments, ["--config", "-c"]))][-1]
    run = RunFolder("language", name, root)
    path = find_config(config, "language") if config else run.config
    return path.is_file() and PACKAGE in str(read_config(path).get("model"))


def _offload(arguments: Sequence[str]) -> None:
    """Run a verb of ``offload``.

    Raises:
        GatesError: There is no such verb.
    """
    verb = " ".join(arguments[:2])
    if arguments[1:2] in ([], ["--help"], ["-h"]):
        print(OFFLOAD_HELP)
    elif verb not in OFFLOAD:
        verbs = ", ".join(name.partition(" ")[2] for name in OFFLOAD)
        raise GatesError(f"offload has no verb {arguments[1]!r}: choose one of {verbs}")
    else:
        run_verb("language", OFFLOAD, [verb, *arguments[2:]], config=DEFAULT_CONFIG)


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    if arguments[0] == "offload":
        _offload(arguments)
        return
    if arguments[0] not in FUNCTIONS and _of_seqboat(arguments):
        importlib.import_module(SEQBOAT).run_training_verb(arguments)
        return
    if arguments[0] == "evaluate" and (study := _study(arguments)) in STUDIES:
        verbs = {"evaluate": STUDIES[study]}
        run_verb("language", verbs, arguments, config=DEFAULT_CONFIG)
        return
    if arguments[0] in FUNCTIONS:
        end = ON_MODELS.get(arguments[0])
        name_of = None if end is None else partial(run_name, end=end)
        config = SPEECH_CONFIG if arguments[0] == "classify" else DEFAULT_CONFIG
        run_verb("language", FUNCTIONS, arguments, config=config, name_of=name_of)
        return
    if {"-h", "--help"} & {*arguments} and not [*values(arguments, ["--config", "-c"])]:
        print(SEQBOAT_HELP.format(verb=arguments[0]))
    importlib.import_module(TRAINERS).run_training_verb(arguments)
