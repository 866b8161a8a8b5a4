"""FengWu (arXiv 2304.02948) for any grid and channels: two states in, a distribution out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from core_gates.errors import check_option
from weather.models.adas.embedding import GridPatches, check_channels
from weather.models.fengwu.decoder import ModalityDecoder
from weather.models.fengwu.encoder import ModalityEncoder
from weather.models.fengwu.fuser import Fuser
from weather.models.fengwu.scales import Scales

FRAMES = 2
"""Successive states that a forecast starts from."""

LARGEST_LOG_VARIANCE = 10.0


class Prediction(NamedTuple):
    """Independent normal distributions of what is predicted.

    Attributes:
        mean: (B, C, H, W).
        log_variance: (B, C, H, W), within -10 and 10.
    """

    mean: Tensor
    log_variance: Tensor


class FengWu(nn.Module):
    """Predict the change of a state from two frames, and how certain that is.

    The surface and every variable on levels are modalities: each has an encoder, at two scales of
    windowed attention, and a decoder. Between them a fuser attends over the tokens of all
    modalities. Both outputs start at zero: persistence, with the spread of the units.

    The shape follows descriptions of the publication, which gives no code of its training: two
    scales, window attention without levels in encoders and decoders, attention over modalities in
    between, mean and logarithm of the variance from one decoder.

    Args:
        grid_shape: Latitude rows H and longitude columns W.
        num_surface: Channels without a level, which come first in a state.
        num_upper: Variables on levels.
        num_levels: Levels of each of them.
        dim: Features at the fine scale; doubled at the coarse one and in the fuser.
        patch_size: Rows and columns that become one token.
        window_size: Rows and columns of an attention window.
        num_heads: Attention heads at the fine scale, and at the coarse one and in the fuser.
        depths: Blocks of an encoder, and of a decoder, at the fine and at the coarse scale.
        fuser_depth: Blocks of the fuser.
        drop_path: Largest rate of stochastic depth, reached in the last block of the fuser.
        position: ``"full"``, one learned vector per token, or ``"latitude"``, one per row, which
            keeps the network equivariant in longitude.
        gated_skip: Let gates decide what of an encoder's tokens its decoder gets.
        recompute: Recompute attention branches in the backward pass: less memory, more time.

    Attributes:
        arguments: What the network was made with.

    Raises:
        ValueError: An argument is impossible; the message names it.
    """

    def __init__(
        self,
        *,
        grid_shape: tuple[int, int],
        num_surface: int,
        num_upper: int,
        num_levels: int,
        dim: int,
        patch_size: tuple[int, int] = (2, 2),
        window_size: tuple[int, int] = (4, 4),
        num_heads: tuple[int, int] = (2, 4),
        depths: tuple[int, int] = (2, 2),
        fuser_depth: int = 2,
        drop_path: float = 0.0,
        position: Literal["full", "latitude"] = "latitude",
        gated_skip: bool = True,
        recompute: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_channels(num_surface, num_upper, num_levels)
        check_option("position", position, ("full", "latitude"))
        super().__init__()
        self.arguments = arguments
        self.grid_shape = (grid_shape[0], grid_shape[1])
        self.modalities = [num_surface] * bool(num_surface) + [num_levels] * num_upper
        self.num_channels = sum(self.modalities)
        patches = GridPatches(grid_shape, patch_size)
        window = (window_size[0], window_size[1])
        scales = Scales(patches, dim, depths, num_heads, window, recompute)
        columns = patches.shape[1] if position == "full" else 1
        self.encoders = nn.ModuleList(
            ModalityEncoder(FRAMES * count, scales, columns) for count in self.modalities
        )
        self.fuser = Fuser(
            len(self.modalities),
            2 * dim,
            num_heads[1],
            window,
            fuser_depth,
            drop_path=drop_path,
            recompute=recompute,
        )
        self.decoders = nn.ModuleList(
            ModalityDecoder(2 * count, scales, gated_skip=gated_skip) for count in self.modalities
        )

    def forward(self, previous: Tensor, current: Tensor) -> Prediction:
        """Return the distribution of the change.

        Args:
            previous: Normalised states (B, C, H, W) one step before the current ones.
            current: Normalised states of the same shape.

        Returns:
            (B, C, H, W) twice, in the dtype of ``current``.

        Raises:
            ValueError: A shape differs from (B, C, H, W) of this network.
        """
        expected = (current.shape[0], self.num_channels, *self.grid_shape)
        for name, x in (("previous", previous), ("current", current)):
            if x.shape != expected:
                raise ValueError(f"{name} must be {expected}, found {tuple(x.shape)}")
        frames = (frame.split(self.modalities, dim=1) for frame in (previous, current))
        tokens = [
            encoder(torch.cat(fields, dim=1))
            for encoder, fields in zip(self.encoders, zip(*frames, strict=True), strict=True)
        ]
        fused = self.fuser([coarse for _, coarse in tokens])
        fields = [
            decoder(x, fine).chunk(2, dim=1)
            for decoder, x, (fine, _) in zip(self.decoders, fused, tokens, strict=True)
        ]
        mean, log_variance = (torch.cat(parts, dim=1) for parts in zip(*fields, strict=True))
        bounded = log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)
        return Prediction(mean.to(current.dtype), bounded.to(current.dtype))
