"""What is compared, and timed alternately: variants of one computation, their limits and times."""

import importlib
import importlib.util
import re
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from core_gates.errors import GatesError

Load = Callable[[str], ModuleType]
Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What one call must at least do, for the fraction of the machine's limit.

    Attributes:
        bytes: Bytes that must be read and written.
        flops: Floating-point operations that must be done.
    """

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Peaks:
    """What variants need of memory at once beyond the baseline, on the CPU.

    Attributes:
        bars: Variant -> largest extra peak over ``whole``; None for a figure without a bar.
        whole: Bytes that the extra peak is compared with.
        name: What these bytes are.
    """

    bars: Mapping[str, float | None]
    whole: float
    name: str


@dataclass(frozen=True)
class Figure:
    """What else is measured once, such as an error or the memory of a process.

    Attributes:
        measure: Returns the figure.
        unit: Its unit.
        bar: Largest figure over ``whole``.
        whole: What the figure is compared with, in its unit.
        name: What this is.
    """

    measure: Callable[[], float]
    unit: str
    bar: float
    whole: float = 1.0
    name: str = "1"


@dataclass(frozen=True)
class Comparison:
    """Variants of one computation, timed alternately.

    Attributes:
        name: What is computed.
        op: Name under which ``--op`` finds it.
        build: Makes the inputs and returns the variants, name to function. It gets a function that
            imports a module, of this tree or of the one that ``--base`` names.
        baseline: The variant that the ratios refer to; without ratios if it is absent.
        bars: Highest ratio to the baseline that a variant may have.
        work: What one call must do; None where no limit makes sense.
        units: How many units of work a call of a variant does (members, days), one if not named;
            times are given per unit.
        unit: Unit of work, for the name of the figure.
        rate: Unit of a second figure for every variant, units of work in a second; empty for none.
        first_calls: Variants whose first call is reported too, since it compiles.
        absent: Variants that cannot be timed here, name to reason; reported, never passed over.
        memory: Bytes needed at once; a comparison that does not fit is skipped.
        single_calls: That many single calls of every variant, interleaved, take the place of one
            sample, for differences smaller than the drift of the machine between two samples.
        tails: Variants whose 99th percentile of the times is compared with their median, name to
            highest ratio; with ``single_calls``, so that there are enough of them.
        mixtures: Further variants, name to the weight of each variant that their time is made of.
        also: Variants whose ratio to another variant is reported, too, without a bar.
        peaks: Memory of variants; None if it is not measured.
        seconds: Variants whose time is limited, name to the most seconds of a unit of work.
        figures: What else is measured after the times, by name.
    """

    name: str
    op: str
    build: Callable[[Load], Mapping[str, Call]]
    baseline: str
    bars: Mapping[str, float] = field(default_factory=dict)
    work: Work | None = None
    units: Mapping[str, float] = field(default_factory=dict)
    unit: str = "call"
    rate: str = ""
    first_calls: Sequence[str] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    memory: float = 0.0
    single_calls: int = 0
    tails: Mapping[str, float] = field(default_factory=dict)
    mixtures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    peaks: Peaks | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)


ROUNDS = 7
SAMPLE_SECONDS = 0.1


class Timing(NamedTuple):
    """Times of one variant.

    Attributes:
        seconds: Seconds a call, one entry per round.
        first: Seconds of the very first call.
    """

    seconds: list[float]
    first: float

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    sample_seconds: float = SAMPLE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    first_clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time every call once a round, so that a busy moment affects all of them.

    A sample repeats short calls until it lasts ``sample_seconds``. The order is turned around every
    round, so that no call always follows the same neighbor.

    Args:
        calls: Functions by name.
        rounds: Samples of each.
        sample_seconds: Least duration of a sample.
        clock: Clock in seconds.
        first_clock: Clock of the first call, which may compile in other processes; ``clock`` if
            None.
    """
    first: dict[str, float] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        first[name] = _sample(call, 1, first_clock or clock)
        repeats[name] = max(1, round(sample_seconds / max(_sample(call, 1, clock), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            seconds[name].append(_sample(calls[name], repeats[name], clock) / repeats[name])
    return {name: Timing(seconds[name], first[name]) for name in calls}


def mixed(timings: Mapping[str, Timing], shares: Mapping[str, float], revision: str = "") -> Timing:
    """Time of a call that is a weighted sum of others, of another revision if one is named."""
    suffix = f"@{revision}" if revision else ""
    parts = [(share, timings[name + suffix]) for name, share in shares.items()]
    seconds = [[share * second for second in timing.seconds] for share, timing in parts]
    first = sum(share * timing.first for share, timing in parts)
    return Timing([sum(each) for each in zip(*seconds, strict=True)], first)


def ratio(timing: Timing, baseline: Timing) -> float:
    """Median over the rounds of the ratio within each round."""
    pairs = zip(timing.seconds, baseline.seconds, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def limit_calls(device: torch.device) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The machine's limits as calls to be timed among the others.

    Returns:
        The calls ``gemm`` (float32 matmul) and ``stream`` (copy of a large array), and the
        floating-point operations and the bytes of one call of each.
    """
    size, length = (4096, 2**28) if device.type == "cuda" else (768, 2**24)
    left, right = (torch.rand(size, size, device=device) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.rand(length, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "gemm": lambda: torch.mm(left, right, out=product),
        "stream": lambda: target.copy_(source),
    }
    return calls, {"gemm": 2.0 * size**3, "stream": 8.0 * length}


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    _wait()
    begin = clock()
    for _ in range(repeats):
        call()
    _wait()
    return clock() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


PACKAGES = ("core_gates", "endoscopy", "weather")


def load_head(name: str) -> ModuleType:
    """Import a module of this tree."""
    return importlib.import_module(name)


class BaseTree:
    """The packages of another revision under separate names, ``core_gates_base`` and so on.

    Imports and the names of registered operators are rewritten, so that both revisions live in one
    process and can be timed alternately.

    Args:
        revision: Any revision that git knows.
        folder: Empty folder for the sources.
        repository: A folder of the repository.

    Raises:
        GatesError: Git does not know the revision.
    """

    def __init__(self, revision: str, folder: Path, repository: Path) -> None:
        root = ["git", "-C", str(repository)]
        folders = _git([*root, "ls-tree", "--name-only", "--full-tree", revision], revision)
        self.packages = [p for p in PACKAGES if p in folders.decode().split()]
        top = _git([*root, "rev-parse", "--show-toplevel"], revision).decode().strip()
        archive = _git(["git", "-C", top, "archive", revision, "--", *self.packages], revision)
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        for package in self.packages:
            target = folder / f"{package}_base"
            (folder / package).rename(target)
            for path in target.rglob("*.py"):
                path.write_text(self._rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
        for package in self.packages:
            _install(f"{package}_base", folder / f"{package}_base")

    def __call__(self, name: str) -> ModuleType:
        """Import a module of the other revision by its usual name."""
        package, dot, rest = name.partition(".")
        return importlib.import_module(f"{package}_base{dot}{rest}")

    def _rewrite(self, source: str) -> str:
        names = "|".join(self.packages)
        source = re.sub(rf"(?m)^(\s*(?:from|import)\s+)({names})\b", r"\1\2_base", source)
        source = re.sub(rf"([\"'])({names})(::|\.)", r"\1\2_base\3", source)
        return re.sub(rf"\btorch\.ops\.({names})\b", r"torch.ops.\1_base", source)


def _install(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise GatesError(f"{folder} holds no package")
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _git(command: list[str], revision: str) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        raise GatesError(f"--base {revision!r} cannot be read: {reason[0] if reason else 'git'}")
    return done.stdout
