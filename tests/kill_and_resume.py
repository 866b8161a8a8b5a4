"""Trainings that are killed and resumed, held bit for bit against unbroken ones."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


def harness(tmp_path: Path) -> Callable[..., Path]:
    """Kill a ``fit`` at random steps, resume it, and hold it bit for bit against an unbroken run.

    Call it with a command such as ``["gates", "weather", "fit", "--config", "tiny"]``; it appends
    ``--root``, ``--name`` and ``--resume``. Weights, optimizer, schedules, random states, loop
    progress and ``metrics.csv`` must be equal. It returns the folder of the resumed run. ``rows``
    names the rows of the log after which it is killed, instead of random ones.
    """

    def check(
        command: Sequence[str],
        *,
        app: str,
        seed: int = 0,
        kills: int = 2,
        rows: Sequence[int] | None = None,
    ) -> Path:
        whole = _run_folder(tmp_path / "whole", app)
        broken = _run_folder(tmp_path / "broken", app)
        _finish([*command, "--root", str(tmp_path / "whole"), "--name", "run"])
        total = _rows(whole)
        draw = random.Random(seed)
        steps = rows or sorted(draw.sample(range(1, max(2, total - 2)), kills))
        for number, step in enumerate(steps):
            resume = ["--resume"] if number else []
            _kill(
                [*command, "--root", str(tmp_path / "broken"), "--name", "run", *resume],
                broken,
                step,
            )
        assert _rows(broken) < total, "the process had finished before it could be killed"
        _finish([*command, "--root", str(tmp_path / "broken"), "--name", "run", "--resume"])
        assert (whole / "metrics.csv").read_bytes() == (broken / "metrics.csv").read_bytes()
        for name in sorted(path.name for path in (whole / "checkpoints").glob("*.ckpt")):
            assert_same_checkpoint(whole / "checkpoints" / name, broken / "checkpoints" / name)
        return broken

    return check


def assert_same_checkpoint(first: Path, second: Path) -> None:
    left, right = (dict(_leaves(torch.load(p, weights_only=True))) for p in (first, second))
    assert left.keys() == right.keys()
    different = [key for key in left if not _same(left[key], right[key])]
    assert not different


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (left, right)]
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)
    return bool(left == right)


def _run_folder(root: Path, app: str) -> Path:
    return root / app / "run"


def _rows(folder: Path) -> int:
    path = folder / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,  # so that the processes of other ranks are killed with it
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def _finish(command: Sequence[str]) -> None:
    process = _start(command)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()[-2000:]


def _kill(command: Sequence[str], folder: Path, step: int) -> None:
    process = _start(command)
    end = time.monotonic() + 300
    try:
        # A resumed run first cuts its log back, so wait until it has begun to write.
        started = (folder / "environment.json").stat().st_mtime_ns if folder.is_dir() else 0
        while process.poll() is None and time.monotonic() < end:
            marker = folder / "environment.json"
            began = marker.is_file() and marker.stat().st_mtime_ns != started
            if began and _rows(folder) > step:
                break
            time.sleep(0.001)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]  # type: ignore[union-attr]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
