"""FengWu (arXiv 2304.02948) for any grid and channels: two states in, a distribution out.

An encoder and a decoder for every kind of field, and a fuser between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from core_gates.attention.head_gate import INIT_STD
from core_gates.attention.window import WindowBlocks
from core_gates.errors import check_option
from core_gates.ops.elementwise import gate_multiply
from weather.models.adas.network import Downsample, GridPatches, Upsample, check_channels


class Scales(NamedTuple):
    """Two scales of tokens: patches of the grid, and 2 x 2 patches of twice the features.

    Attributes:
        patches: The cut of the grid.
        dim: Features d of a token at the fine scale; 2d at the coarse one.
        depths: Blocks at the fine and at the coarse scale.
        num_heads: Attention heads at the two scales.
        window: Rows and columns of an attention window.
        recompute: Recompute attention branches in the backward pass instead of storing them.
    """

    patches: GridPatches
    dim: int
    depths: tuple[int, int]
    num_heads: tuple[int, int]
    window: tuple[int, int]
    recompute: bool

    def blocks(self, scale: int) -> WindowBlocks:
        """Return the blocks of one modality at the fine (0) or the coarse (1) scale."""
        return WindowBlocks(
            self.dim * 2**scale,
            self.num_heads[scale],
            (1, *self.window),
            self.depths[scale],
            recompute=self.recompute,
        )


def learned_vectors(*shape: int) -> nn.Parameter:
    """Return a learned tensor that is added to tokens, drawn from a narrow normal distribution."""
    vectors = nn.Parameter(torch.empty(shape))
    nn.init.trunc_normal_(vectors, std=INIT_STD)
    return vectors


OPEN = 2.0
"""Logit at which gates start: they pass nine tenths."""


class SkipJoin(nn.Module):
    """Join decoded tokens with those of the encoder, of which a gate lets through what is wanted.

    ``W [x; s * sigmoid(K x)]``, x from the coarse scale and s from the encoder (the attention gate
    of Oktay et al., 2018, for every feature).

    Args:
        dim: Features d of a token.
        gated: False joins all of s, the published form.

    Shape:
        Two volumes (B, d, D, H, W) to one.
    """

    def __init__(self, dim: int, *, gated: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.join = nn.Linear(2 * dim, dim)
        for linear in (self.gate, self.join):
            if linear is not None:
                nn.init.trunc_normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, OPEN)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join decoded and encoder tokens, both (B, d, D, H, W), the latter gated if wanted."""
        x, skip = x.movedim(1, -1), skip.movedim(1, -1)
        if self.gate is not None:
            skip = gate_multiply(skip, self.gate(x))
        joined: Tensor = self.join(torch.cat((x, skip), dim=-1))
        return joined.movedim(-1, 1)

    def gate_values(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the gates (B, d, D, H, W) in [0, 1]; ones where there are none."""
        if self.gate is None:
            return torch.ones_like(skip)
        values: Tensor = self.gate(x.movedim(1, -1)).sigmoid()
        return values.movedim(-1, 1)


class ModalityEncoder(nn.Module):
    """Embed the frames of one modality and let windows of tokens exchange at two scales.

    Args:
        num_fields: Channels of the modality in all frames together.
        scales: Shape of the two scales.
        position_columns: Columns of the learned position: those of the patches, or 1 for one
            vector in every row.

    Shape:
        (B, num_fields, H, W) to (B, d, 1, H', W') and (B, 2d, 1, ceil(H'/2), ceil(W'/2)).
    """

    def __init__(self, num_fields: int, scales: Scales, position_columns: int) -> None:
        super().__init__()
        patches, dim = scales.patches, scales.dim
        self.embedding = nn.Conv2d(num_fields, dim, patches.kernel, patches.stride)
        self.norm = nn.LayerNorm(dim)
        self.position = learned_vectors(1, patches.shape[0], position_columns, dim)
        self.fine, self.down = scales.blocks(0), Downsample(dim)
        self.coarse = scales.blocks(1)

    def forward(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens at the fine and at the coarse scale."""
        tokens = self.norm(self.embedding(fields).movedim(1, -1)) + self.position
        fine = self.fine(tokens.movedim(-1, 1).unsqueeze(2))
        return fine, self.coarse(self.down(fine))


class ModalityDecoder(nn.Module):
    """Decode the fused tokens of one modality, joined with those of its encoder.

    Args:
        num_fields: Channels to return. They start at zero.
        scales: Shape of the two scales.
        gated_skip: Let a gate decide what of the encoder's tokens is joined.

    Shape:
        (B, 2d, 1, ceil(H'/2), ceil(W'/2)) and (B, d, 1, H', W') to (B, num_fields, H, W).
    """

    def __init__(self, num_fields: int, scales: Scales, *, gated_skip: bool) -> None:
        super().__init__()
        patches, dim = scales.patches, scales.dim
        self.coarse, self.up = scales.blocks(1), Upsample(2 * dim)
        self.skip, self.fine = SkipJoin(dim, gated=gated_skip), scales.blocks(0)
        self.norm = nn.LayerNorm(dim)
        self.recovery = nn.ConvTranspose2d(dim, num_fields, patches.kernel, patches.stride)
        for parameter in self.recovery.parameters():
            nn.init.zeros_(parameter)

    def forward(self, fused: Tensor, skip: Tensor) -> Tensor:
        """Return the fields on the grid."""
        rows, columns = skip.shape[-2:]
        x = self.up(self.coarse(fused))[..., :rows, :columns]
        x = self.fine(self.skip(x, skip))
        fields: Tensor = self.recovery(self.norm(x.squeeze(2).movedim(1, -1)).movedim(-1, 1))
        return fields


class Fuser(nn.Module):
    """Windowed attention over the tokens of all modalities together.

    Modalities are stacked in depth and every window holds all of them, so that temperature may ask
    wind of the same place and of its neighbors.

    Args:
        num_modalities: G.
        dim: Features of a token.
        num_heads: Attention heads.
        window: Rows and columns of an attention window.
        depth: Number of blocks.
        drop_path: Rate of stochastic depth of the last block.
        recompute: Recompute attention branches in the backward pass instead of storing them.

    Shape:
        G volumes (B, C, 1, H, W) to as many.
    """

    def __init__(
        self,
        num_modalities: int,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        depth: int,
        *,
        drop_path: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.modality = learned_vectors(1, dim, num_modalities, 1, 1)
        self.blocks = WindowBlocks(
            dim,
            num_heads,
            (num_modalities, *window),
            depth,
            drop_path=drop_path,
            recompute=recompute,
        )

    def forward(self, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tokens of every modality, which now depend on all of them."""
        stacked = torch.cat([volume.movedim(1, -1) for volume in tokens], dim=1).movedim(-1, 1)
        fused: Tensor = self.blocks(stacked + self.modality)
        return fused.split(1, dim=2)


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
        return Prediction(
            mean.to(current.dtype),
            log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE).to(current.dtype),
        )


_FENGWU = {"num_surface": 4, "num_upper": 5, "num_levels": 13}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "official": _FENGWU
    | {
        "grid_shape": (721, 1440),
        "dim": 192,
        "patch_size": (4, 4),
        "window_size": (6, 12),
        "num_heads": (6, 12),
        "depths": (2, 6),
        "fuser_depth": 6,
        "drop_path": 0.2,
        "position": "full",
        "gated_skip": False,
        "recompute": True,
    },
    "small": _FENGWU
    | {
        "grid_shape": (32, 64),
        "dim": 48,
        "window_size": (4, 8),
        "num_heads": (3, 6),
        "depths": (2, 2),
        "fuser_depth": 4,
        "drop_path": 0.1,
    },
    "tiny": {
        "grid_shape": (32, 64),
        "num_surface": 1,
        "num_upper": 3,
        "num_levels": 8,
        "dim": 32,
        "window_size": (4, 8),
        "num_heads": (2, 4),
        "depths": (1, 2),
        "fuser_depth": 2,
    },
    "unit": {
        "grid_shape": (16, 32),
        "num_surface": 3,
        "num_upper": 0,
        "num_levels": 0,
        "dim": 8,
        "window_size": (2, 4),
        "num_heads": (2, 2),
        "depths": (1, 2),
        "fuser_depth": 2,
    },
}
"""Arguments of `FengWu` by name: `official`, the 69 channels at 0.25 degrees in the shape of public
descriptions of the paper; `small`, the same channels on 32 x 64; `tiny`, the state of the dry
8-level model; `unit`, for tests. All but `official` are equivariant in longitude."""


def fengwu_preset(name: str, **overrides: Any) -> FengWu:
    """Build a size of FengWu.

    Args:
        name: One of `PRESETS`.
        overrides: Arguments of `FengWu` that replace the preset's.

    Returns:
        The network with fresh weights; inside ``with torch.device("meta")`` without storage.

    Raises:
        ValueError: There is no such preset.
    """
    check_option("preset", name, PRESETS)
    return FengWu(**{**PRESETS[name], **overrides})
