"""The front door ``gates``: a static table answers help and typing errors, importing nothing."""

import importlib
import os
import select
import sys
from collections.abc import Mapping, Sequence
from errno import EDQUOT, ENOSPC
from typing import Any, NamedTuple

PACKAGES = (
    "apps", "benchmarks", "core_gates", "diffusion", "endoscopy", "harness", "language", "recsys",
    "studies", "video_multitask", "weather",
)  # fmt: skip


class App(NamedTuple):
    """One line of the table.

    Attributes:
        module: Module with ``main(arguments)``, imported only when a verb is really run.
        summary: One line for ``gates --help``.
        verbs: Verb to one line for ``gates APP --help``; empty for a command without verbs, whose
            ``main`` is handed the table after its arguments.
        stop: ``module:function`` of its part of the tour, see `apps.tour.main`.
        extras: Extras that it needs: the first for all verbs, the others for some of them.
    """

    module: str
    summary: str
    verbs: Mapping[str, str] = {}
    stop: str = ""
    extras: tuple[str, ...] = ()


APPS: Mapping[str, App] = {
    "weather": App(
        "apps.weather.verbs",
        "assimilate observations into weather fields: FengWu-Adas, OI and LETKF",
        {
            "prepare": "write the nature run or unpack the ERA5 ensemble sample",
            "observe": "simulate an observing network and its noisy observations",
            "ingest": "read observation files of any format into one checked table",
            "regrid": "bring a store to another grid",
            "forecast": "forecast from analyses, with a model of any kind, to a store",
            "tune": "choose the settings of every method with one budget of trials",
            "fit": "train the network, resumable at any step",
            "assimilate": "analyze backgrounds with observations and write the analyses",
            "cycle": "cycle a forecast model with observations over a long period, resumable",
            "evaluate": "score every method of a configuration and write scores.json",
            "report": "write the report of a run as one HTML page",
            "train-forecast": "train a forecast model on a nature run and its own forecasts",
            "plan": "estimate weights, arithmetic, memory and exchange on many GPUs",
        },
        stop="apps.weather.tour:tour",
        extras=("weather", "bufr", "export"),
    ),
    "endoscopy": App(
        "apps.endoscopy.commands",
        "size polyps with feature-selection gates and gradient routing",
        {
            "render": "render colonoscopies of known truth, in the layout of real data",
            "prepare": "read raw data, report every fault, write one table and the cache",
            "fit": "train the network, resumable at any step",
            "evaluate": "score networks, a constant and the apparent area",
            "audit": "find out what a network leans on; studies of gates",
            "report": "write the report of a run as one HTML page",
            "predict": "size the polyps on images, videos or DICOM",
            "export": "write the folded network as ONNX and for torch.export",
            "demo": "open a page that sizes what is dropped on it, on this machine only",
        },
        stop="apps.endoscopy.tour:tour",
        extras=("endoscopy", "export", "dicom-sr", "demo"),
    ),
    "video": App(
        "apps.video.commands",
        "rank short videos, or the rows of any table, for many behaviors: HoME and its rivals",
        {
            "prepare": "convert a release of KuaiRand to shards, or draft the schema of a table",
            "simulate": "write a simulated feed in KuaiRand's format, with its true probabilities",
            "tune": "choose the settings of every network of a contest with one budget of trials",
            "fit": "train one network, resumable at any step",
            "evaluate": "run a contest of networks, baselines and, in a simulated feed, the oracle",
            "report": "write the report of a run as one HTML page",
            "score": "predict the probabilities of a folder of tables, resumable",
            "export": "write a trained network for torch.export, AOTInductor and ONNX",
            "serve": "answer requests over HTTP, with batches, limits and metrics",
            "loadtest": "measure a service under many clients, with a swap of its model",
            "plan": "estimate weights, arithmetic, memory and exchange on many GPUs",
        },
        stop="apps.video.tour:tour",
        extras=("recsys", "serve", "export"),
    ),
    "diffusion": App(
        "apps.diffusion.commands",
        "find, inspect, convert and fuse adapters (LoRA) of image models: AutoLoRA",
        {
            "train-base": "train the embedded base on scenes of shapes or on images",
            "train-lora": "train an adapter on a folder of captioned images",
            "train-retriever": "train the encoder that finds adapters by their weights",
            "train-gates": "train the gates that weigh several adapters at once",
            "evaluate": "compare with rivals by the study of a configuration",
            "generate": "make images of a prompt with the adapters that suit it, fused by gates",
            "demo": "open a page that does the same, on this machine only",
            "report": "write the report of a run as one HTML page",
            "index": "index a folder of adapters, so that prompts find them",
            "search": "find the adapters that suit a prompt, or are like another one",
            "inspect": "say what an adapter holds, who reads it, and why it may do nothing",
            "convert": "write an adapter in the format of another program, smaller if wanted",
            "resize": "write an adapter of any model with lower ranks",
            "merge": "make one adapter of several, of any model",
        },
        stop="apps.diffusion.tour:tour",
        extras=("diffusion", "demo"),
    ),
    "language": App(
        "apps.language.commands",
        "train small decoders; add experts, gates and adapters to models of transformers",
        {
            "prepare": "write the tokens of a corpus as memory maps, or make trees of ListOps",
            "fit": "train the decoder, resumable at any step",
            "evaluate": "run a study: bits per byte, blocks of keys, adapters, offload, caches",
            "report": "write the report of a run as one HTML page",
            "generate": "continue prompts, streamed to the terminal",
            "diagnose": "measure by layer how a trained model attends, and its gates",
            "distill": "distill gates that choose blocks of keys from a frozen model",
            "calibrate": "choose by head how many blocks of a prompt are read, and by what",
            "fit-gates": "train output gates on the attention of a trained model",
            "pregate": "fine-tune a mixture model whose gates read the input of an earlier layer",
            "adapt": "train an adapter of a trained model on labeled texts: SoRA and its rivals",
            "scbench": "ask a context several times by policies of the KV cache: SCBench",
            "predict": "label texts with an adapter",
            "export": "write an adapter as a plain LoRA that PEFT opens",
            "offload": "run a mixture model whose experts stay on disk: Fate and its rivals",
            "classify": "recognize digits in recordings, and show which tokens attend",
            "convert": "read and write folders of Llama, Qwen3, Mixtral and Qwen3-MoE",
            "plan": "estimate weights, arithmetic, memory and exchange on many GPUs",
        },
        stop="apps.language.tour:tour",
        extras=("language", "pretrained"),
    ),
    "study": App(
        "apps.study.commands",
        "test what papers claim of training with gates, in minutes, each claim with a verdict",
        {
            "gaussian-rates": "measure how fast gate and experts of a Gaussian mixture are found",
            "gates": "compare every routing gate of the core on pairs of digits",
            "comet": "tune COMET, its permutations and rivals alike, and compare them",
            "dense-to-sparse": "compare how gates cool and harden, and activation gates",
            "evomoe": "train EvoMoE, its ablations and rivals on bytes with equal FLOPs",
            "report": "write the report of a run as one HTML page",
        },
        stop="apps.study.tour:tour",
        extras=("recsys", "language"),
    ),
    "tour": App(
        "apps.tour",
        "show every application in minutes, on real, rendered and simulated data, with one page",
    ),
    "doctor": App(
        "apps.doctor", "list versions, devices and extras, and how to install what is missing"
    ),
}


