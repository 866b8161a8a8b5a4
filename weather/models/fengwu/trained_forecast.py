"""The network as a forecast model, physical states and their spread, and how it is stored."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core_gates.errors import GatesError, check_positive
from harness.files import replacing
from weather.models.fengwu.network import FRAMES, FengWu, Prediction
from weather.models.leapfrog import num_steps
from weather.state import ChannelSpec, Normalizer


class NextState(NamedTuple):
    """What is expected one step later, in physical units.

    Attributes:
        mean: (B, C, H, W).
        sd: (B, C, H, W), the standard deviation that the network states.
    """

    mean: Tensor
    sd: Tensor


class FengWuForecast(nn.Module):
    """Wrap `FengWu` with its units, so that it can replace the model in a cycle.

    ``x(t + step) = x(t) + s * mean`` and its standard deviation ``s * exp(log_variance / 2)``, s
    being the standard deviation of what a channel changes by in one step. Where the earlier of the
    two frames is not known, it is taken to be the current one; training contains such cases.

    Args:
        network: The network.
        normalizer: Mean and standard deviation of every channel.
        increment_sd: (C,) standard deviation of the change of every channel in one step.
        step_hours: Hours of one step, and between the two frames.

    Attributes:
        channels: Channels of the states, where they are known.

    Raises:
        ValueError: The step is not positive, or the statistics are those of other channels.
    """

    frames = FRAMES

    def __init__(
        self,
        network: FengWu,
        normalizer: Normalizer,
        increment_sd: Tensor,
        *,
        step_hours: float = 6.0,
    ) -> None:
        check_positive(step_hours=step_hours)
        expected = (network.num_channels,)
        for name, value in (("normalizer", normalizer.mean), ("increment_sd", increment_sd)):
            if tuple(value.shape) != expected:
                raise ValueError(f"{name} must hold {expected} values, found {tuple(value.shape)}")
        super().__init__()
        self.network, self.normalizer, self.step_hours = network, normalizer, step_hours
        self.channels: ChannelSpec | None = None
        self.register_buffer("increment_sd", increment_sd.detach().clone())
        self.increment_sd: Tensor

    def forward(self, states: Tensor, hours: float, previous: Tensor | None = None) -> Tensor:
        """Return the states some hours later.

        Args:
            states: (N, C, H, W), physical units.
            hours: A multiple of the step; 0 returns the states.
            previous: The states one step earlier.

        Returns:
            (N, C, H, W) in the dtype of ``states``.

        Raises:
            ValueError: A shape does not fit the network, or the hours no number of steps.
        """
        for following in itertools.islice(
            self.rollout(states, previous), num_steps(hours, self.step_hours)
        ):
            states = following.mean
        return states

    def rollout(self, states: Tensor, previous: Tensor | None = None) -> Iterator[NextState]:
        """Yield what is expected after one step, two steps and so on, without an end.

        Every step starts from the mean of the one before. The spread is that of one step.

        Args:
            states: (N, C, H, W), physical units.
            previous: The states one step earlier.
        """
        previous = states if previous is None else previous
        while True:
            following = self.next_state(previous, states)
            yield following
            previous, states = states, following.mean

    def next_state(self, previous: Tensor, current: Tensor) -> NextState:
        """Return what is expected one step after ``current``, in its dtype."""
        change, scale = self.change(previous, current), self._scale(current)
        return NextState(
            current + scale * change.mean.to(current),
            scale * (change.log_variance.to(current) / 2).exp(),
        )

    def change(self, previous: Tensor, current: Tensor) -> Prediction:
        """Return the distribution of the change, in units of ``increment_sd``.

        The network computes in its own dtype.
        """
        frames = (self.normalizer.normalize(frame).to(self.dtype) for frame in (previous, current))
        prediction: Prediction = self.network(*frames)
        return prediction

    def scaled_change(self, current: Tensor, following: Tensor) -> Tensor:
        """Return what `change` should have predicted."""
        return (following - current) / self._scale(current)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes."""
        return next(self.network.parameters()).dtype

    def _scale(self, like: Tensor) -> Tensor:
        return self.increment_sd.to(like)[:, None, None]


KIND = "fengwu"
ADVICE = "give a file that `gates weather train-forecast` has written, or train again"


class ForecastForm:
    """Keeps a forecast model as ``forecast.safetensors``, see `save_forecast`."""

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
        forecast = FengWuForecast(
            network, units, torch.ones(count), step_hours=float(facts["step_hours"])
        )
        if facts.get("channels"):
            forecast.channels = ChannelSpec(**facts["channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise GatesError(
            f"{path}: a forecast model that cannot be built ({error}); {ADVICE}"
        ) from error
    expected = forecast.state_dict()
    wrong = sorted(set(expected) ^ set(tensors)) or [
        name for name, value in expected.items() if value.shape != tensors[name].shape
    ]
    damaged = wrong or [name for name, value in tensors.items() if not value.isfinite().all()]
    if damaged:
        what = "missing, unknown or of another shape" if wrong else "not finite"
        raise GatesError(
            f"{path}: {len(damaged)} tensors are {what}, first {damaged[0]}, expected the "
            f"{len(expected)} of its network; {ADVICE}"
        )
    forecast.load_state_dict(
        {name: tensors[name].to(value.dtype) for name, value in expected.items()}
    )
    return forecast.eval().requires_grad_(False)


class TrainedForecast(FengWuForecast):
    """A forecast model that was trained before, for configurations.

    Args:
        path: File of `save_forecast`.

    Raises:
        GatesError: The file is missing or damaged, or holds something else.
    """

    def __init__(self, path: str) -> None:
        loaded = load_forecast(path)
        super().__init__(
            loaded.network, loaded.normalizer, loaded.increment_sd, step_hours=loaded.step_hours
        )
        self.channels = loaded.channels
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
