"""LayerScale, the static gate without a sigmoid."""

import torch
from torch import Tensor

from core_gates import FeatureSelectionGate


class LayerScale(FeatureSelectionGate):
    """Scale every feature by a learned factor of any sign (Touvron et al., 2021, equation 3).

    ``y = g * x``: a feature-selection gate without its sigmoid, an ordinary weight otherwise, so
    that it belongs to the main optimizer. It folds like a gate.

    Args:
        dim: Number of features.
        init: Factor of all features at the start; 1e-5 in a deep residual branch, 1 elsewhere.
        feature_dim: Dimension of the features: -1 for tokens, 1 for images (B, C, H, W).
        device: Device of the factors.
        dtype: Floating dtype of the factors.

    Shape:
        ``x`` and the result (..., dim, ...).
    """

    def __init__(
        self,
        dim: int,
        *,
        init: float = 1e-5,
        feature_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, init=init, feature_dim=feature_dim, device=device, dtype=dtype)

    def scores(self) -> Tensor:
        """Return the factors (dim,), zero where pruned."""
        return torch.where(self.kept, self._exact_logits(), 0)

    @torch.no_grad()
    def prune_(self, threshold: float = 0.0) -> int:
        """Close for good the factors of at most this size; return how many remain."""
        self.kept &= self.scores().abs() > threshold
        return int(self.kept.sum())
