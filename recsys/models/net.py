"""What every multi-task network is: layers of experts, their gates, towers, and shared rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import core_gates.gates as gates_of_the_core
from core_gates.errors import check_at_least, check_option
from core_gates.gates.mixture import MaskedMixture, MultiGate
from core_gates.moe.normed_experts import NormedExperts
from core_gates.routing.base import Gate
from core_gates.training.batch_norm import SyncBatchNorm
from recsys.schema import Labels, tasks_of


class GateNetworks(MaskedMixture):
    """Softmax gates with hidden layers or normalized logits, as implementations of MMoE have them.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        hidden_dims: Features of hidden layers, those of each gate its own.
        norm: ``batch``: normalize every layer over the batch, the logits included; None for none.
        activation: Of hidden layers.
        own_inputs: Whether the input is (B, S, D), one row per gate, rather than (B, D). What has
            more rows ends in some that no gate reads.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.

    Shape:
        ``x`` (B, D) or (B, S, D), experts (B, E, F); result (B, S, F).

    Raises:
        ValueError: A size is below 1, a name is unknown, the mask is not a boolean table, or a gate
            sees no expert.
    """

    def __init__(
        self,
        dim: int,
        mask: Tensor,
        *,
        hidden_dims: Sequence[int] = (),
        norm: str | None = None,
        activation: str = "relu",
        own_inputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_at_least(1, dim=dim)
        check_option("norm", norm or "none", ("batch", "none"))
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            hidden_dims[-1] if hidden_dims else dim,
            mask,
            reads=range(len(mask)) if own_inputs or hidden_dims else None,
            **where,
        )
        self.hidden = (
            NormedExperts(len(mask), dim, hidden_dims, norm=norm, activation=activation, **where)
            if hidden_dims
            else None
        )
        self.norm = SyncBatchNorm(len(self.weight), **where) if norm else None

    def reset_parameters(self) -> None:
        """Reset the last layer as gates are, hidden ones as ``nn.Linear`` is."""
        super().reset_parameters()
        for part in (getattr(self, "hidden", None), getattr(self, "norm", None)):
            if part is not None:
                part.reset_parameters()

    @torch.no_grad()
    def fold(self) -> "GateNetworks":
        """Return a copy for inference whose normalization is folded into its weights."""
        folded = deepcopy(self).eval()
        if self.hidden is not None:
            folded.hidden = self.hidden.fold()
        if self.norm is not None:
            norm, bias = self.norm, cast(Tensor, self.bias)
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            scale = norm.weight * (variance + norm.eps).rsqrt()
            folded.weight.copy_(scale.unsqueeze(1) * self.weight)
            cast(Tensor, folded.bias).copy_(norm.bias + scale * (bias - mean))
            folded.norm = None
        return folded

    def _packed(self, x: Tensor) -> Tensor:
        if self.hidden is not None:
            x = self.hidden(x if x.ndim == 2 else x[:, : len(self._tables[0])])
        packed = super()._packed(x)
        return packed if self.norm is None else cast(Tensor, self.norm(packed))


def mixture(
    dim: int,
    mask: Tensor,
    *,
    hidden_dims: Sequence[int] = (),
    norm: str | None = None,
    own_inputs: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MaskedMixture:
    """Return softmax gates over the experts that they see: linear ones, or small networks.

    Args:
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        hidden_dims: Features of hidden layers.
        norm: ``batch``: normalize every layer of a gate, its logits included; None for none.
        own_inputs: Whether every gate reads its own input.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if hidden_dims or norm:
        options: dict[str, Any] = {"hidden_dims": hidden_dims, "norm": norm, **where}
        return GateNetworks(dim, mask, own_inputs=own_inputs, **options)
    return MaskedMixture(dim, mask, reads=range(len(mask)) if own_inputs else None, **where)


