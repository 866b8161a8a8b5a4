"""The folder of a run: one place for its configuration, log, scores, checkpoints and report.

``environment.json`` states what its results were computed with: versions, machine, revision.
"""

import os
import platform
import subprocess
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from core_gates.errors import GatesError
from harness.files.atomic import locked, remove, write_json, write_text

PACKAGES = ("gatesuite", "torch", "lightning", "numpy", "xarray", "zarr", "triton")


def environment() -> dict[str, Any]:
    """Versions, device and revision, as written into ``environment.json``."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": device_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_revision(),
    }


def made_by() -> dict[str, str]:
    """Version and revision of the package, as attributes of what it makes; known ones only."""
    facts = {"gatesuite_version": package_version("gatesuite"), "revision": git_revision()}
    return {name: value for name, value in facts.items() if value is not None}


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """Name of the accelerator, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


def processor_name() -> str:
    """Name of the processor with the number of its cores."""
    return f"{_processor()} ({os.cpu_count()} cores)"


@cache
def git_revision() -> str | None:
    """Revision of the source tree, with ``-dirty`` for uncommitted changes, at the first call.

    Later changes are none of what this process runs. None outside git, and for an installed package
    that only lies inside another repository.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


TRAINING = (
    "config.yaml", "environment.json", "record.json", "metrics.csv", "checkpoints", "tensorboard",
)  # fmt: skip
OUTCOME = ("scores.json", "scores.md", "report.html", "figures")
REPLACED = ".replaced"
"""Folder in a run of what ``overwrite`` replaces, until the new training is complete."""
MOVING, FORGOTTEN = ".replacing", ".forgotten"
"""Its names before all is in it, and once it is of no use."""


class RunFolder:
    """``<root>/<app>/<name>``: configuration, log, scores, checkpoints and report of one run.

    Nothing is touched before `open`. Files that other verbs leave, such as prepared data or
    tuned settings, are not part of a run: they do not prevent training and are never deleted.

    Args:
        app: Application.
        name: Name of the run; a single path component.
        root: Folder of all runs.
        resume: Continue an existing run.
        overwrite: Replace an existing run: its training, scores and report. They are back if the
            new training fails before its first checkpoint.
        verb: Verb that trains; the files of any but ``fit`` lie in a folder of its name.

    Attributes:
        claimed: Whether `open` has claimed it.

    Raises:
        GatesError: The name is not a plain name, or both ``resume`` and ``overwrite`` are asked
            for.
    """

    def __init__(
        self,
        app: str,
        name: str,
        root: str | Path = "runs",
        *,
        resume: bool = False,
        overwrite: bool = False,
        verb: str = "fit",
    ) -> None:
        if not name or Path(name).name != name or name in (".", ".."):
            raise GatesError(f"--name {name!r} must be a plain name without '/'")
        if resume and overwrite:
            raise GatesError("--resume and --overwrite exclude each other: give one of them")
        self.app, self.name = app, name
        self.path = Path(root) / app / name
        self.training = self.path if verb == "fit" else self.path / verb
        self.resume, self.overwrite = resume, overwrite
        self.claimed = False

    @property
    def config(self) -> Path:
        """The parsed configuration of the last ``fit``, which runs again as it stands."""
        return self.training / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The training log."""
        return self.training / "metrics.csv"

    @property
    def scores(self) -> Path:
        """The figures of ``evaluate``."""
        return self.path / "scores.json"

    @property
    def report(self) -> Path:
        """The page of ``report``."""
        return self.path / "report.html"

    @property
    def environment(self) -> Path:
        """Versions, machine and revision."""
        return self.training / "environment.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``last.ckpt`` and ``best.ckpt``."""
        return self.training / "checkpoints"

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, or None before the first one."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best validation score, or None."""
        path = self.checkpoints / "best.ckpt"
        return path if path.is_file() else None

    def exists(self) -> bool:
        """Whether the folder holds a training run."""
        return any((self.training / name).exists() for name in TRAINING)

    def check(self) -> None:
        """Refuse a folder that holds a run, unless it is to be resumed or overwritten.

        Raises:
            GatesError: It exists and neither ``resume`` nor ``overwrite`` was asked for.
        """
        if self.exists() and not (self.resume or self.overwrite):
            raise GatesError(
                f"run folder {self.training} exists: add --resume to continue, --overwrite to "
                "start again, or --name NEW for another run"
            )

    def refuse_deleting(self, needed: Path) -> None:
        """Refuse to overwrite what the new training needs.

        Args:
            needed: What it reads, such as the checkpoint that it starts from.

        Raises:
            GatesError: It would be deleted.
        """
        if not self.overwrite:
            return
        for path in self._replaced():
            if path.resolve() in (needed.resolve(), *needed.resolve().parents):
                raise GatesError(
                    f"{needed} lies in the run that --overwrite deletes: give --name NEW for "
                    "another run, or copy it elsewhere first"
                )

    def _replaced(self) -> list[Path]:
        """Return what is deleted when the run is overwritten."""
        training = [self.training / name for name in TRAINING]
        return [*training, *(self.path / name for name in OUTCOME)]

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes from training in the folder as long as the block runs.

        Raises:
            GatesError: Another process trains in it, or it cannot be written.
        """
        lock = self.training.with_name(f".{self.training.name}.lock")
        return locked(lock, self.training, "give --name NEW")

    def open(self) -> "RunFolder":
        """Claim the folder for a new or resumed training and write ``environment.json``.

        Raises:
            GatesError: See `check`.
        """
        self.check()
        self.claimed = True
        if self.overwrite:
            self._set_aside()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.environment, environment())
        return self

    def give_back(self) -> None:
        """Remove the claim of a training run without checkpoint, and put back what it replaced.

        A folder that this object has not claimed is left as it is.
        """
        if not self.claimed or self.last_checkpoint is not None:
            return
        for name in TRAINING:
            remove(self.training / name)
        if (self.path / REPLACED).exists():
            (self.path / REPLACED).replace(self.path / MOVING)
        self._put_back()
        for folder in (self.training, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def forget_replaced(self) -> None:
        """Delete what the training run has replaced, which is complete now."""
        remove(self.path / FORGOTTEN)
        if (self.path / REPLACED).exists():
            (self.path / REPLACED).replace(self.path / FORGOTTEN)
            remove(self.path / FORGOTTEN)

    def _set_aside(self) -> None:
        """Keep the old run, or if it is incomplete, rather the complete one that it replaced."""
        self._put_back()
        if (self.path / REPLACED).exists():
            for path in self._replaced():
                remove(path)
            return
        for path in self._replaced():
            if path.exists():
                _move(path, self.path / MOVING / path.relative_to(self.path))
        if (self.path / MOVING).exists():
            (self.path / MOVING).replace(self.path / REPLACED)

    def _put_back(self) -> None:
        """Undo a move that has not come to its end."""
        for path in self._replaced():
            kept = self.path / MOVING / path.relative_to(self.path)
            if kept.exists():
                remove(path)
                _move(kept, path)
        remove(self.path / MOVING)

    def write_config(self, text: str) -> Path:
        """Write ``config.yaml``."""
        return write_text(self.config, text)


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    path.replace(to)
