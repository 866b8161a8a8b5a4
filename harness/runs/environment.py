"""What a result was computed with: versions, machine, revision."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
    found = {"gatesuite_version": package_version("gatesuite"), "revision": git_revision()}
    return {name: value for name, value in found.items() if value is not None}


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


def git_revision() -> str | None:
    """Revision of the source tree, with ``-dirty`` for uncommitted changes.

    None outside git, and for an installed package that only lies inside another repository.
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
