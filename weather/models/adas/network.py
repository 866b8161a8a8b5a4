"""Adas, the assimilation network of FengWu-Adas (arXiv 2312.12462), for any grid and channels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from core_gates.attention.constants import INIT_STD
from core_gates.conv import SameConv
from core_gates.conv.gated import Streams
from weather.models.adas.embedding import GridPatches, PatchEmbedding, PatchRecovery, check_channels
from weather.models.adas.stage import STREAM_NAMES, AdasStage, join_features
from weather.models.window_blocks import WindowBlocks

Kernel = tuple[int, int, int]

SCALES: tuple[tuple[int, Literal["down", "up"] | None], ...] = (
    (0, None),
    (1, "down"),
    (2, "down"),
    (1, "up"),
    (0, "up"),
)
"""Scale of each stage, 0 being the finest, and how it is reached."""


class Adas(nn.Module):
    """Assimilate gridded observations into a background, weighted by gates of confidence.

    Background, observations and confidence are embedded as three streams of tokens, pass a U of
    five stages of gated convolution and gated cross-attention, are fused, decoded by windowed
    self-attention and brought back to the grid. Depth is the levels, top of the list first, then
    the surface. The defaults are the published form.

    Args:
        grid_shape: Latitude rows H and longitude columns W.
        num_surface: Channels without a level, which come first in a state.
        num_upper: Variables on levels.
        num_levels: Levels of each of them.
        dim: Features at the finest scale; doubled at each of the two coarser ones.
        patch_size: Rows and columns that become one token.
        window_size: Attention window in depth, latitude, longitude.
        num_heads: Attention heads, the same at all scales.
        kernel_sizes: Kernels of the gated convolutions at the three scales, finest first.
        decoder_depth: Blocks of the decoder.
        drop_path: Largest rate of stochastic depth, reached in the last decoder block.
        position: ``"full"``, one learned vector per token, or ``"latitude"``, one per level
            and row, which keeps the network equivariant in longitude.
        circular_longitude: Pad longitude periodically in the convolutions.
        output: ``"analysis"``, the normalised analysis, or ``"increment"``, whose last layer
            starts at zero.
        increment_mode: Subtract the network's output without observations, so that without
            observations the background stays exactly what it is. Stochastic depth is off.
        bound_gate: Clip the gate stream to [0, 1] after the embedding and each stage.
        gated: False gives the control with the same parameters, see `core_gates.GatedConv`.
        open_gate: True gives the control whose gates are all one: it cannot tell an observation of
            zero from none.
        legacy_clip: Position bias of clipped windows as in the official code, for its weights.
        recompute: Recompute attention branches in the backward pass: less memory, more time.

    Attributes:
        arguments: What the network was made with, to make a variant of it.

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
        window_size: tuple[int, int, int] = (2, 4, 4),
        num_heads: int = 2,
        kernel_sizes: tuple[Kernel, Kernel, Kernel] = ((3, 5, 7), (3, 3, 5), (3, 3, 3)),
        decoder_depth: int = 2,
        drop_path: float = 0.1,
        position: Literal["full", "latitude"] = "full",
        circular_longitude: bool = False,
        output: Literal["analysis", "increment"] = "analysis",
        increment_mode: bool = False,
        bound_gate: bool = False,
        gated: bool = True,
        open_gate: bool = False,
        legacy_clip: bool = False,
        recompute: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check(num_surface, num_upper, num_levels, position, output)
        super().__init__()
        self.arguments = arguments
        self.grid_shape = (grid_shape[0], grid_shape[1])
        self.num_surface, self.num_upper = num_surface, num_upper
        self.num_levels = num_levels
        self.num_channels = num_surface + num_upper * num_levels
        self.output = output
        self.increment_mode, self.bound_gate = increment_mode, bound_gate
        self.open_gate = open_gate
        self.window_size = window_size
        patches = GridPatches(grid_shape, patch_size)
        self.embeddings = nn.ModuleDict(
            {name: PatchEmbedding(num_surface, num_upper, dim, patches) for name in STREAM_NAMES}
        )
        depth = num_levels + bool(num_surface)
        columns = patches.shape[1] if position == "full" else 1
        self.position = nn.Parameter(torch.empty(1, dim, depth, patches.shape[0], columns))
        attention: dict[str, Any] = {"legacy_clip": legacy_clip, "recompute": recompute}
        gate = {"bound_gate": bound_gate, "gated": gated, "open_gate": open_gate}
        trunk = attention | {"circular": circular_longitude} | gate
        self.stages = _stages(dim, kernel_sizes, num_heads, window_size, **trunk)
        self.fusion = SameConv(3 * dim, dim, kernel_sizes[0], circular=circular_longitude)
        largest = 0.0 if increment_mode else drop_path
        self.decoder = WindowBlocks(
            dim, num_heads, window_size, decoder_depth, drop_path=largest, **attention
        )
        self.recovery = PatchRecovery(num_surface, num_upper, dim, patches)
        nn.init.trunc_normal_(self.position, std=INIT_STD)
        if output == "increment":
            self.recovery.zero()

    def forward(self, background: Tensor, observation: Tensor, confidence: Tensor) -> Tensor:
        """Return the analysis, or the increment if ``output`` is ``"increment"``.

        Args:
            background: Normalised background ``(B, C, H, W)``.
            observation: Normalised observations (or innovations in units of the background error,
                for an increment), zero where there is none, of the same shape.
            confidence: Weight of each observation in [0, 1], 0 where there is none.

        Returns:
            ``(B, C, H, W)`` in the dtype of ``background``.

        Raises:
            ValueError: A shape differs from ``(B, C, H, W)`` of this network.
        """
        expected = (background.shape[0], self.num_channels, *self.grid_shape)
        for name, x in zip(STREAM_NAMES, (background, observation, confidence), strict=True):
            if x.shape != expected:
                raise ValueError(f"{name} must be {expected}, found {tuple(x.shape)}")
        result = self._network(background, observation, confidence)
        if self.increment_mode:
            nothing = torch.zeros_like(observation)
            result = result - self._network(background, nothing, nothing)
            if self.output == "analysis":
                result = background + result
        return result.to(background.dtype)

    def _network(self, background: Tensor, observation: Tensor, confidence: Tensor) -> Tensor:
        fine = self.stages[0](self._embed(background, observation, confidence))
        middle = self.stages[1](fine)
        streams = self.stages[3](self.stages[2](middle), middle)
        streams = self.stages[4](streams, fine)
        x = self.decoder(self.fusion(join_features(*streams)))
        result: Tensor = self.recovery(x)
        return result

    def _embed(self, *fields: Tensor) -> Streams:
        x, o, g = (
            self.embeddings[name](*self._split(field))
            for name, field in zip(STREAM_NAMES, fields, strict=True)
        )
        g = torch.ones_like(o) if self.open_gate else g.sigmoid() + self.position
        return x + self.position, o + self.position, g.clamp(0, 1) if self.bound_gate else g

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        upper = x[:, self.num_surface :]
        shape = (x.shape[0], self.num_upper, self.num_levels, *x.shape[2:])
        return x[:, : self.num_surface], upper.reshape(shape)


def _stages(
    dim: int,
    kernel_sizes: tuple[Kernel, Kernel, Kernel],
    num_heads: int,
    window_size: tuple[int, int, int],
    **options: Any,
) -> nn.ModuleList:
    return nn.ModuleList(
        AdasStage(
            dim * 2**scale, kernel_sizes[scale], num_heads, window_size, sample=sample, **options
        )
        for scale, sample in SCALES
    )


def _check(num_surface: int, num_upper: int, num_levels: int, position: str, output: str) -> None:
    check_channels(num_surface, num_upper, num_levels)
    if position not in ("full", "latitude"):
        raise ValueError(f"position must be 'full' or 'latitude', found {position!r}")
    if output not in ("analysis", "increment"):
        raise ValueError(f"output must be 'analysis' or 'increment', found {output!r}")
