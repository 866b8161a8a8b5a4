"""From the tokens of one modality to its fields."""

from __future__ import annotations

from torch import Tensor, nn

from weather.models.adas.resample import Upsample
from weather.models.fengwu.scales import Scales
from weather.models.fengwu.skip import SkipJoin


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
        self.coarse = scales.blocks(1)
        self.up = Upsample(2 * dim)
        self.skip = SkipJoin(dim, gated=gated_skip)
        self.fine = scales.blocks(0)
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
