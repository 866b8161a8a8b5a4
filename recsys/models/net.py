"""What every multi-task network is, and what its layers of experts show.

B rows, D inputs, E experts, F features of an expert, S gates, T tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

from torch import Tensor, nn

from core_gates.errors import check_at_least
from recsys.schema import Task


class ExpertLayer(NamedTuple):
    """Names of a layer of experts and of its gates, for diagnosis.

    Attributes:
        name: Name of the layer, such as ``layer 1``.
        experts: Module that returns the outputs of the experts (B, E, F); every parameter of it
            has the E experts as its leading dimension. If experts are applied to several inputs the
            outputs are (B, O, F), and its ``expert_of_output`` names the expert of each.
        mixture: Module whose ``weights(x)`` are those of its gates (B, S, E), given the input of
            its ``forward``.
        expert_names: Name of each expert, such as ``watch 0``.
        expert_groups: Group that each expert belongs to: a task, a category or ``shared``.
        gate_names: Name of each gate: the task or group that it serves.
    """

    name: str
    experts: nn.Module
    mixture: nn.Module
    expert_names: tuple[str, ...]
    expert_groups: tuple[str, ...]
    gate_names: tuple[str, ...]


def expert_layer(
    name: str,
    experts: nn.Module,
    mixture: nn.Module,
    counts: Mapping[str, int],
    gate_names: Sequence[str],
) -> ExpertLayer:
    """Describe a layer of experts.

    Args:
        name: Name of the layer.
        experts: Module of its experts.
        mixture: Module of its gates.
        counts: Group of experts -> number of experts, in the order of the experts.
        gate_names: Name of each gate.
    """
    names = tuple(f"{group} {number}" for group, count in counts.items() for number in range(count))
    groups = tuple(group for group, count in counts.items() for _ in range(count))
    return ExpertLayer(name, experts, mixture, names, groups, tuple(gate_names))


def rows_from(experts: nn.Module, first: int) -> list[tuple[nn.Parameter, slice]]:
    """Return every parameter of stacked experts with its rows of those from ``first`` on."""
    return [(parameter, slice(first, None)) for parameter in experts.parameters()]


class MultiTaskNet(nn.Module, ABC):
    """Base of every network: inputs (B, D) to logits (B, T), in the order of the tasks.

    A subclass takes ``input_dim`` and ``tasks`` first, the rest by name, builds its parameters on
    ``device`` and returns logits; probabilities and losses are taken outside.

    Args:
        input_dim: Inputs D of a row: all embeddings and dense features, concatenated.
        tasks: What is predicted.

    Attributes:
        copies: Sets of embeddings that the network wants; with more than one (STEM) its input is
            (B, copies, D).
        prior_dim: Features of a prior, such as the embedding of the user, that the network takes
            as the second argument of ``forward`` (PEPNet); 0 for none.
        id_feature: Sparse feature whose rows the network takes as the third argument of
            ``forward``, for gates that route by identity; empty for none.
        num_ids: Rows of that feature's table that the gates can route; None for any number.
        shared_rows: Rows of the first dimension of :meth:`shared_parameters` that all tasks share.

    Raises:
        ValueError: A size is below 1, or there is no task.
    """

    copies: int = 1
    prior_dim: int = 0
    id_feature: str = ""
    num_ids: int | None = None
    shared_rows: slice = slice(None)

    def __init__(self, input_dim: int, tasks: Sequence[Task]) -> None:
        super().__init__()
        check_at_least(1, input_dim=input_dim, tasks=len(tasks))
        self.input_dim, self.tasks = input_dim, tuple(tasks)

    @abstractmethod
    def forward(self, v: Tensor, prior: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Return the logits (B, T) of rows (B, D).

        Args:
            v: Inputs (B, D); (B, copies, D) with more than one copy.
            prior: Prior (B, P), for networks with ``prior_dim``.
            ids: Rows (B,) of ``id_feature``, int64, for networks that name one.
        """

    @property
    def shared_copies(self) -> Sequence[int]:
        """Sets of embeddings that two or more tasks read; all of them by default."""
        return range(self.copies)

    def losses(self, logits: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return further losses by name, scalars to be added, of the logits (B, T); none here.

        They belong to the last call of ``forward`` in training mode.
        """
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the last layer that all tasks share, for GradNorm.

        Of each, only the rows ``shared_rows`` are shared. Empty where tasks share nothing.
        """
        return []

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return every parameter that two or more tasks share with its shared rows, for PCGrad.

        A parameter with several stretches of shared rows occurs once for each. By default those of
        the last shared layer.
        """
        return [(parameter, self.shared_rows) for parameter in self.shared_parameters()]

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the layers of experts, the first first; none for networks without experts."""
        return []

    def folded(self) -> "MultiTaskNet":
        """Return a copy for inference, batch normalization folded into weights where possible."""
        net = deepcopy(self).eval()
        _fold(net)
        return net


def _fold(module: nn.Module) -> None:
    """Replace every part that can be folded by its folded form."""
    for name, child in list(module.named_children()):
        if callable(fold := getattr(child, "fold", None)):
            setattr(module, name, fold())
        else:
            _fold(child)
