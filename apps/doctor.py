"""``gates doctor``: what is missing and how to get it, what it runs on, what is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError

if TYPE_CHECKING:
    from apps.main import App

DISTRIBUTION = "gatesuite"


class Finding(NamedTuple):
    """The state of one package that an extra asks for.

    Attributes:
        extra: The extra, or ``base``.
        package: Name of the distribution.
        wanted: Version range, for example ``>=3.0.4``.
        found: Installed version, or None.
    """

    extra: str
    package: str
    wanted: str
    found: str | None

    @property
    def fine(self) -> bool:
        """Whether it is installed in a version that is wanted."""
        if self.found is None:
            return False
        return Requirement(f"{self.package}{self.wanted}").specifier.contains(self.found, True)


def main(arguments: Sequence[str], apps: Mapping[str, App]) -> int:
    """Print the state of the installation.

    Args:
        arguments: ``--help`` or nothing.
        apps: The table of applications, whose extras are needed; those of developers are not.

    Returns:
        0 if everything that the base and the applications need is there, else 1.

    Raises:
        GatesError: An argument that is not known.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: gates doctor\n\nlist versions, devices and extras, and how to get the rest")
        return 0
    if arguments:
        raise GatesError(f"doctor takes no arguments, found {arguments[0]!r}")
    console = Console()
    packages = findings()
    needed = {"base"}.union(*(app.extras for app in apps.values()))
    code = _advise(console, packages, needed)
    console.print(_facts("machine", machine()))
    console.print(_packages(packages))
    return code


def findings() -> list[Finding]:
    """Every package that the distribution asks for on this platform, by extra.

    Raises:
        GatesError: The distribution itself is not installed.
    """
    try:
        lines = requires(DISTRIBUTION) or []
        extras = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except PackageNotFoundError as error:
        raise GatesError(
            f"{DISTRIBUTION} is not installed: pip install '{DISTRIBUTION}[all]'"
        ) from error
    packages: list[Finding] = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            packages.append(_finding("base", requirement))
            continue
        wanting = [e for e in extras if e != "all" and marker.evaluate({"extra": e})]
        packages += [_finding(extra, requirement) for extra in wanting]
    return packages


def machine() -> dict[str, str]:
    """Versions and devices as text."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts = {
        "python": f"{platform.python_version()} in {sys.prefix}",
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()}, {torch.get_num_threads()} used by torch",
        "memory": _memory(),
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
    }
    for index, gpu in enumerate(gpus):
        facts[f"GPU {index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not gpus:
        facts["GPU"] = "none: everything runs on the processor"
    facts["Triton"] = _triton(bool(gpus))
    facts["C++ compiler"] = _compiler()
    return facts


def _finding(extra: str, requirement: Requirement) -> Finding:
    try:
        installed: str | None = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    return Finding(extra, requirement.name, str(requirement.specifier), installed)


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _triton(gpu: bool) -> str:
    """Triton is imported in a separate process: a broken build must not take this one along."""
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return "not installed: the reference definitions are used"
    where = "kernels on the GPU" if gpu else "kernels only through its interpreter, in tests"
    return f"{done.stdout.strip()}, {where}"


def _compiler() -> str:
    from core_gates.errors import GatesError
    from core_gates.ops._native import compiler

    try:
        return f"{' '.join(compiler())}, for kernels('cpp') and torch.compile on the processor"
    except GatesError:
        return "none: kernels('cpp') and torch.compile on the processor need one, such as g++"


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    return table


def _packages(packages: list[Finding]) -> Table:
    table = Table("extra", "package", "wanted", "found", title="packages", title_justify="left")
    last = None
    for item in sorted(packages, key=lambda f: (f.extra != "base", f.extra)):
        shown = f"[green]{item.found}[/]" if item.fine else f"[red]{item.found or 'missing'}[/]"
        table.add_row(item.extra if item.extra != last else "", item.package, item.wanted, shown)
        last = item.extra
    return table


def _advise(console: Console, checked: list[Finding], needed: Collection[str]) -> int:
    lacking: dict[str, list[str]] = {}
    for item in checked:
        if not item.fine:
            found_here = f" ({item.found}, wanted {item.wanted})" if item.found else ""
            lacking.setdefault(item.extra, []).append(f"{item.package}{found_here}")
    for extra, packages in sorted(lacking.items(), key=lambda item: item[0] not in needed):
        wanted = DISTRIBUTION if extra == "base" else f"'{DISTRIBUTION}[{extra}]'"
        console.print(
            f"{extra}: {', '.join(packages)} missing or too old: pip install {escape(wanted)}"
        )
    if not lacking:
        console.print("[green]everything is there[/]")
    return int(any(extra in needed for extra in lacking))
