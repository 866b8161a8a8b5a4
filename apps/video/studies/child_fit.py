"""``gates video fit`` in a process that is watched, and may be killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from core_gates.errors import GatesError
from harness.files import write_json, write_text
from harness.runs.folder import RunFolder
from harness.system import dependent, resident
from recsys.experiments.mappings import nested

POLL = 0.01  # seconds
SAMPLED = 0.25  # seconds between two samples of memory, and two notes of what was spent
SPENT = ".spent.json"
PROGRAM = ("-m", "apps.main")
GROUPS = ("model", "data", "trainer", "checkpoint")


class Ended(NamedTuple):
    """How a training has ended.

    Attributes:
        seconds: That it took, with all killed attempts that it continues.
        peak: Most bytes in memory in any of them, see :func:`harness.system.resident`.
        killed: Whether it was killed from here.
    """

    seconds: float
    peak: int
    killed: bool


class ChildFit:
    """A training of the network of some settings, with its own run folder.

    Args:
        settings: Of the run, by dotted name.
        changes: Settings that differ.
        root: Folder of its run folder and configuration.
        name: Of the run folder.
        threads: Threads of each of its processes.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        changes: Mapping[str, Any],
        root: Path,
        name: str,
        threads: int = 1,
    ) -> None:
        self.folder = RunFolder("video", name, root)
        self.threads = threads
        wanted = {**settings, **changes}
        wanted.pop("data.seed", None)  # follows seed_everything
        content: dict[str, Any] = {group: nested(wanted, f"{group}.") for group in GROUPS}
        content["seed_everything"] = settings.get("seed", 0)
        self.config = write_text(root / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))

    def run(self, stop: Callable[[], bool] = lambda: False) -> Ended:
        """Train, from the last checkpoint where there is one, and wait for the end.

        Args:
            stop: Asked again and again; the process is killed by SIGKILL once it returns true.

        Raises:
            GatesError: The training failed.
        """
        log, (spent, peak) = self.config.with_suffix(".log"), self._spent()
        begin = sampled = time.monotonic()
        killed = False
        with log.open("wb") as output:
            process = self._started(output)
            try:
                while process.poll() is None:
                    if time.monotonic() - sampled > SAMPLED:
                        peak, sampled = max(peak, resident(process.pid)), time.monotonic()
                        self._note(spent + sampled - begin, peak)
                    if stop():
                        killed = process.poll() is None
                        break
                    time.sleep(POLL)
            finally:
                self._end(process)
        if process.returncode and not killed:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise GatesError(f"the training of {self.config} failed: {' '.join(last)}; see {log}")
        seconds = spent + time.monotonic() - begin
        self._note(seconds, peak)
        return Ended(seconds, peak, killed)

    def losses(self) -> dict[int, str]:
        """Return the logged training loss of each step, as it is written."""
        return {int(row["step"]): row["train/loss"] for row in self.rows() if row["train/loss"]}

    def rows(self) -> list[dict[str, str]]:
        """Return the log."""
        path = self.folder.metrics
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("step")]

    def logged(self) -> int:
        """Return the number of rows of the log, that of a line being written included."""
        path = self.folder.metrics
        return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0

    def log_file(self) -> int:
        """Return the number of the file of the log, another after a resume; 0 before the first."""
        path = self.folder.metrics
        return path.stat().st_ino if path.is_file() else 0

    def _spent(self) -> tuple[float, int]:
        """Return seconds and peak of the attempts that are continued."""
        path = self.config.with_suffix(SPENT)
        if not (self.folder.exists() and path.is_file()):
            return 0.0, 0
        found = json.loads(path.read_text(encoding="utf-8"))
        return float(found["seconds"]), int(found["peak"])

    def _note(self, seconds: float, peak: int) -> None:
        """Keep what was spent so far, for an attempt after a kill of this process, too."""
        write_json(self.config.with_suffix(SPENT), {"seconds": seconds, "peak": peak})

    def _started(self, output: Any) -> subprocess.Popen[bytes]:
        words = ["video", "fit", "--config", str(self.config)]
        words += ["--root", str(self.config.parent), "--name", self.folder.name]
        words += ["--resume"] if self.folder.exists() else []
        threads = {"OMP_NUM_THREADS": str(self.threads), "POLARS_MAX_THREADS": str(self.threads)}
        return subprocess.Popen(
            dependent([sys.executable, *PROGRAM, *words]),
            env={**os.environ, **threads},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers are killed with it
        )

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
