"""Sizing networks for other runtimes: ONNX and torch.export, checked against PyTorch."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import NO_CALIBRATION, RESEARCH_ONLY, SizingBundle
from endoscopy.data.streams import ENDOSCOPY
from endoscopy.models.sizer import NUM_GEOMETRY, channels_of, fold
from harness.files.atomic import replacing, write_bytes

RTOL, ATOL = 1e-4, 1e-5  # of raw outputs, which are of order one
CHECKED = (1, 2, 5)  # numbers of frames


class PositionalSizer(nn.Module):
    """A network that takes its streams as tensors, in the order of their names.

    Args:
        model: Takes a dictionary of streams, and the geometry if ``geometry``.
        streams: Names, in order.
        geometry: Whether the last tensor is the geometry of the box.
    """

    def __init__(self, model: nn.Module, streams: Sequence[str], geometry: bool = False) -> None:
        super().__init__()
        self.model, self.streams, self.geometry = model, tuple(streams), geometry

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that forward takes."""
        return (*self.streams, "geometry") if self.geometry else self.streams

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the raw output (B, outputs)."""
        streams = dict(zip(self.streams, tensors, strict=False))
        return self.model(streams, tensors[-1] if self.geometry else None)


def exportable(bundle: SizingBundle) -> tuple[PositionalSizer, list[Tensor], dict[str, Any]]:
    """Return the folded network of a bundle, example tensors, and the metadata of its files.

    The metadata are the configuration of the bundle, the normalization of the streams, and the
    intended use.
    """
    streams, geometry = bundle.streams, bundle.model.geometry
    model = PositionalSizer(fold(bundle.model), streams, geometry).eval()
    size = bundle.image_size
    channels = channels_of(bundle.model.arguments["streams"])
    example = [torch.zeros(2, channels[name], size, size) for name in streams]
    if geometry:
        example.append(torch.zeros(2, NUM_GEOMETRY))
    mean, std = ENDOSCOPY
    metadata = bundle.config() | {
        "normalization": {"mean": list(mean), "std": list(std)},
        "intended_use": RESEARCH_ONLY,
        "note": f"{NO_CALIBRATION}: on sources of a scope that calibrated_for does not name",
    }
    return model, example, metadata


def export_program(model: PositionalSizer, example: Sequence[Tensor]) -> ExportedProgram:
    """Export a network with torch.export for any number of frames.

    Args:
        model: For evaluation; fold its gates first (`endoscopy.models.sizer.fold`).
        example: Its tensors, of at least two frames.

    Raises:
        GatesError: The network is in training mode, or the program computes other values.
    """
    if model.training:
        raise GatesError("an exported network must be in evaluation mode: call eval() first")
    batch = Dim("batch", min=1)
    dynamic = (tuple({0: batch} for _ in example),)
    program = torch.export.export(model, tuple(example), dynamic_shapes=dynamic)
    run = program.module()
    _check(model, example, lambda tensors: run(*tensors).detach().numpy(), "the exported program")
    return program


def save_program(program: ExportedProgram, path: str | Path) -> Path:
    """Write an exported program (``.pt2``); the file is complete or absent."""
    path = Path(path)
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)
    return path


def export_onnx(
    model: PositionalSizer,
    example: Sequence[Tensor],
    path: str | Path,
    metadata: Mapping[str, Any],
) -> Path:
    """Write a network as ONNX for any number of frames, and check it with onnxruntime.

    Inputs are named like the streams; the output is ``raw``.

    Args:
        model: For evaluation; fold its gates first.
        example: Its tensors, of at least two frames.
        path: Where to write; the file is complete or absent.
        metadata: Written into the file as JSON, one entry per key: target, scope, normalization.

    Raises:
        GatesError: The network is in training mode, or onnxruntime computes other values.
        MissingExtraError: A package of the extra is not installed.
    """
    onnx, onnxruntime = _packages()
    program = export_program(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(model.names),
            output_names=["raw"],
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> np.ndarray:
        inputs = dict(zip(model.names, (tensor.numpy() for tensor in tensors), strict=True))
        return np.asarray(session.run(["raw"], inputs)[0])

    _check(model, example, run, "onnxruntime")
    return write_bytes(Path(path), content)


def _check(model: nn.Module, example: Sequence[Tensor], run: Any, name: str) -> None:
    """Compare outputs with PyTorch for several numbers of frames."""
    generator = torch.Generator().manual_seed(0)
    for count in CHECKED:
        shapes = [(count, *tensor.shape[1:]) for tensor in example]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        with torch.no_grad():
            expected = model(*tensors).numpy()
        outputs = run(tensors)
        if not np.allclose(outputs, expected, rtol=RTOL, atol=ATOL):
            difference = float(np.abs(outputs - expected).max())
            raise GatesError(
                f"{name} differs from PyTorch by {difference:.2g} on {count} frames, expected "
                f"less than {ATOL:g}; report the versions that `gates doctor` prints"
            )


def _packages() -> tuple[Any, Any]:
    """Return onnx and onnxruntime."""
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 - which the exporter of PyTorch imports

    return onnx, onnxruntime
