"""Adas, the assimilation network of FengWu-Adas (arXiv 2312.12462), for any grid and channels.

Tokens on levels; at each scale gated convolution, gated cross-attention and a residual.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates import GatedConv, GatedCrossAttention
from core_gates.attention.head_gate import INIT_STD
from core_gates.attention.window import WindowBlocks
from core_gates.conv import SameConv, Streams


def check_channels(num_surface: int, num_upper: int, num_levels: int) -> None:
    """Refuse numbers of channels that no state has.

    Raises:
        ValueError: There is no channel, or there are upper variables without levels, or the other
            way around.
    """
    if bool(num_upper) != bool(num_levels) or num_surface + num_upper < 1:
        raise ValueError(
            "a state needs surface channels, or upper variables with levels; found num_surface="
            f"{num_surface}, num_upper={num_upper}, num_levels={num_levels}"
        )


class GridPatches:
    """How Adas cuts a grid into patches of rows and columns.

    Patches tile the grid; on a grid with an odd number of rows, which holds both poles, they are
    one row taller than their stride, so that neighbors share a row.

    Args:
        grid_shape: Latitude rows and longitude columns of the grid.
        patch_size: Rows and columns between patches.

    Attributes:
        kernel: Rows and columns of a patch.
        stride: Rows and columns between patches.
        shape: Rows and columns of patches.

    Raises:
        ValueError: The patches do not cover the grid exactly.
    """

    def __init__(self, grid_shape: tuple[int, int], patch_size: tuple[int, int]) -> None:
        rows, columns = grid_shape
        self.stride = (patch_size[0], patch_size[1])
        self.kernel = (patch_size[0] + rows % 2, patch_size[1])
        if (rows - rows % 2) % patch_size[0] or columns % patch_size[1]:
            raise ValueError(
                f"patches of {patch_size[0]} x {patch_size[1]} do not cover a grid of {rows} x "
                f"{columns}: choose divisors of {rows - rows % 2} and {columns}"
            )
        self.shape = ((rows - rows % 2) // patch_size[0], columns // patch_size[1])


class PatchEmbedding(nn.Module):
    """Embed surface fields and fields on levels as one volume of tokens (FengWu-Adas).

    Args:
        num_surface: S, channels without a level; 0 leaves the surface out.
        num_upper: V, variables on levels; 0 leaves the levels out.
        dim: Features d of a token.
        patches: The cut of the grid.

    Shape:
        Surface (B, S, H, W) and upper (B, V, L, H, W) to (B, d, D, H', W') with D = L levels, then
        one for the surface; channels-last strides.
    """

    def __init__(self, num_surface: int, num_upper: int, dim: int, patches: GridPatches) -> None:
        super().__init__()
        cut = (patches.kernel, patches.stride)
        self.upper = nn.Conv2d(num_upper, dim, *cut) if num_upper else None
        self.surface = nn.Conv2d(num_surface, dim, *cut) if num_surface else None
        self.norm = nn.LayerNorm(dim)

    def forward(self, surface: Tensor, upper: Tensor) -> Tensor:
        """Return the tokens, normalised over their features."""
        slices = []
        if self.upper is not None:
            levels = self.upper(upper.transpose(1, 2).flatten(0, 1))
            slices.append(levels.view(upper.shape[0], upper.shape[2], *levels.shape[1:]))
        if self.surface is not None:
            slices.append(self.surface(surface)[:, None])
        normalized: Tensor = self.norm(torch.cat([part.movedim(2, -1) for part in slices], dim=1))
        return normalized.movedim(-1, 1)


class PatchRecovery(nn.Module):
    """Undo `PatchEmbedding` by transposed convolutions of the same patches.

    Args:
        num_surface: S, channels without a level.
        num_upper: V, variables on levels.
        dim: Features d of a token.
        patches: The cut of the grid.

    Shape:
        (B, d, D, H', W') to (B, S + V * L, H, W), surface channels first.
    """

    def __init__(self, num_surface: int, num_upper: int, dim: int, patches: GridPatches) -> None:
        super().__init__()
        cut = (patches.kernel, patches.stride)
        self.upper = nn.ConvTranspose2d(dim, num_upper, *cut) if num_upper else None
        self.surface = nn.ConvTranspose2d(dim, num_surface, *cut) if num_surface else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the fields on the grid."""
        fields = []
        if self.surface is not None:
            fields.append(self.surface(x[:, :, -1]))
            x = x[:, :, :-1]
        if self.upper is not None:
            levels = self.upper(x.transpose(1, 2).flatten(0, 1))
            levels = levels.view(x.shape[0], x.shape[2], *levels.shape[1:])
            fields.append(levels.transpose(1, 2).flatten(1, 2))
        return torch.cat(fields, dim=1)

    def zero(self) -> None:
        """Let every output be zero, for a network that starts without an increment."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class Downsample(nn.Module):
    """Merge 2 x 2 neighbors into one token of twice the features (Swin patch merging).

    Odd extents are padded with zeros at the bottom and the right.

    Args:
        dim: Features d of an input token.

    Shape:
        (B, d, D, H, W) to (B, 2d, D, ceil(H/2), ceil(W/2)), channels-last strides.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.linear = nn.Linear(4 * dim, 2 * dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return the coarser tokens; neighbors are joined row by row."""
        x = x.movedim(1, -1)
        if x.shape[2] % 2 or x.shape[3] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        batch, levels, rows, columns, dim = x.shape
        x = x.reshape(batch, levels, rows // 2, 2, columns // 2, 2, dim).transpose(3, 4)
        merged: Tensor = self.linear(self.norm(x.flatten(4)))
        return merged.movedim(-1, 1)


class Upsample(nn.Module):
    """Split a token into 2 x 2 of half the features.

    Args:
        dim: Features d of an input token, even.

    Shape:
        (B, d, D, H, W) to (B, d/2, D, 2H, 2W), channels-last strides.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, 2 * dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens at twice the rows and columns, with half the features."""
        batch, dim, levels, rows, columns = x.shape
        x = self.linear(self.norm(x.movedim(1, -1)))
        x = x.view(batch, levels, rows, columns, 2, 2, dim // 2).transpose(3, 4)
        return x.reshape(batch, levels, 2 * rows, 2 * columns, dim // 2).movedim(-1, 1)


STREAM_NAMES = ("background", "observation", "confidence")


class AdasStage(nn.Module):
    """A stage of the U-shaped trunk of FengWu-Adas over three streams.

    Args:
        dim: Features of the output streams.
        kernel_size: Odd extents of the gated convolution in depth, latitude, longitude.
        num_heads: Attention heads.
        window: Extents of an attention window.
        sample: ``"down"`` or ``"up"`` changes the resolution first; an up stage also takes the
            streams of the stage on its scale. None keeps the resolution.
        circular: Pad longitude periodically in the convolutions.
        bound_gate: Clip the outgoing gate stream to [0, 1].
        gated: False gives the control that adds instead of gating.
        open_gate: True gives the control whose gates are all one.
        legacy_clip: See `core_gates.attention.WindowAttention`.
        recompute: Recompute attention branches in the backward pass instead of storing them.

    Shape:
        Three streams (B, C, D, H, W) to three streams (B, dim, D, H', W').
    """

    def __init__(
        self,
        dim: int,
        kernel_size: tuple[int, int, int],
        num_heads: int,
        window: tuple[int, int, int],
        *,
        sample: Literal["down", "up"] | None = None,
        circular: bool = False,
        bound_gate: bool = False,
        gated: bool = True,
        open_gate: bool = False,
        legacy_clip: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.bound_gate = bound_gate
        self.resample = None
        if sample is not None:
            self.resample = nn.ModuleDict(
                {
                    name: Downsample(dim // 2) if sample == "down" else Upsample(2 * dim)
                    for name in STREAM_NAMES
                }
            )
        in_dim = 2 * dim if sample == "up" else dim
        self.conv = GatedConv(
            in_dim, dim, kernel_size, circular=circular, gated=gated, open_gate=open_gate
        )
        self.cross = GatedCrossAttention(
            dim, num_heads, window, gated=gated, legacy_clip=legacy_clip, recompute=recompute
        )

    def forward(self, streams: Streams, skip: Streams | None = None) -> Streams:
        """Return the next streams; ``skip`` are the streams that an up stage is joined with."""
        x, o, g = self._resampled(streams)
        if skip is None:
            inputs = x, o, g
        else:
            rows, columns = skip[0].shape[-2:]
            x, o, g = (stream[..., :rows, :columns] for stream in (x, o, g))
            inputs = tuple(  # type: ignore[assignment]
                join_features(stream, other) for stream, other in zip((x, o, g), skip, strict=True)
            )
        x2, o2, g2 = self.cross(*self.conv(*inputs))
        gate = g2 + g
        return x2 + x, o2 + o, gate.clamp(0, 1) if self.bound_gate else gate

    def _resampled(self, streams: Streams) -> Streams:
        if self.resample is None:
            return streams
        x, o, g = (
            self.resample[name](stream) for name, stream in zip(STREAM_NAMES, streams, strict=True)
        )
        return x, o, g.sigmoid()


def join_features(*volumes: Tensor) -> Tensor:
    """Concatenate the features of volumes (B, C, D, H, W), with channels-last strides."""
    return torch.cat([x.movedim(1, -1) for x in volumes], dim=-1).movedim(-1, 1)


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
        self.open_gate, self.window_size = open_gate, window_size
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
        self.decoder = WindowBlocks(
            dim,
            num_heads,
            window_size,
            decoder_depth,
            drop_path=0.0 if increment_mode else drop_path,
            **attention,
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
        result: Tensor = self.recovery(self.decoder(self.fusion(join_features(*streams))))
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