def routed_mixture(
    name: str,
    options: Mapping[str, Any],
    dim: int,
    mask: Tensor,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MultiGate:
    """Return routing gates of ``core_gates.gates``, one for each row of the mask.

    Args:
        name: Class, such as ``DSelectKGate``.
        options: Options of the class.
        dim: Features of the gates' input.
        mask: True where a gate sees an expert (S, E).
        device: Device of parameters and buffers.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: There is no such gate, or it has no such option.
    """
    core_names = {name: getattr(gates_of_the_core, name) for name in dir(gates_of_the_core)}
    kinds: dict[str, Any] = {
        name: kind
        for name, kind in core_names.items()
        if isinstance(kind, type) and issubclass(kind, Gate)
    }
    check_option("gate", name, ["softmax", *kinds])
    try:
        gates = [
            kinds[name](dim, int(row.sum()), **options, device=device, dtype=dtype) for row in mask
        ]
    except TypeError as error:
        raise ValueError(f"gate_options of {name}: {error}") from error
    if any(gate.couples_tokens for gate in gates):
        raise ValueError(
            f"gate {name} with these options routes a row by the others of its batch, but a score "
            "must not depend on them; choose another gate"
        )
    return MultiGate(gates, mask)


Parts = list[tuple[nn.Parameter, slice]]
"""Parameters, each with rows of its first dimension; one may occur several times."""


def whole(*modules: nn.Module | None) -> Parts:
    """Return every parameter of some modules, all rows of it."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    return [(parameter, slice(None)) for parameter in parameters if parameter.numel()]


def rows_where(parameters: Iterable[nn.Parameter], shared: Sequence[bool]) -> Parts:
    """Return the shared rows of parameters that are stacked along their first dimension.

    Args:
        parameters: Parameters (E, ...).
        shared: Whether each of the E is shared.
    """
    stretches: list[slice] = []
    for row in (row for row, chosen in enumerate(shared) if chosen):
        if stretches and stretches[-1].stop == row:
            stretches[-1] = slice(stretches[-1].start, row + 1)
        else:
            stretches.append(slice(row, row + 1))
    return [(parameter, rows) for parameter in parameters for rows in stretches]


def gates_where(mixture: MaskedMixture, shared: Sequence[bool]) -> Parts:
    """Return (parameter, rows) pairs of shared gates and their self gates, without free weights.

    Args:
        mixture: S gates.
        shared: Whether each of the S is shared.
    """
    rows = [shared[gate] for gate in mixture.gate_of_row]
    packed = [p for p in (mixture.weight, mixture.bias) if p is not None]
    if not isinstance(mixture, GateNetworks):
        return rows_where(packed, rows)
    packed += [] if mixture.norm is None else mixture.norm.parameters()
    hidden = [] if mixture.hidden is None else mixture.hidden.parameters()
    return rows_where(packed, rows) + rows_where(hidden, shared)


class Towers(nn.Module):
    """One small network per task that ends in a logit: hidden layers, then a linear one.

    Args:
        num_tasks: Number of tasks T.
        dim: Features D of a tower's input.
        hidden_dims: Features of the hidden layers; empty for a linear tower.
        norm: ``batch``: normalize every hidden layer before its activation; None for none.
        activation: Of the hidden layers.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, T, D), or (B, D) if all towers read the same; to logits (B, T).

    Raises:
        ValueError: A size is below 1, or norm or activation are unknown.
    """

    def __init__(
        self,
        num_tasks: int,
        dim: int,
        hidden_dims: Sequence[int] = (64,),
        *,
        norm: str | None = None,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_tasks=num_tasks, dim=dim)
        options = {"norm": norm, "activation": activation, "device": device, "dtype": dtype}
        self.hidden = (
            NormedExperts(num_tasks, dim, hidden_dims, **options)  # type: ignore[arg-type]
            if hidden_dims
            else None
        )
        inputs = hidden_dims[-1] if hidden_dims else dim
        self.weight = nn.Parameter(torch.empty(num_tasks, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_tasks, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does."""
        if self.hidden is not None:
            self.hidden.reset_parameters()
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, T)."""
        h = x if self.hidden is None else self.hidden(x)
        if h.ndim == 2:
            return h @ self.weight.mT + self.bias
        return (h * self.weight).sum(-1) + self.bias  # a matmul of one column each is slow


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
        tasks: What is predicted: tasks, their names, or names with categories.

    Attributes:
        copies: Sets of embeddings that the network wants; with more than one its input is
            (B, copies, D).
        prior_dim: Features of a prior, such as the embedding of the user, that the network takes
            as the second argument of ``forward``; 0 for none.
        id_feature: Sparse feature whose rows the network takes as the third argument of
            ``forward``, for gates that route by identity; empty for none.
        num_ids: Rows of that feature's table that the gates can route; None for any number.

    Raises:
        ValueError: A size is below 1, or there is no task.
    """

    copies: int = 1
    prior_dim: int = 0
    id_feature: str = ""
    num_ids: int | None = None

    def __init__(self, input_dim: int, tasks: Labels) -> None:
        super().__init__()
        check_at_least(1, input_dim=input_dim, tasks=len(tasks))
        self.input_dim, self.tasks = input_dim, tasks_of(tasks)

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

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return every parameter that two or more tasks share with its shared rows, for PCGrad.

        A parameter with several stretches of shared rows occurs once for each. None by default.
        """
        return []

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the layers of experts, the first first; none for networks without experts."""
        return []

    def folded(self) -> "MultiTaskNet":
        """Return a copy for inference, batch normalization folded into weights where possible."""
        net = deepcopy(self).eval()
        _fold(net)
        return net


class LeveledNet(MultiTaskNet):
    """Base of networks of levels of experts, one after the other, and towers.

    Attributes:
        layers: The levels, each with its ``experts`` and its ``mixture``.
        towers: On the outputs of the last level.
    """

    layers: nn.ModuleList
    towers: Towers

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        x = v
        for layer in self.layers:
            x = layer(x)
        return self.towers(x)


def _fold(module: nn.Module) -> None:
    """Replace every part that can be folded by its folded form."""
    for name, child in list(module.named_children()):
        if callable(fold := getattr(child, "fold", None)):
            setattr(module, name, fold())
        else:
            _fold(child)
