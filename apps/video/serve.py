"""``gates video serve``: rank candidates over HTTP."""

from __future__ import annotations

from functools import partial

import torch

from apps.video.serving.model import place_of
from apps.video.serving.ranking_scorer import Unknown, loader
from core_gates.errors import GatesError, MissingExtraError
from harness.command.verbs import Place
from video_multitask.service.contract import Limits

LIMITS = Limits()


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
            refused, or scored with the row of unknown values and counted in the answer.
        limits: What protects the service, and how it forms batches.
        int8: Keep embedding tables as 8-bit integers in memory.
        threads: Threads of the network.
        poll_s: Seconds between two looks at the model folder.
    """
    try:
        from video_multitask.service.server import Service, bind, log_to_stderr
        from video_multitask.service.server import serve as run
    except ImportError as error:
        raise MissingExtraError("serve", str(error.name)) from error
    if threads < 1 or not poll_s > 0:
        raise GatesError(f"--threads and --poll_s must be positive, found {threads} and {poll_s}")
    torch.set_num_threads(threads)
    log_to_stderr()
    found = place_of(place, model)
    with bind(host, port) as bound:
        service = Service(found, loader(fused, offsets, unknown, int8=int8), limits, poll_s)
        print(f"model: {service.models.current.version}")
        run(service, bound, partial(print, flush=True))
