"""One network for all tasks, and a tower each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import MultiTaskNet
from recsys.models.sharing import whole
from recsys.models.towers import Towers
from recsys.schema import Task


class SharedBottom(MultiTaskNet):
    """``logit_t = Tower_t(f(v))`` with one network f (Caruana, 1997).

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        dim: Features of the shared network, the input of the towers.
        hidden_dims: Features of the layers before.
        norm: ``batch``: normalize every layer before its activation; None for none.
        activation: Of the shared network.
        tower_dims: Features of the hidden layers of a tower.
        tower_norm: Normalization of those, ``batch`` or None.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, or a name is unknown.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[Task],
        *,
        dim: int = 64,
        hidden_dims: Sequence[int] = (128,),
        norm: str | None = None,
        activation: str = "relu",
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        self.bottom = NormedExperts(
            [1],
            input_dim,
            [*hidden_dims, dim],
            norm=norm,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.towers = Towers(
            len(self.tasks),
            dim,
            tower_dims,
            norm=tower_norm,
            activation=tower_activation,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        logits: Tensor = self.towers(self.bottom(v)[:, 0])
        return logits

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return weight and bias of the last layer of the shared network."""
        return [self.bottom.weights[-1], self.bottom.biases[-1]]

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return all parameters of the shared network."""
        return whole(self.bottom)
