"""Exported rankers, loaded again without the code of their network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from core_gates.errors import GatesError, MissingExtraError, check_option
from recsys.export.parity import Score

SUFFIXES = {"torch": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx"}


def load_exported(path: Path, form: str = "") -> Score:
    """Return the function of an exported ranker: sparse, dense and sequences to logits (B, T).

    Args:
        path: File of :func:`~recsys.export.exporting.export_ranker`.
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about itself
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
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("export", "onnxruntime") from error
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
