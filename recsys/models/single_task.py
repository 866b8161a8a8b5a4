"""A network per task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import MultiTaskNet
from recsys.models.towers import Towers
from recsys.schema import Task


class SingleTask(MultiTaskNet):
    """A network per task, all of them in one module; they share the embeddings at most.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted.
        own_embeddings: Whether every task has its own embeddings, too, as T models trained
            separately have them; the input is then (B, T, D).
        dim: Features of a task's network, the input of its tower.
        hidden_dims: Features of the layers before.
        norm: ``batch``: normalize every layer before its activation; None for none.
        activation: Of the network.
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
        own_embeddings: bool = False,
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
        number = len(self.tasks)
        self.copies = number if own_embeddings else 1
        self.bottoms = NormedExperts(
            [1] * number,
            input_dim,
            [*hidden_dims, dim],
            norm=norm,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.towers = Towers(
            number,
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
        """Return the logits (B, T) of rows (B, D), or (B, T, D) with own embeddings."""
        logits: Tensor = self.towers(self.bottoms(v))
        return logits

    @property
    def shared_copies(self) -> Sequence[int]:
        """The only set of embeddings; none with own embeddings."""
        return range(self.copies == 1)
