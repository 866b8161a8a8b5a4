"""What is measured of one layer over batches: scale and rank of experts, weights of gates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.monitor.activations import ActivationStatistics
from core_gates.monitor.sums import exact, split
from recsys.diagnosis.observe import GateWeights


class LayerActivity:
    """Sums of a layer of experts, without values of single rows.

    Args:
        num_experts: Number of experts E.
        num_gates: Number of gates S.
        expert_of_output: Expert of each output O; one output per expert by default.
        rank_rows: Rows of which the effective rank is computed.
        visible: Where a gate sees an expert (S, E); where it ever gives one a weight by default.

    Attributes:
        visible: As given, or as seen so far.
    """

    def __init__(
        self,
        num_experts: int,
        num_gates: int,
        *,
        expert_of_output: Sequence[int] | None = None,
        rank_rows: int = 1024,
        visible: Tensor | None = None,
    ) -> None:
        self.num_experts, self.num_gates = num_experts, num_gates
        self._owners = torch.tensor(
            range(num_experts) if expert_of_output is None else list(expert_of_output)
        )
        self._statistics = ActivationStatistics(num_experts)
        self._sums: Tensor | None = None
        self._rank_rows = rank_rows
        self._rows: list[Tensor] = []
        self.weight_rows = 0
        self._gates = torch.zeros(num_gates, num_experts, dtype=torch.float64)
        self._residual: Tensor | None = None
        self._entropy = torch.zeros(num_gates, dtype=torch.float64)
        self._masked = visible is not None
        unseen = torch.zeros(num_gates, num_experts, dtype=torch.bool)
        self.visible = unseen if visible is None else visible

    @property
    def seen(self) -> bool:
        """Whether the layer ran at all."""
        return self._sums is not None and self.weight_rows > 0

    def add_outputs(self, outputs: Tensor) -> None:
        """Add outputs (..., O, F) of the experts."""
        outputs = outputs.flatten(0, -3)
        owners = self._owners.to(outputs.device).expand(outputs.shape[:-1])
        sums = self._statistics.sums(outputs, owners).cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        if (missing := self._rank_rows - sum(map(len, self._rows))) > 0:
            self._rows.append(exact(outputs[:missing]).cpu())

    def add_weights(self, weights: GateWeights) -> None:
        """Add the weights of the gates."""
        gates = exact(weights.gates).flatten(0, -3)
        self.weight_rows += len(gates)
        self._gates += gates.sum(0).cpu()
        if not self._masked:
            self.visible |= (gates != 0).any(0).cpu()
        fractions = gates.clamp(min=0)
        fractions = fractions / fractions.sum(-1, keepdim=True).clamp(min=1e-300)
        self._entropy += torch.special.entr(fractions).sum((0, -1)).cpu()
        if weights.residual is not None:
            residual = exact(weights.residual).expand_as(weights.gates).flatten(0, -3).sum(0).cpu()
            self._residual = residual if self._residual is None else self._residual + residual

    def activations(self) -> dict[str, Tensor]:
        """Return ``zero_rate``, ``near_zero_rate``, ``mean``, ``std``, ``effective_rank`` (E,)."""
        assert self._sums is not None
        parts = split(self._sums.double(), self._statistics.sizes)
        number = parts["values"].clamp(min=1)
        found = self._statistics.distributions(self._sums.double())
        found["near_zero_rate"] = parts["near_zero"] / number
        rows = torch.cat(self._rows)
        of_expert = [rows[:, self._owners == e].flatten(0, 1) for e in range(self.num_experts)]
        found["effective_rank"] = torch.stack([effective_rank(one) for one in of_expert])
        return found

    def gates(self) -> dict[str, Tensor]:
        """Return the mean ``weights`` and ``residual`` (S, E), and ``row_entropy`` (S,).

        ``residual`` is absent without such a path.
        """
        rows = max(self.weight_rows, 1)
        found = {"weights": self._gates / rows, "row_entropy": self._entropy / rows}
        return found if self._residual is None else found | {"residual": self._residual / rows}


def effective_rank(outputs: Tensor) -> Tensor:
    """Return exp(H(σ / Σσ)) of an expert (), σ the singular values of its centered outputs.

    Roy and Vetterli, *The effective rank*, 2007: 1 if all features move as one, F if all move
    alike and independently; 0 for an expert whose outputs do not vary.

    Args:
        outputs: (N, F); a value that is not finite makes the rank NaN.
    """
    centered = outputs - outputs.mean(0)
    gram = centered.mT @ centered
    if not gram.isfinite().all():
        return gram.new_tensor(torch.nan)
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    singular = values.masked_fill(values < 1e-12 * values[-1], 0).sqrt()  # without rounding errors
    total = singular.sum()
    entropy = torch.special.entr(singular / total.clamp(min=1e-300)).sum()
    return torch.where(total > 0, entropy.exp(), 0.0)
