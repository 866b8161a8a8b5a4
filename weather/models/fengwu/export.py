"""A trained forecast model as ONNX, in the layout in which FengWu was published."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, MissingExtraError
from harness.files.atomic import write_bytes
from weather.models.fengwu.forecast import FengWuForecast
from weather.models.fengwu.published import INPUT, MEAN_FILE, STD_FILE

OUTPUT = "output"
TOLERANCE = 1e-4  # of normalised states, which are of order one


class PublishedLayout(nn.Module):
    """Two normalised states as one tensor in, the next one and its log variance out.

    Args:
        forecast: The forecast model.

    Shape:
        (1, 2 C, H, W), the earlier frame first, to (1, 2 C, H, W): mean, then log variance, of
        normalised states.
    """

    def __init__(self, forecast: FengWuForecast) -> None:
        super().__init__()
        self.network = forecast.network
        scale = (forecast.increment_sd / forecast.normalizer.std)[:, None, None]
        self.register_buffer("scale", scale)
        self.scale: Tensor

    def forward(self, frames: Tensor) -> Tensor:
        """Return the next state and its log variance, normalised."""
        previous, current = frames.chunk(2, dim=1)
        change = self.network(previous, current)
        log_variance = change.log_variance + 2 * self.scale.log()
        return torch.cat((current + self.scale * change.mean, log_variance), dim=1)


def export_forecast(forecast: FengWuForecast, path: str | Path) -> Path:
    """Write a forecast model as ONNX with ``data_mean.npy`` and ``data_std.npy`` next to it.

    The file takes and returns what the published ``fengwu_v2.onnx`` does, for the channels and the
    grid of this network: `weather.models.fengwu.published.PublishedForecast` reads both.

    Args:
        forecast: In evaluation mode.
        path: File to write; it appears when it is complete and gives what PyTorch gives.

    Returns:
        The path.

    Raises:
        GatesError: The network is in training mode, or onnxruntime computes other values.
        MissingExtraError: A package of the extra ``export`` is not installed.
    """
    path = Path(path)
    if forecast.training:
        raise GatesError("an exported network must be in evaluation mode: call eval() first")
    onnx, onnxruntime = _packages()
    network = forecast.network
    layout = PublishedLayout(forecast)
    draw = torch.Generator().manual_seed(0)
    shape = (1, 2 * network.num_channels, *network.grid_shape)
    example = torch.randn(shape, generator=draw).to(forecast.dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        exported = torch.onnx.export(
            torch.export.export(layout, (example,)),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
        expected = layout(example).numpy()
    assert exported is not None
    onnx.checker.check_model(exported.model_proto, full_check=True)
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run([OUTPUT], {INPUT: example.numpy()})[0]
    difference = float(np.abs(found - expected).max())
    if not difference < TOLERANCE:
        raise GatesError(
            f"onnxruntime differs from PyTorch by {difference:.2g}, expected less than "
            f"{TOLERANCE:g}; report the versions that `gates doctor` prints"
        )
    statistics = {MEAN_FILE: forecast.normalizer.mean, STD_FILE: forecast.normalizer.std}
    for name, values in statistics.items():
        buffer = io.BytesIO()
        np.save(buffer, values.float().numpy())
        write_bytes(path.with_name(name), buffer.getvalue())
    return write_bytes(path, content)


def _packages() -> tuple[Any, Any]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError("export", package) from error
    import onnx
    import onnxruntime

    return onnx, onnxruntime
