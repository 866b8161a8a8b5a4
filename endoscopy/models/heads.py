"""From the features of all streams to the output of a sizing network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates import FeatureSelectionGate
from core_gates.features.folding import scale_inputs
from endoscopy.models.gate_kinds import GateKind, head_gate

NUM_GEOMETRY = 4
"""Log width and height of the box relative to the frame, and its center."""


class LinearHead(nn.Module):
    """One linear map, as a ViT has it.

    Args:
        dim: Features of all streams together.
        outputs: Numbers that the network returns.
        num_geometry: Further inputs, which no gate precedes.

    Shape:
        Features (B, dim) and geometry (B, num_geometry) to (B, outputs).
    """

    def __init__(self, dim: int, outputs: int, num_geometry: int = 0) -> None:
        super().__init__()
        self.fc = nn.Linear(dim + num_geometry, outputs)

    def forward(self, features: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Return the output, without activation."""
        out: Tensor = self.fc(_join(features, geometry))
        return out

    def fold_(self, scores: Tensor) -> None:
        """Multiply scores (dim,) of the features into the weights."""
        scale_inputs(self.fc, _extend(scores, self.fc))


class GatedHead(nn.Module):
    """The gated fusion of streams (arXiv 2407.04400).

    ``W3 (s(L2) * relu(W2 (s(L1) * e) + b2)) + b3`` with gates L1 and L2.

    Args:
        dim: Features e of all streams together.
        hidden_dim: Features between the two layers.
        outputs: Numbers that the network returns.
        gates: Kind of the gates L1 and L2.
        num_geometry: Further inputs of the first layer, which no gate precedes.

    Shape:
        Features (B, dim) and geometry (B, num_geometry) to (B, outputs).
    """

    def __init__(
        self, dim: int, hidden_dim: int, outputs: int, gates: GateKind, num_geometry: int = 0
    ) -> None:
        super().__init__()
        self.gate1 = head_gate(gates, dim)
        self.fc2 = nn.Linear(dim + num_geometry, hidden_dim)
        self.gate2 = head_gate(gates, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, outputs)

    def forward(self, features: Tensor, geometry: Tensor | None = None) -> Tensor:
        """Return the output, without activation."""
        hidden = F.relu(self.fc2(_join(self.gate1(features), geometry)))
        out: Tensor = self.fc3(self.gate2(hidden))
        return out

    def fold_(self, scores: Tensor) -> None:
        """Multiply scores (dim,) of the features and both gates into the weights."""
        if isinstance(self.gate1, FeatureSelectionGate):
            scores = scores * self.gate1.scores()
        if isinstance(self.gate2, FeatureSelectionGate):
            self.gate2.fold_into(self.fc3, "input")
        scale_inputs(self.fc2, _extend(scores, self.fc2))
        self.gate1, self.gate2 = nn.Identity(), nn.Identity()


def _join(features: Tensor, geometry: Tensor | None) -> Tensor:
    return features if geometry is None else torch.cat([features, geometry.to(features)], 1)


def _extend(scores: Tensor, layer: nn.Linear) -> Tensor:
    """Return the scores with ones for the geometry, which has no gate."""
    return torch.cat([scores, scores.new_ones(layer.in_features - len(scores))])
