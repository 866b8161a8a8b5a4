"""Running a function of a test file on several gloo processes."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

WORKER = Path(__file__).with_name("worker.py")
GRACE = 10.0  # seconds that the other ranks get to fail by themselves, once one has failed


def run_on_ranks(
    function: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 120.0
) -> list[Any]:
    """Call ``function(*args)`` in each of ``world_size`` processes joined by gloo.

    Inside, ``torch.distributed`` is initialized, and the environment is that of ``torchrun``, so
    that a ``lightning.Trainer(strategy="ddp", devices=world_size)`` uses these processes.

    Args:
        function: A function at the top level of a test file; the file is imported anew.
        args: Tensors, numbers, strings, and lists, tuples or dictionaries of them.
        world_size: Number of processes.
        timeout: Seconds after which all are killed.

    Returns:
        What each rank returned (of the same types as ``args``), in order.

    Raises:
        ValueError: The function is not at the top level of its file.
        RuntimeError: A rank raised or died; the message holds the traceback of each failed rank.
        TimeoutError: The ranks did not end in time.
    """
    name = function.__qualname__
    if not name.isidentifier():
        raise ValueError(f"{name} must be a function at the top level of its file")
    source = Path(function.__code__.co_filename).resolve()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder) / "args.pt")
        logs = [(Path(folder) / f"log{rank}.txt").open("w+") for rank in range(world_size)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(source), name, folder],
                env=os.environ | _environment(rank, world_size),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            in_time = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            output = [_read(log) for log in logs]
        if not in_time:
            raise TimeoutError(f"{name} did not end within {timeout:g} s:\n" + "\n".join(output))
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            raise RuntimeError("\n".join(f"rank {rank} failed:\n{output[rank]}" for rank in failed))
        return [
            torch.load(Path(folder) / f"result{rank}.pt", weights_only=True)
            for rank in range(world_size)
        ]


def _environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_RUN_ID": "tests",  # by this Lightning knows torchrun
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Return once all have ended, or one has failed and the others had their grace."""
    deadline = time.monotonic() + timeout
    failure_seen = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if now > deadline:
            return False
        if failure_seen is None and any(process.poll() for process in processes):
            failure_seen = now
        if failure_seen is not None and now > failure_seen + GRACE:
            return True
        time.sleep(0.02)
    return True


def _read(log: IO[str]) -> str:
    with log:
        log.seek(0)
        return log.read()
