"""Rankers for other runtimes: torch.export, AOTInductor, ONNX; written, checked, loaded again."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export

from core_gates.errors import GatesError, MissingExtraError, check_option
from core_gates.ops import kernels
from harness.files import replacing
from recsys.embedding.lookup import MISSING
from recsys.inputs import Rows
from recsys.ranker import Ranker

BATCHES = (1, 37, 500)
TOLERANCE = 1e-5

Score = Callable[..., Tensor]
"""From sparse, dense and sequences to logits (B, T), as `Ranker.forward`."""


def random_rows(ranker: Ranker, number: int, *, seed: int = 0) -> Rows:
    """Return rows that a ranker can read: any rows of its tables, histories of any length.

    Args:
        ranker: Ranker.
        number: Number of rows B.
        seed: Of the random numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    bank, (first, *_) = ranker.banks[0], ranker.input_layers
    fields = [bank.sizes[field.table] for field in bank.fields]
    sparse = [torch.randint(size, (number,), generator=draw) for size in fields]
    sequences = []
    for history in first.histories:
        size, length = bank.sizes[bank.field(history.of).table], history.max_length
        events = torch.randint(size, (number, length), generator=draw)
        count = torch.randint(length + 1, (number, 1), generator=draw)
        sequences.append(events.masked_fill(torch.arange(length) < length - count, MISSING))
    return Rows(
        torch.stack(sparse, 1) if sparse else torch.empty(number, 0, dtype=torch.int64),
        torch.randn(number, ranker.dense_width, generator=draw),
        tuple(sequences),
    )


@torch.no_grad()
def largest_gaps(
    ranker: Ranker, score: Score, batches: Sequence[int] = BATCHES
) -> dict[int, float]:
    """Return the largest difference between the logits of two rankers, by batch size.

    Differences are relative to 1 + |logit|.

    Args:
        ranker: In evaluation mode.
        score: What is compared with it.
        batches: Numbers of rows.
    """
    gaps = {}
    for number in batches:
        rows = random_rows(ranker, number, seed=number)
        expected, exported = ranker(*rows), score(*rows)
        gaps[number] = float(((exported - expected).abs() / (1 + expected.abs())).max())
    return gaps


def check_parity(ranker: Ranker, score: Score, form: str) -> dict[int, float]:
    """Return the largest gap to the exported ranker by batch size; refuse one above 1e-5.

    Raises:
        GatesError: One is not.
    """
    gaps = largest_gaps(ranker, score)
    for number, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise GatesError(
                f"the ranker exported as {form} is off by {gap:.2g} at a batch of {number} rows, "
                f"more than {TOLERANCE:g}: use another form, and report this"
            )
    return gaps


SUFFIXES = {"torch": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}


def load_exported(path: Path, form: str = "") -> Score:
    """Return the function of an exported ranker: sparse, dense and sequences to logits (B, T).

    Args:
        path: File of `recsys.export.export_ranker`.
        form: ``torch``, ``aoti`` or ``onnx``; that of the suffix if empty.

    Raises:
        GatesError: The file is absent, damaged or of no known form, or a package is missing.
        ValueError: The form is unknown.
    """
    if not form:
        fitting = [name for name, suffix in SUFFIXES.items() if path.name.endswith(suffix)]
        if not fitting:
            raise GatesError(f"{path} is no exported ranker: it ends in none of .pt2 and .onnx")
        form = max(fitting, key=lambda name: len(SUFFIXES[name]))
    check_option("form", form, SUFFIXES)
    if not path.is_file():
        raise GatesError(f"{path} does not exist: name a file that was exported")
    try:
        with warnings.catch_warnings(action="ignore"):  # of PyTorch about itself
            return _LOADERS[form](path)
    except (GatesError, MemoryError):
        raise
    except Exception as error:  # PyTorch and ONNX Runtime each raise their own errors
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(f"{path} cannot be loaded: {line}; export it again") from error


def _load_torch(path: Path) -> Score:
    return _without_gradients(torch.export.load(path).module())


def _load_aoti(path: Path) -> Score:
    from torch._inductor import aoti_load_package

    return _without_gradients(aoti_load_package(str(path)))


def _load_onnx(path: Path) -> Score:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def score(sparse: Tensor, dense: Tensor, sequences: Sequence[Tensor] = ()) -> Tensor:
        values = [value.numpy() for value in (sparse, dense, *sequences)]
        return torch.from_numpy(session.run(None, dict(zip(names, values, strict=True)))[0])

    return score


def _without_gradients(run: Callable[..., Any]) -> Score:
    def score(sparse: Tensor, dense: Tensor, sequences: Sequence[Tensor] = ()) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, run(sparse, dense, tuple(sequences)))

    return score


_LOADERS: dict[str, Callable[[Path], Score]] = {
    "torch": _load_torch,
    "aoti": _load_aoti,
    "onnx": _load_onnx,
}


Form = Literal["torch", "aoti", "onnx"]

OPSET = 18
ONNX_BYTES = 2**31
COMPILERS = ("g++", "clang++")


