"""A forecast model in the ONNX layout of the published FengWu, as a forecast model of a cycle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.models.fengwu.network import FRAMES
from weather.models.leapfrog import num_steps
from weather.state import FENGWU, ChannelSpec, Normalizer
from weather.variables import check_range

MEAN_FILE, STD_FILE = "data_mean.npy", "data_std.npy"
FARTHEST = 8.0
"""Standard deviations by which the average over a field may differ from the climatological mean."""

ORDER = "the published order is u10, v10, t2m, msl, then z, q, u, v, t from 50 to 1000 hPa"


class PublishedForecast:
    """Run an ONNX file that takes two normalised states and returns the next one.

    The layout is that of ``fengwu_v1.onnx`` and ``fengwu_v2.onnx`` (OpenEarthLab/FengWu): one input
    (1, 2 C, H, W), the earlier state first, and one output whose first C channels are the next
    normalised state; what follows is the network's uncertainty. Normalisation is not in the file:
    mean and standard deviation lie next to it as ``data_mean.npy`` and ``data_std.npy``. Latitudes
    run from north to south.

    Every state that goes in or comes out is checked: finite, in the range of its variable, and its
    average within eight standard deviations of the climatological mean, so that a wrong unit or
    order of channels is named and not forecast.

    Args:
        path: The ONNX file.
        channels: Channels of a state in the order of the file.
        statistics: Mean and standard deviation of the channels; by default from the two files.
        step_hours: Hours of one step, and between the two states.

    Attributes:
        grid_shape: Rows and columns that the file is made for; None where it does not say.

    Raises:
        GatesError: A file is missing, damaged, or made for other channels.
        MissingExtraError: onnxruntime is not installed.
    """

    frames = FRAMES

    def __init__(
        self,
        path: str | Path,
        channels: ChannelSpec = FENGWU,
        statistics: Normalizer | None = None,
        *,
        step_hours: float = 6.0,
    ) -> None:
        self.path, self.channels, self.step_hours = Path(path), channels, step_hours
        self.session = _session(self.path)
        self.grid_shape = self._check_layout()
        self.normalizer = statistics or read_statistics(self.path.parent, channels)
        if len(self.normalizer.mean) != channels.num_channels:
            raise GatesError(
                f"{self.path}: statistics of {len(self.normalizer.mean)} channels, expected "
                f"{channels.num_channels}; give those of the file"
            )

    def __call__(self, states: Tensor, hours: float, previous: Tensor | None = None) -> Tensor:
        """Return the states some hours later.

        Args:
            states: (N, C, H, W), physical units, rows from north to south.
            hours: A multiple of the step; 0 returns the states.
            previous: The states one step earlier; where they are not known, the current ones.

        Returns:
            (N, C, H, W) in the dtype of ``states``, without gradients.

        Raises:
            GatesError: A state is of another shape or cannot be what its channels say.
            ValueError: The hours are no multiple of the step.
        """
        steps = num_steps(hours, self.step_hours)
        for following in itertools.islice(self.rollout(states, previous), steps):
            states = following
        return states

    def rollout(self, states: Tensor, previous: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the states (N, C, H, W) after one step, two steps and so on, without an end."""
        previous = states if previous is None else previous
        frames = [self._normalised(frame) for frame in (previous, states)]
        while True:
            following = self._next(*frames)
            result = self.normalizer.denormalize(following)
            self._check_states(result, "returned")
            yield result.to(states)
            frames = [frames[1], following]

    def _normalised(self, states: Tensor) -> Tensor:
        shape = (self.channels.num_channels, *(self.grid_shape or states.shape[2:]))
        if tuple(states.shape[1:]) != shape:
            raise GatesError(
                f"{self.path} takes states (N, {', '.join(map(str, shape))}), found "
                f"{tuple(states.shape)}: regrid the states, or give their channels"
            )
        plain = states.detach().to("cpu", torch.float64)
        self._check_states(plain, "was given")
        return self.normalizer.normalize(plain).float()

    def _next(self, previous: Tensor, current: Tensor) -> Tensor:
        port = self.session.get_inputs()[0]
        kind = np.float16 if "float16" in port.type else np.float32
        rows = []
        for frames in torch.cat((previous, current), dim=1).split(1):
            values = self.session.run(None, {port.name: frames.numpy().astype(kind)})[0]
            rows.append(torch.from_numpy(values[:, : self.channels.num_channels]).float())
        following = torch.cat(rows)
        if following.shape != current.shape:
            raise GatesError(
                f"{self.path} returned {tuple(following.shape)} from states "
                f"{tuple(current.shape)}: it is not in the layout of FengWu"
            )
        return following

    def _check_states(self, states: Tensor, what: str) -> None:
        """Refuse states (N, C, H, W) that are not finite or not what their channels say."""
        if not states.isfinite().all():
            bad = int((~states.isfinite()).flatten(2).any(-1).any(0).nonzero()[0])
            raise GatesError(
                f"{self.path} {what} values of {self.channels.labels[bad]} that are not finite, "
                "expected finite fields: fill what is missing"
            )
        low, high = states.amin((0, 2, 3)).tolist(), states.amax((0, 2, 3)).tolist()
        average = self.normalizer.normalize(states).mean((-2, -1)).abs().amax(0).tolist()
        for channel, (name, _) in enumerate(self.channels):
            label = self.channels.labels[channel]
            try:
                check_range(name, low[channel], high[channel])
            except GatesError as error:
                raise GatesError(f"{self.path} {what} an impossible {label}: {error}") from error
            if average[channel] > FARTHEST:
                raise GatesError(
                    f"{self.path} {what} a {label} that averages {average[channel]:.3g} standard "
                    f"deviations from its climatological mean, expected at most {FARTHEST:g}: "
                    f"check units, {MEAN_FILE} and the order of the channels ({ORDER})"
                )

    def _check_layout(self) -> tuple[int, int] | None:
        """Return rows and columns of the input; refuse a file of another layout."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        count = self.channels.num_channels
        taken = inputs[0].shape if len(inputs) == 1 else []
        given = outputs[0].shape if outputs else []
        rightly_taken = len(taken) == 4 and (
            not isinstance(taken[1], int) or taken[1] == FRAMES * count
        )
        enough = len(given) == 4 and (not isinstance(given[1], int) or given[1] >= count)
        if not rightly_taken or not enough:
            raise GatesError(
                f"{self.path} has inputs {[port.shape for port in inputs]} and outputs "
                f"{[p.shape for p in outputs]}, expected one input (1, {FRAMES * count}, H, W) "
                f"and an output of at least {count} channels: name the FengWu file for "
                f"{count} channels"
            )
        rows, columns = taken[2:]
        return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


def read_statistics(folder: Path, channels: ChannelSpec) -> Normalizer:
    """Read ``data_mean.npy`` and ``data_std.npy`` of a folder.

    Raises:
        GatesError: One is missing, damaged, not positive, or of other channels.
    """
    statistics = []
    for name in (MEAN_FILE, STD_FILE):
        try:
            values = np.load(folder / name, allow_pickle=False)
            statistics.append(torch.from_numpy(np.asarray(values, np.float64).reshape(-1)).float())
        except (OSError, ValueError, EOFError) as error:
            raise GatesError(
                f"{folder / name} cannot be read ({error}), expected {channels.num_channels} "
                "numbers: it comes with the ONNX file, copy it there"
            ) from error
        if len(statistics[-1]) != channels.num_channels:
            raise GatesError(
                f"{folder / name} holds {len(statistics[-1])} numbers, expected "
                f"{channels.num_channels}: give the file of these channels"
            )
    try:
        return Normalizer(*statistics)
    except ValueError as error:
        raise GatesError(f"{folder / STD_FILE}: {error}") from error


def _session(path: Path) -> Any:
    import onnxruntime

    if not path.is_file():
        raise GatesError(f"{path} does not exist: name the ONNX file of a forecast model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # a state of 0.25 degrees takes gigabytes, once
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=[provider for provider in wanted if provider in available]
        )
    except Exception as error:  # onnxruntime raises many types
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(f"{path} cannot be loaded: {line}; download or export it again") from error
