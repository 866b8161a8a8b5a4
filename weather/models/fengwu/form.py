"""How a trained forecast model is stored: its weights, its units and what it takes to use them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import replacing
from weather.models.fengwu.forecast import FengWuForecast
from weather.models.fengwu.network import FengWu
from weather.state import ChannelSpec, Normalizer

KIND = "fengwu"
ADVICE = "give a file that `gates weather train-forecast` has written, or train again"


class ForecastForm:
    """Keeps a forecast model as ``forecast.safetensors``, see :func:`save_forecast`."""

    SUFFIX = ".safetensors"
    FILE = f"forecast{SUFFIX}"

    def save(self, folder: Path, result: FengWuForecast) -> None:
        """Write the weights as bfloat16, with what the network is."""
        save_forecast(folder / self.FILE, result)

    def load(self, folder: Path) -> FengWuForecast:
        """Return the model, ready for use.

        Raises:
            GatesError: The file is missing or damaged.
        """
        return load_forecast(folder / self.FILE)


def save_forecast(path: str | Path, forecast: FengWuForecast) -> None:
    """Write the weights as bfloat16 and the units as float32, atomically."""
    tensors = {
        name: (value.bfloat16() if name.startswith("network.") else value.float()).contiguous()
        for name, value in forecast.state_dict().items()
    }
    facts = {
        "kind": KIND,
        "network": forecast.network.arguments,
        "step_hours": forecast.step_hours,
    }
    if forecast.channels is not None:
        facts["channels"] = dataclasses.asdict(forecast.channels)
    with replacing(Path(path)) as partial:
        # One entry gives the same bytes every time: safetensors writes several in random order.
        save_file(tensors, partial, metadata={"forecast": json.dumps(facts, sort_keys=True)})


def load_forecast(path: str | Path) -> FengWuForecast:
    """Read a forecast model in evaluation mode, whose weights take no gradients.

    Raises:
        GatesError: The file is missing or damaged, holds something else, or a weight is not finite.
    """
    facts, tensors = _read(Path(path))
    try:
        network = FengWu(**facts["network"])
        count = network.num_channels
        units = Normalizer(torch.zeros(count), torch.ones(count))
        step_hours = float(facts["step_hours"])
        forecast = FengWuForecast(network, units, torch.ones(count), step_hours=step_hours)
        if facts.get("channels"):
            forecast.channels = ChannelSpec(**facts["channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise GatesError(
            f"{path}: a forecast model that cannot be built ({error}); {ADVICE}"
        ) from error
    own = forecast.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or [
        name for name, value in own.items() if value.shape != tensors[name].shape
    ]
    damaged = wrong or [name for name, value in tensors.items() if not value.isfinite().all()]
    if damaged:
        what = "missing, unknown or of another shape" if wrong else "not finite"
        raise GatesError(
            f"{path}: {len(damaged)} tensors are {what}, first {damaged[0]}, expected the "
            f"{len(own)} of its network; {ADVICE}"
        )
    forecast.load_state_dict({name: tensors[name].to(value.dtype) for name, value in own.items()})
    return forecast.eval().requires_grad_(False)


class TrainedForecast(FengWuForecast):
    """A forecast model that was trained before, for configurations.

    Args:
        path: File of :func:`save_forecast`.

    Raises:
        GatesError: The file is missing or damaged, or holds something else.
    """

    def __init__(self, path: str) -> None:
        found = load_forecast(path)
        super().__init__(
            found.network, found.normalizer, found.increment_sd, step_hours=found.step_hours
        )
        self.channels = found.channels
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode: a cycle trains the assimilation alone."""
        return super().train(False)


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("forecast", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise GatesError(f"{path}: not readable as a forecast model ({error}); {ADVICE}") from error
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise GatesError(f"{path}: weights of something else than a forecast model; {ADVICE}")
    return facts, tensors
