"""``python -m benchmarks.run --suite NAME``: time a suite, print it, write CSV and JSON."""

import argparse
import csv
import gc
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from benchmarks.comparison import (
    ROUNDS,
    SAMPLE_SECONDS,
    BaseTree,
    Call,
    Comparison,
    Figure,
    Peaks,
    Timing,
    interleave,
    limit_calls,
    load_head,
    mixed,
    ratio,
)
from benchmarks.suites import SUITES, Suite, find_op, load_suite
from core_gates.errors import GatesError
from harness.experiment.scores import number
from harness.files.atomic import write_json, write_text
from harness.runs.cost import peak_bytes
from harness.runs.folder import device_name, processor_name

Row = dict[str, Any]

_VERDICTS = {
    None: " [red]not measured[/]",
    True: " [green]met[/]",
    False: " [red]missed[/]",
}


class Result(TypedDict):
    """The JSON output: the device, and the rows."""

    device: str
    rows: list[Row]


def tables(title: str, result: Result) -> Group:
    """Return one table for each comparison.

    Args:
        title: Name of the suite or op.
        result: What was measured.
    """
    shown: list[RenderableType] = [f"[bold]{escape(title)}[/] on {escape(result['device'])}"]
    for comparison, rows in groupby(result["rows"], lambda row: row["name"].partition(" · ")[0]):
        shown.append(_table(comparison, rows))
    return Group(*shown)


def _table(comparison: str, rows: Iterable[Row]) -> Table:
    shown = Table(
        title=f"\n{escape(comparison)}", title_justify="left", title_style="bold", box=None
    )
    shown.add_column("", min_width=22)
    for column in ("value", "unit", "ratio", "of limit", "bar"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        share, ratio, bar = row["share_of_limit"], row["ratio"], row["bar"]
        shown.add_row(
            escape(row["name"].partition(" · ")[2]),
            number(row["value"]),
            row["unit"],
            "" if ratio is None else f"{ratio:.3f}",
            "" if share is None else f"{100 * share:.0f} %",
            "" if bar is None else f"<= {bar:g}{_VERDICTS[row['met']]}",
        )
    return shown


def write_csv(folder: Path, name: str, result: Result) -> Path | None:
    """Write ``<name>-<device>.csv``; nothing where nothing was measured.

    Args:
        folder: Folder of the results.
        name: Name of the suite or op.
        result: What was measured.
    """
    if not result["rows"]:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, ["device", *result["rows"][0]], lineterminator="\n")
    writer.writeheader()
    for row in result["rows"]:
        short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({"device": result["device"], **short})
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return write_text(folder / f"{name}-{device}.csv", text.getvalue())


ROOT = Path(__file__).parent
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "67108864",
}

