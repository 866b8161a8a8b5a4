"""``gates video serve``, ``loadtest``, ``export``: a model over HTTP, under load, for others."""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from apps.video.commands import place_of
from core_gates.errors import GatesError, check_positive
from harness.command.verbs import Place, refuse_existing
from harness.evidence import Bar, Row
from harness.experiment import Scores, print_scores, write_scores
from harness.files import write_json
from harness.runs.terminal import working
from recsys.model_folder import load_model
from recsys.table_scorer import read_model
from video_multitask.service.contract import Limits
from video_multitask.service.ranking_scorer import (
    ScoredRequests,
    Unknown,
    loader,
    rows_for_requests,
)

LIMITS = Limits()
MANIFEST = "current.json"
SAME = 1e-6  # difference of a probability that counts as none
Format = Literal["torch", "aoti", "onnx"]


def serve(
    place: Place,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    fused: dict[str, float] | None = None,
    offsets: dict[str, float] | None = None,
    unknown: Unknown = "refuse",
    limits: Limits = LIMITS,
    int8: bool = False,
    threads: int = 1,
    poll_s: float = 1.0,
) -> None:
    """Serve a model: POST /score ranks candidates, GET /healthz, /readyz and /metrics watch it.

    A new content of the model folder, or of the folder that a link or a file {"folder": NAME}
    names, is loaded and put into service without a pause; if it cannot be loaded, the old model
    stays. Ctrl-C and SIGTERM end the service after the requests that it has accepted.

    Args:
        place: Filled in by the command line.
        model: Folder of the model, link or JSON file; by default that of the run.
        host: Address of this machine; 0.0.0.0 for all of them.
        port: Port; 0 takes a free one.
        fused: Exponents of tasks; adds the fused score, the product of (offset + p) ^ exponent.
        offsets: Numbers by task that the fused score adds to its probability.
        unknown: Whether requests with values that training has not seen, such as new ids, are
            refused, lose the candidates that have one, or are scored with the row of unknown
            values; the answer counts them.
        limits: What protects the service, and how it forms batches.
        int8: Keep embedding tables as 8-bit integers in memory.
        threads: Threads of the network.
        poll_s: Seconds between two looks at the model folder.
    """
    from video_multitask.service.server import Service, bind, log_to_stderr
    from video_multitask.service.server import serve as run

    if threads < 1 or not poll_s > 0:
        raise GatesError(f"--threads and --poll_s must be positive, found {threads} and {poll_s}")
    torch.set_num_threads(threads)
    log_to_stderr()
    model_path = place_of(place, model)
    with bind(host, port) as bound:
        service = Service(model_path, loader(fused, offsets, unknown, int8=int8), limits, poll_s)
        print(f"model: {service.models.current.version}")
        run(service, bound, partial(print, flush=True))


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How much is asked.

    Attributes:
        candidates: Candidates of a request.
        requests: Number of distinct requests.
        clients: Clients, each of which waits for its answer before it asks again.
        seconds: Duration of the load with the swap.
        slice_s: Seconds of each slice with and without batching.
        slices: Pairs of slices.

    Raises:
        ValueError: A number is not positive.
    """

    candidates: int = 20
    requests: int = 64
    clients: int = 50
    seconds: float = 30.0
    slice_s: float = 3.0
    slices: int = 4

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(**dataclasses.asdict(self))


LOAD = LoadOptions()


def loadtest(
    place: Place,
    model: str | None = None,
    swap_to: str | None = None,
    rows: str | None = None,
    load: LoadOptions = LOAD,
    threads: int = 1,
) -> None:
    """Serve a model on this machine, put it under load, and swap the model in the middle.

    Prints errors, throughput, latency, growth of resident memory, the gain of batching over single
    requests, and the largest difference from what gates video score gives for the same rows.
    Clients run on the same machine.

    Args:
        place: Filled in by the command line.
        model: Folder of the model; by default that of the run.
        swap_to: Model that replaces it; a copy of it by default.
        rows: Parquet or CSV file whose rows become requests; made-up rows by default.
        load: How much is asked.
        threads: Threads of the network.
    """
    from video_multitask.service.load_test import LoadTest

    first = place_of(place, model).resolve()
    with tempfile.TemporaryDirectory(prefix="gates-loadtest-") as temporary:
        second = Path(swap_to).resolve() if swap_to else Path(temporary) / f"{first.name}-copy"
        if not swap_to:
            shutil.copytree(first, second)
        asked = ScoredRequests({m.version: m for m in map(read_model, (first, second))})
        count = load.candidates * load.requests
        asked.make(rows_for_requests(asked.first, count, rows), load.candidates)
        manifest = Path(temporary) / MANIFEST
        write_json(manifest, {"folder": str(first)})
        verdict = LoadTest(
            lambda batching: _command(manifest, threads, batching),
            asked.bodies,
            swap=lambda: write_json(manifest, {"folder": str(second)}),
            difference=asked.difference,
            clients=load.clients,
            seconds=load.seconds,
            slice_s=load.slice_s,
            slices=load.slices,
            during=working,
        ).run()
    if verdict.first_error:
        print(f"first error: {verdict.first_error}")
    notes = [f"{name} {number:g}" for name, number in dataclasses.asdict(load).items()]
    scores = Scores(_rows(verdict), _bars(verdict), notes=notes)
    path = place.run_folder.path / "loadtest" / "scores.json"
    print_scores(write_scores(path, scores, app="video", config_path=None), scores)


def _command(manifest: Path, threads: int, batching: bool) -> Sequence[str]:
    words = ["--model", str(manifest), "--port", "0", "--poll_s", "0.2", "--threads", str(threads)]
    words += ["--unknown", "score"]  # as `score` does with the rows of a file
    if not batching:
        words += ["--limits.max_batch_requests", "1", "--limits.max_wait_ms", "0"]
    return [sys.executable, "-m", "apps.main", "video", "serve", *words]


def _rows(verdict: Any) -> list[Row]:
    figures = {
        "requests": verdict.requests,
        "requests/s": verdict.throughput,
        "p50 ms": verdict.p50_ms,
        "p99 ms": verdict.p99_ms,
        "batching gain": verdict.batching_gain,
        "memory growth": verdict.growth,
        "difference": verdict.difference,
    }
    return [Row("service", "load with a swap", name, float(v)) for name, v in figures.items()]


def _bars(verdict: Any) -> list[Bar]:
    return [
        Bar("requests without a proper answer", verdict.errors, "<=", 0),
        Bar("models that answered", verdict.versions, ">=", 2),
        Bar("growth of resident memory", verdict.growth, "<=", 0.05),
        Bar("throughput with batching over without", verdict.batching_gain, ">=", 1.5),
        Bar("difference from score", verdict.difference, "<=", SAME),
    ]


def export(
    place: Place,
    model: str | None = None,
    formats: tuple[Format, ...] = ("torch", "onnx"),
    output: str | None = None,
    int8: bool = False,
    overwrite_output: bool = False,
) -> None:
    """Write a trained network for torch.export, AOTInductor or ONNX, checked against eager.

    Batch normalization is folded into the weights and the batch size is dynamic. Each file is read
    again and compared with the network on 1, 37 and 500 rows. Files that exist are replaced when
    all formats are complete.

    Args:
        place: Filled in by the command line.
        model: Model folder; that which `fit` left in the run if null.
        formats: What is written: ``torch``, ``aoti`` (a compiled package for this machine),
            ``onnx``.
        output: Folder that is written; the folder ``exported`` of the run if null.
        int8: Keep embedding tables as 8-bit integers with a scale per row.
        overwrite_output: Replace files that exist.
    """
    from recsys.export import (
        SUFFIXES,
        export_forms,  # imports the compiler
    )

    source = place_of(place, model)
    folder = Path(output) if output else place.run_folder.path / "exported"
    ranker = load_model(source).ranker
    paths = {suffix: folder / f"model{SUFFIXES[suffix]}" for suffix in formats}
    for path in paths.values():
        refuse_existing(path, overwrite=overwrite_output)
    with working(f"exporting and checking {', '.join(formats)}"):
        forms = export_forms(ranker, paths, int8=int8)
    for made in forms:
        print(made.path)
