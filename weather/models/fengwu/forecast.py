"""The network as a forecast model: physical states in, physical states and their spread out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core_gates.errors import check_positive
from weather.models.fengwu.network import FRAMES, FengWu, Prediction
from weather.models.steps import num_steps
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
    """Wrap :class:`FengWu` with its units, so that it can replace the model in a cycle.

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
        self.network = network
        self.normalizer = normalizer
        self.step_hours = step_hours
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
        change = self.change(previous, current)
        scale = self._scale(current)
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
        """Return what :meth:`change` should have predicted."""
        return (following - current) / self._scale(current)

    @property
    def dtype(self) -> torch.dtype:
        """In which the network computes."""
        return next(self.network.parameters()).dtype

    def _scale(self, like: Tensor) -> Tensor:
        return self.increment_sd.to(like)[:, None, None]