def main(arguments: Sequence[str] | None = None, apps: Mapping[str, App] = APPS) -> int:
    """Run ``gates APP VERB ...`` and return the exit code.

    Args:
        arguments: Command line without the program name; ``sys.argv`` when omitted.
        apps: The table of applications.

    Returns:
        0 on success, 1 when a check failed, 2 when the user can fix the command, 130 after Ctrl-C,
        141 when the reader of the output, such as ``head``, has left.
    """
    try:
        code = _dispatch(arguments, apps)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141
    return code


def _reader_left() -> bool:
    """Return whether the reader of the output has left; the rest of it is then discarded."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _dispatch(arguments: Sequence[str] | None, apps: Mapping[str, App]) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(apps))
        return 0
    name, rest = words[0], words[1:]
    if name in ("-V", "--version"):
        print(_version())
        return 0
    if name not in apps:
        return _unknown("gates", "application", name, apps)
    app = apps[name]
    if app.verbs:
        if not rest or rest[0] in ("-h", "--help", "help"):
            print(_app_help(name, app))
            return 0
        if rest[0] not in app.verbs:
            return _unknown(f"gates {name}", "verb", rest[0], app.verbs)
    return _run(name, apps, rest, debug=debug)


def _run(name: str, apps: Mapping[str, App], rest: list[str], *, debug: bool) -> int:
    """Import the application, run it, and turn expected failures into one line."""
    app = apps[name]
    try:
        importlib.import_module("harness.system").keep_freed_memory()
        errors = importlib.import_module("core_gates.errors")
        module = importlib.import_module(app.module)
        code = module.main(rest) if app.verbs else module.main(rest, apps)
        return int(code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        shown = _expected(name, app, error, errors)
        if debug or shown is None:
            raise
        verb = f" {rest[0]}" if app.verbs else ""
        print(f"gates {name}{verb}: error: {' '.join(str(shown).split())}", file=sys.stderr)
        return 2


def _expected(name: str, app: App, error: Exception, errors: Any) -> Exception | None:
    """Return what a failure is shown as in one line; None for a defect.

    A foreign package that is missing, at the start or later, becomes a ``MissingExtraError``.
    """
    if isinstance(error, ModuleNotFoundError) and not isinstance(error, errors.GatesError):
        package = (error.name or "").partition(".")[0]
        extra = app.extras[0] if app.extras else name
        return None if package in PACKAGES else errors.MissingExtraError(extra, package)
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
        return OSError(f"{os.strerror(error.errno)}: free some, or write elsewhere, as with --root")
    missing = isinstance(error, OSError) and error.filename is not None
    return error if missing or isinstance(error, errors.GatesError) else None


def _unknown(prog: str, kind: str, word: str, choices: Mapping[str, object]) -> int:
    """Print one line for a word that is not in the table and return exit code 2.

    What has the word in its summary is meant, else what is spelled nearly like it.
    """
    from difflib import get_close_matches

    matches = [
        n
        for n, choice in choices.items()
        if word in str(getattr(choice, "summary", choice)).split()
    ]
    close = " or ".join(matches or get_close_matches(word, choices, n=1))
    hint = f"did you mean {close}?" if close else f"choose from {', '.join(choices)}"
    print(f"{prog}: error: unknown {kind} {word!r} ({hint})", file=sys.stderr)
    return 2


def _overview(apps: Mapping[str, App]) -> str:
    with_verbs = {name: app.summary for name, app in apps.items() if app.verbs}
    without = {name: app.summary for name, app in apps.items() if not app.verbs}
    lines = ["usage: gates APP VERB [--config FILE] [--key value ...] [--debug]", ""]
    lines += ["applications:", *_columns(with_verbs), "", "commands:", *_columns(without), ""]
    lines += ["gates APP --help lists the verbs of an application,"]
    lines += ["gates APP VERB --help its options; --debug shows tracebacks."]
    return "\n".join(lines)


def _app_help(name: str, app: App) -> str:
    lines = [f"usage: gates {name} VERB [--config FILE] [--key value ...]", "", app.summary, ""]
    lines += ["verbs:", *_columns(app.verbs), ""]
    lines += [f"gates {name} VERB --help lists the options of a verb; --config NAME is looked up"]
    lines += ["in the working folder, then among the packaged configurations."]
    return "\n".join(lines)


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {key:<{width}}  {text}" for key, text in rows.items()]


def _version() -> str:
    from importlib.metadata import version

    return f"gatesuite {version('gatesuite')}"


if __name__ == "__main__":
    sys.exit(main())
