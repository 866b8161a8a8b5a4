"""From the fields of one modality to its tokens."""

from __future__ import annotations

from torch import Tensor, nn

from weather.models.adas.resample import Downsample
from weather.models.fengwu.scales import Scales, learned_vectors


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
        self.fine = scales.blocks(0)
        self.down = Downsample(dim)
        self.coarse = scales.blocks(1)

    def forward(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens at the fine and at the coarse scale."""
        tokens = self.norm(self.embedding(fields).movedim(1, -1)) + self.position
        fine = self.fine(tokens.movedim(-1, 1).unsqueeze(2))
        return fine, self.coarse(self.down(fine))