CACHES = ("CORE_GATES_CACHE", "TORCHINDUCTOR_CACHE_DIR")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite or the comparisons of one op.

    Args:
        arguments: Command line; that of the process when None.

    Returns:
        0; 1 if the suite's tests fail; 2 for a wrong command.
    """
    options = _parse(arguments)
    try:
        suite = load_suite(options.suite) if options.suite else find_op(options.op)
        if not options.force and not _tests_pass(suite):
            print(f"{suite.name}: its tests fail; fix them, or time anyway with --force")
            return 1
        threads = options.threads or suite.threads
        if threads:
            torch.set_num_threads(threads)
        device = torch.device("cpu") if suite.threads else _torch_device()
        rows = _measure_all(suite, device, options.base, options.rounds)
    except GatesError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    result: Result = {"device": _device(device), "rows": rows}
    Console().print(tables(suite.name, result))
    write_csv(ROOT / "results", suite.name, result)
    if options.json:
        print(write_json(options.json, result))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=str(__doc__))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", help=f"one of {', '.join(SUITES)}")
    what.add_argument("--op", help="the comparisons of one op, from every suite")
    parser.add_argument("--base", metavar="REV", help="compare with this revision of the library")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON, too")
    parser.add_argument("--threads", type=int, help="threads of torch (1: single-thread)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each variant")
    parser.add_argument("--force", action="store_true", help="time even if the tests fail")
    return parser.parse_args(arguments)


def _tests_pass(suite: Suite) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *suite.tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT.parent, env=environment, check=False)
    return done.returncode == 0


def _measure_all(suite: Suite, device: torch.device, base: str | None, rounds: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, _empty_caches(Path(folder)):
        tree = BaseTree(base, Path(folder), ROOT.parent) if base else None
        for comparison in suite.comparisons():
            free = available_memory()
            if free is not None and comparison.memory > 0.5 * free:
                need = f"{comparison.memory / 2**30:.1f} GiB"
                print(f"{comparison.name}: skipped, needs {need}, half of the free memory is less")
                continue
            rows += measure(comparison, tree, base or "", rounds, device)
            gc.collect()
    return rows


@contextmanager
def _empty_caches(folder: Path) -> Iterator[None]:
    """Drop all compiled code, so that first calls are first calls."""
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ.update({name: str(folder / name.lower()) for name in CACHES})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def measure(
    comparison: Comparison,
    tree: BaseTree | None = None,
    base: str = "",
    rounds: int = ROUNDS,
    device: torch.device | None = None,
) -> list[Row]:
    """Time one comparison, its limits among it.

    Args:
        comparison: What to time.
        tree: Another revision to compare every variant with.
        base: Its name.
        rounds: Samples of each variant.
        device: Where it runs, for the limits; the GPU if there is one, when None.

    Returns:
        Rows as in the JSON output: one a variant, one a rate, one a first call that compiles, one a
        tail, one a variant that is absent.
    """
    device = device or _torch_device()
    calls: dict[str, Call] = dict(comparison.build(load_head))
    names = [*calls, *comparison.mixtures]
    baseline = None if comparison.baseline in comparison.absent else comparison.baseline
    references: dict[str, str | None] = dict.fromkeys(names, baseline)
    if tree is not None:
        theirs = {f"{name}@{base}": call for name, call in comparison.build(tree).items()}
        their_baseline = None if baseline is None else f"{baseline}@{base}"
        references = {name: f"{name}@{base}" for name in names}
        references |= dict.fromkeys((f"{name}@{base}" for name in names), their_baseline)
        calls.update(theirs)
    limits, amounts = limit_calls(device) if comparison.work else ({}, {})
    single = comparison.single_calls
    timings = interleave(
        {**calls, **limits},
        rounds=rounds * single or rounds,
        sample_seconds=0.0 if single else SAMPLE_SECONDS,
        clock=_clock(device),
        first_clock=time.perf_counter,
    )
    for name in references.keys() - calls.keys():
        plain, _, revision = name.partition("@")
        timings[name] = mixed(timings, comparison.mixtures[plain], revision)
    floor = _floor(comparison, timings, amounts)
    rows: list[Row] = []
    for name in references:
        rows.append(_row(comparison, name, references[name], timings, floor))
        if comparison.rate:
            rate = _units(comparison, name) / timings[name].median
            rows.append(_plain(comparison, f"{name}, rate", rate, comparison.rate))
    compiled = [name for name in comparison.first_calls if name in timings]
    rows += [_plain(comparison, f"{n}, first call", 1e3 * timings[n].first, "ms") for n in compiled]
    for make, some in ((_limited, comparison.seconds), (_tail, comparison.tails)):
        rows += [make(comparison, name, timings[name]) for name in some]
    for name, other in comparison.also.items():
        rows.append(_row(comparison, name, other, timings, None, f"{name}, over {other}"))
    rows += peak_rows(comparison, comparison.peaks, calls) if comparison.peaks else []
    rows += [_figure(comparison, name, figure) for name, figure in comparison.figures.items()]
    absent = [f"{name}: {reason}" for name, reason in comparison.absent.items()]
    return rows + [_plain(comparison, name, None, f"ms/{comparison.unit}") for name in absent]


def _floor(
    comparison: Comparison, timings: Mapping[str, Timing], amounts: Mapping[str, float]
) -> float | None:
    """Seconds that the machine needs at least for one call, by what it managed just now."""
    if comparison.work is None:
        return None
    stream = amounts["stream"] / timings["stream"].median
    gemm = amounts["gemm"] / timings["gemm"].median
    return max(comparison.work.bytes / stream, comparison.work.flops / gemm)


def _row(
    comparison: Comparison,
    name: str,
    reference: str | None,
    timings: Mapping[str, Timing],
    floor: float | None,
    title: str = "",
) -> Row:
    units = _units(comparison, name)
    relative = None
    if reference is not None:
        relative = ratio(timings[name], timings[reference]) * _units(comparison, reference) / units
    bar = comparison.bars.get(name) if reference in (None, comparison.baseline) else None
    seconds = timings[name].median
    return {
        "name": f"{comparison.name} · {title or name}",
        "value": 1e3 * seconds / units,
        "unit": f"ms/{comparison.unit}",
        "baseline": reference,
        "ratio": relative,
        "limit": None if floor is None else 1e3 * floor / units,
        "share_of_limit": None if floor is None else floor / seconds,
        "bar": bar,
        "met": None if bar is None or relative is None else relative <= bar,
    }


def peak_rows(comparison: Comparison, peaks: Peaks, calls: Mapping[str, Call]) -> list[Row]:
    """Return a row per variant whose memory is measured: what it needs beyond the baseline."""
    base = peak_bytes(calls[comparison.baseline])
    rows = []
    for name, bar in peaks.bars.items():
        extra = peak_bytes(calls[name]) - base
        row = _plain(comparison, f"{name}, extra peak memory", extra / 1e6, "MB")
        ratio = extra / peaks.whole
        met = None if bar is None else ratio <= bar
        rows.append(row | {"baseline": peaks.name, "ratio": ratio, "bar": bar, "met": met})
    return rows


def _units(comparison: Comparison, name: str) -> float:
    return comparison.units.get(name.partition("@")[0], 1.0)


def _tail(comparison: Comparison, name: str, timing: Timing) -> Row:
    """Return the 99th percentile of the times of a variant, relative to their median."""
    late = statistics.quantiles(timing.seconds, n=100, method="inclusive")[-1]
    bar, ratio = comparison.tails[name], late / timing.median
    row = _plain(comparison, f"{name}, 99th percentile", 1e3 * late, f"ms/{comparison.unit}")
    return row | {"baseline": name, "ratio": ratio, "bar": bar, "met": ratio <= bar}


def _limited(comparison: Comparison, name: str, timing: Timing) -> Row:
    """Return the time of a unit of work over the most that it may take."""
    most = comparison.seconds[name]
    ratio = timing.median / _units(comparison, name) / most
    row = _plain(comparison, f"{name}, a {comparison.unit}", 1e3 * ratio * most, "ms")
    return row | {"baseline": f"{most:g} s", "ratio": ratio, "bar": 1.0, "met": ratio <= 1}


def _figure(comparison: Comparison, name: str, figure: Figure) -> Row:
    """Return a figure that is not a time."""
    value = figure.measure()
    ratio = value / figure.whole
    row = _plain(comparison, name, value, figure.unit)
    return row | {"baseline": figure.name, "ratio": ratio, "bar": figure.bar,
                  "met": ratio <= figure.bar}  # fmt: skip


def _plain(comparison: Comparison, title: str, value: float | None, unit: str) -> Row:
    empty = dict.fromkeys(("baseline", "ratio", "limit", "share_of_limit", "bar", "met"))
    return {"name": f"{comparison.name} · {title}", "value": value, "unit": unit, **empty}


def available_memory() -> int | None:
    """Bytes that are free for a new allocation, or None where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    match = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text(encoding="utf-8"))
    return int(match.group(1)) * 1024 if match else None


def _torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _clock(device: torch.device) -> Callable[[], float]:
    """CPU seconds of this process where it has one thread: others on the machine do not count."""
    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if single else time.perf_counter


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return device_name()
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def keep_freed_memory() -> None:
    """Restart this process with a malloc that keeps freed memory, as training should, too.

    Returning large buffers to the system and getting them back page by page is otherwise a good
    part of some calls, and the noisiest. A malloc other than that of glibc ignores the settings.
    """
    if not KEEP_MEMORY.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEEP_MEMORY)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