class Exported(NamedTuple):
    """An exported ranker.

    Attributes:
        path: Its file.
        form: Its form.
        gaps: Largest relative difference from the eager ranker, by number of rows.
    """

    path: Path
    form: Form
    gaps: dict[int, float]


def export_ranker(
    ranker: Ranker, path: Path, form: Form = "torch", *, int8: bool = False
) -> Exported:
    """Write a ranker with any number of rows in a batch, and compare it with the eager one.

    Batch normalization is folded into the weights. Histories have the length that the schema names.
    The file takes ``sparse``, ``dense`` and each history, and gives ``logits``.

    Args:
        ranker: Trained.
        path: File, with the suffix of the form: ``.pt2`` of ``torch.export``, which PyTorch loads;
            ``.aoti.pt2``, compiled for this machine by AOTInductor; ``.onnx``.
        form: ``torch``, ``aoti`` or ``onnx``.
        int8: Whether tables are 8-bit integers with a scale per row.

    Raises:
        GatesError: A compiler or package is missing or fails, the suffix is another, or the
            exported ranker differs by more than 1e-5 at 1, 37 or 500 rows.
        ValueError: The form is unknown.
    """
    return export_forms(ranker, {form: path}, int8=int8)[0]


def export_forms(
    ranker: Ranker, paths: Mapping[Form, Path], *, int8: bool = False
) -> list[Exported]:
    """Write a ranker in several forms, of which all are complete before any takes its place.

    Args:
        ranker: Trained.
        paths: File of each form, see `export_ranker`.
        int8: Whether tables are 8-bit integers with a scale per row.

    Raises:
        GatesError: See `export_ranker`; files that exist stay as they are.
        ValueError: A form is unknown.
    """
    for form, path in paths.items():
        check_option("form", form, SUFFIXES)
        if not path.name.endswith(SUFFIXES[form]):
            raise GatesError(f"{path}: the file of form {form} must end in {SUFFIXES[form]}")
        _check_tools(form)
    folded = ranker.folded(int8=int8).cpu()
    made = []
    with _quiet(), kernels("reference"), ExitStack() as files:
        program = _traced(folded)
        for form, path in paths.items():
            temporary = files.enter_context(replacing(path))
            _write(form, program, folded, temporary)
            gaps = check_parity(folded, load_exported(temporary, form), form)
            made.append(Exported(path, form, gaps))
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what PyTorch and ONNX say about themselves."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _check_tools(form: Form) -> None:
    """Refuse before anything expensive is done."""
    if form == "aoti":
        wanted = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
        if not any(shutil.which(name) for name in wanted):
            raise GatesError(
                f"AOTInductor needs a C++ compiler, and {' or '.join(wanted)} is not on the PATH: "
                "install one, or export as torch or onnx"
            )
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError("export", package)


def _traced(ranker: Ranker) -> ExportedProgram:
    """Return the graph of a ranker for any number of rows."""
    rows = random_rows(ranker, 7)
    batch = {0: Dim("batch", min=1)}
    shapes = (batch, batch, tuple(batch for _ in rows.sequences))
    try:
        return export(ranker, tuple(rows), dynamic_shapes=shapes, strict=False)
    except (UserError, RuntimeError, ValueError) as error:
        raise GatesError(
            f"a {type(ranker.net).__name__} cannot be exported for any number of rows: "
            f"{str(error).partition(chr(10))[0]}; write x.shape[0] instead of len(x) in its forward"
        ) from error


def _write(form: Form, program: ExportedProgram, ranker: Ranker, path: Path) -> None:
    """Write one file; what a compiler says in many lines becomes one."""
    try:
        _WRITERS[form](program, ranker, path)
    except (GatesError, MemoryError, OSError):
        raise
    except Exception as error:  # Inductor, its compilers and ONNX each raise their own errors
        others = " or ".join(other_form for other_form in _WRITERS if other_form != form)
        raise GatesError(
            f"a {type(ranker.net).__name__} cannot be exported as {form}: {_reason(error)}; export "
            f"it as {others}, and report this"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first error of a compiler, or the first line."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = (line.partition("error: ")[2] for line in lines if "error: " in line)
    return shorten(next(said, lines[0]), 200, placeholder=" …")


def _write_torch(program: ExportedProgram, ranker: Ranker, path: Path) -> None:  # noqa: ARG001
    torch.export.save(program, path)


def _write_aoti(program: ExportedProgram, ranker: Ranker, path: Path) -> None:  # noqa: ARG001
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def _write_onnx(program: ExportedProgram, ranker: Ranker, path: Path) -> None:
    size = sum(value.numel() * value.element_size() for value in ranker.state_dict().values())
    if size > ONNX_BYTES:
        raise GatesError(
            f"the weights are {size / 1e9:.1f} GB and an ONNX file holds 2.1: export with int8, or "
            "as torch or aoti"
        )
    names = ["sparse", "dense", *(history.name for history in ranker.schema.sequences)]
    made: Any = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=names, output_names=["logits"],
        verbose=False,
    )  # fmt: skip
    made.save(str(path))


_WRITERS: dict[str, Callable[[ExportedProgram, Ranker, Path], None]] = {
    "torch": _write_torch,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}
