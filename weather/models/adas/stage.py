"""One scale of Adas: resample, gated convolution, gated cross-attention, residual."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from core_gates import GatedConv, GatedCrossAttention
from core_gates.conv.gated import Streams
from weather.models.adas.resample import Downsample, Upsample

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
