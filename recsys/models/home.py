"""HoME: a hierarchy of multi-gate experts (Wang et al., KDD 2025, arXiv 2408.05430).

B rows, D inputs, G groups, E experts, F features of an expert, C categories, T tasks.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least, check_option
from core_gates.features.low_rank import LowRankFeatureGates, Rank
from core_gates.gates.mixture import MaskedMixture
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.home_groups import (
    SHARED,
    Counts,
    Forest,
    counts_of,
    meta_masks,
    owners,
    task_masks,
)
from recsys.models.net import ExpertLayer, MultiTaskNet, Towers, gates_where, rows_where, whole
from recsys.schema import Labels

SharedInput = Literal["per_category", "shared_only"]


class HoME(MultiTaskNet):
    """Two layers of experts, of categories of tasks and of tasks, that see what concerns them.

    The first layer has experts for every category of tasks (``Task.category``) and shared ones, the
    second for every task, every category and shared ones; with a single category it is a CGC of two
    levels. Against the faults of plain mixtures of experts it has experts with batch normalization
    and Swish (collapse), gates that see their own groups only (degradation), and feature gates for
    the input of each group and self gates that add a group's own experts to its output
    (underfitting).

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories; tasks of a
            category share experts.
        dim: Features F of an expert's output.
        hidden_dims: Features of an expert's layers before.
        meta_experts: Experts of each category and of the shared group in the first layer, or a
            table of them by name of the group; groups that it lacks have one.
        task_experts: The same for tasks, categories and the shared group in the second layer.
        feature_gate: Whether groups rescale the features of their input.
        num_maps: Low-rank maps of a feature gate.
        rank: Rank of the maps in each layer; ``paper`` for width / num_maps. One value for both.
        self_gate: Whether own experts also take a residual path.
        norm: Of the experts: ``batch``, or None for none.
        activation: Of the experts.
        mask: Whether gates see their groups only; otherwise every gate sees all experts.
        layer2_shared_input: What the shared experts of the second layer read: ``per_category``: the
            input of each category, one after the other, normalized together; ``shared_only``: the
            output of the shared group of the first layer, through a linear map.
        tower_dims: Features of the hidden layers of a tower.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, an option or a group is unknown, or two groups have one name.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        dim: int = 32,
        hidden_dims: Sequence[int] = (64,),
        meta_experts: Counts = 2,
        task_experts: Counts = 1,
        feature_gate: bool = True,
        num_maps: int = 2,
        rank: Rank | Sequence[Rank] = 8,
        self_gate: bool = True,
        norm: str | None = "batch",
        activation: str = "silu",
        mask: bool = True,
        layer2_shared_input: SharedInput = "per_category",
        tower_dims: Sequence[int] = (32,),
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        check_at_least(1, dim=dim)
        check_option("layer2_shared_input", layer2_shared_input, ("per_category", "shared_only"))
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.forest = Forest.of(self.tasks)
        ranks = [rank, rank] if isinstance(rank, int | str) else list(rank)
        if len(ranks) != 2:
            raise ValueError(f"rank must be one for both layers or one for each, got {ranks}")
        options: dict[str, Any] = {
            "norm": norm,
            "activation": activation,
            "feature_gate": feature_gate,
            "num_maps": num_maps,
            "mask": mask,
            "self_gate": self_gate,
        }
        dims = [*hidden_dims, dim]
        self.meta_layer = MetaLayer(
            self.forest, input_dim, dims, meta_experts, ranks[0], **options, **where
        )
        per_category = layer2_shared_input == "per_category"
        self.widen = None if per_category else nn.Linear(dim, 2 * dim, **where)
        self.task_layer = TaskLayer(
            self.forest, 2 * dim, dims, task_experts, ranks[1], per_category, **options, **where
        )
        self.towers = Towers(len(self.tasks), dim, tower_dims, activation=tower_activation, **where)
        names = self.forest.task_names
        self._masked = mask
        self._order = [names.index(task.name) for task in self.tasks]

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D).

        Raises:
            ValueError: The rows have another number of inputs, or the batch is a single row in
                training, which batch normalization cannot take.
        """
        logits = self.towers(self.task_layer(self._task_inputs(self.meta_layer(v))))
        return logits[:, self._order]

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return every parameter that two or more tasks share.

        In the first layer these are experts, feature gates, and the gates of the shared group and
        of categories of several tasks; those of all categories where the shared experts above are
        normalized over the inputs of all. In the second layer they are experts and feature gates
        of the same groups. Without a mask all but the gates of the second layer is shared.
        """
        sizes = zip(self.forest.categories, self.forest.tasks, strict=True)
        of_several = {name for name, tasks in sizes if len(tasks) > 1} | {SHARED}
        first, second, everything = self.meta_layer, self.task_layer, not self._masked
        coupled = self.widen is None and bool(second.experts.norms)
        gates = [everything or coupled or group in of_several for group in first.groups]
        owners = [everything or group in of_several for group in second.owner]
        groups = [everything or group in of_several for group in self.forest.task_groups]
        parts = whole(first.experts, first.feature_gates, self.widen)
        parts += gates_where(first.mixture, gates) + rows_where(second.experts.parameters(), owners)
        if second.feature_gates is not None:
            parts += rows_where(second.feature_gates.parameters(), groups)
        return parts

    def expert_layers(self) -> list[ExpertLayer]:
        """Return both layers of experts."""
        return [self.meta_layer.described("layer 1"), self.task_layer.described("layer 2")]

    def folded(self) -> "HoME":
        """Return a copy for inference, batch normalization folded into the weights."""
        folded = cast(HoME, super().folded())
        for layer in (folded.meta_layer, folded.task_layer):
            layer.experts = layer.experts.fold()
        return folded

    def _task_inputs(self, z: Tensor) -> Tensor:
        """Return the inputs of the second layer (B, C, 2F), or with the shared group's (…, C + 1).

        Args:
            z: Outputs of the first layer (B, C + 1, F), the shared group last.
        """
        z = z.transpose(0, 1)
        categories, shared = z[:-1], z[-1:]
        u = torch.cat([categories, shared.expand_as(categories)], -1)
        if self.widen is not None:
            u = torch.cat([u, self.widen(shared)])
        return u.transpose(0, 1)


class MetaLayer(nn.Module):
    """The first layer: experts of categories and shared ones, all on the same input.

    Args:
        forest: Groups.
        dim: Features D of the input.
        hidden_dims: Features of the experts' layers.
        counts: Experts of the groups.
        rank: Rank of the feature gates.
        feature_gate: Whether there are feature gates.
        num_maps: Maps of a feature gate.
        norm: Of the experts.
        activation: Of the experts.
        mask: Whether gates see their groups only.
        self_gate: Whether there are self gates.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``v`` (B, D) to (B, C + 1, F), the shared group last.
    """

    def __init__(
        self,
        forest: Forest,
        dim: int,
        hidden_dims: Sequence[int],
        counts: Counts,
        rank: Rank,
        *,
        feature_gate: bool,
        num_maps: int,
        norm: str | None,
        activation: str,
        mask: bool,
        self_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        groups = forest.meta_groups
        numbers = counts_of(counts, groups, "meta_experts")
        self.groups, self.owner = groups, owners(groups, numbers)
        self.feature_gates = (
            LowRankFeatureGates(dim, len(groups), rank, num_maps=num_maps, **where)
            if feature_gate
            else None
        )
        self.experts = NormedExperts(
            numbers, dim, hidden_dims, norm=norm, activation=activation, **where
        )
        seen, self_mask = meta_masks(forest, self.owner, mask=mask, self_gate=self_gate)
        self.mixture = GroupMixture(dim, seen, self_mask=self_mask, **where)

    def forward(self, v: Tensor) -> Tensor:
        """Return the outputs of all groups (B, C + 1, F)."""
        x = v if self.feature_gates is None else self.feature_gates(v)
        mixed: Tensor = self.mixture(v, self.experts(x))
        return mixed

    def described(self, name: str) -> ExpertLayer:
        """Return the names of experts and gates."""
        owner = tuple(self.owner)
        return ExpertLayer(name, self.experts, self.mixture, _numbered(owner), owner, self.groups)


class TaskLayer(nn.Module):
    """The second layer: experts of tasks, of categories and shared ones.

    Args:
        forest: Groups.
        dim: Features D of an input.
        hidden_dims: Features of the experts' layers.
        counts: Experts of the groups.
        rank: Rank of the feature gates.
        per_category: Whether the shared experts read the input of every category; else a separate
            one.
        feature_gate: Whether there are feature gates.
        num_maps: Maps of a feature gate.
        norm: Of the experts.
        activation: Of the experts.
        mask: Whether gates see their groups only.
        self_gate: Whether there are self gates.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``u`` (B, C, D), or (B, C + 1, D) with that of the shared experts, to (B, T, F), the tasks
        of a category next to each other.
    """

    def __init__(
        self,
        forest: Forest,
        dim: int,
        hidden_dims: Sequence[int],
        counts: Counts,
        rank: Rank,
        per_category: bool,
        *,
        feature_gate: bool,
        num_maps: int,
        norm: str | None,
        activation: str,
        mask: bool,
        self_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        groups, number = forest.task_groups, len(forest.categories)
        numbers = counts_of(counts, groups, "task_experts")
        self.groups, self.owner = forest.task_names, owners(groups, numbers)
        of_shared = tuple(range(number)) if per_category else (number,)
        reads = [*((forest.category_of(group),) for group in groups[:-1]), of_shared]
        self.inputs = [i for row in reads for i in row]
        self.feature_gates = (
            LowRankFeatureGates(dim, len(groups), rank, num_maps=num_maps, reads=reads, **where)
            if feature_gate
            else None
        )
        self.experts = NormedExperts(
            numbers,
            dim,
            hidden_dims,
            norm=norm,
            activation=activation,
            runs=[len(row) for row in reads],
            **where,
        )
        self.mixture = TaskMixture(
            forest, dim, self.owner, self.experts.expert_of_output, mask, self_gate, **where
        )

    def forward(self, u: Tensor) -> Tensor:
        """Return the outputs of all tasks (B, T, F)."""
        x = u[:, self.inputs] if self.feature_gates is None else self.feature_gates(u)
        mixed: Tensor = self.mixture(u, self.experts(x))
        return mixed

    def described(self, name: str) -> ExpertLayer:
        """Return the names of experts and gates."""
        owner = tuple(self.owner)
        return ExpertLayer(name, self.experts, self.mixture, _numbered(owner), owner, self.groups)


class GroupMixture(MaskedMixture):
    """A masked mixture whose weights, for diagnosis, are those of its gates alone."""

    def weights(self, x: Tensor, *, residual: bool = False) -> Tensor:
        """Return the weights of the gates (B, S, E), by default without those of self gates."""
        return super().weights(x, residual=residual)


class TaskMixture(GroupMixture):
    """The gates and self gates of tasks, each reading the input of its category.

    Args:
        forest: Groups.
        dim: Features D of an input.
        owner: Group of every expert.
        expert_of_output: Expert of every output; shared experts may have one per category.
        mask: Whether gates see their groups only.
        self_gate: Whether there are self gates.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``u`` (B, C, D) or more inputs, of which the first C are read, and outputs of experts
        (B, O, F) to (B, T, F).
    """

    def __init__(
        self,
        forest: Forest,
        dim: int,
        owner: Sequence[str],
        expert_of_output: Sequence[int],
        mask: bool,
        self_gate: bool,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.expert_of_output = list(expert_of_output)
        several = {e for e in expert_of_output if self.expert_of_output.count(e) > 1}
        runs = [
            self.expert_of_output[:o].count(e) if e in several else -1
            for o, e in enumerate(expert_of_output)
        ]
        groups = [owner[e] for e in expert_of_output]
        seen, self_mask = task_masks(forest, groups, runs, mask=mask, self_gate=self_gate)
        reads = [forest.category_of(task) for task in forest.task_names]
        super().__init__(dim, seen, self_mask=self_mask, reads=reads, device=device, dtype=dtype)

    def weights(self, x: Tensor, *, residual: bool = False) -> Tensor:
        """Return the weights of the gates (B, T, E), outputs of an expert added."""
        weights = super().weights(x, residual=residual)
        number = max(self.expert_of_output) + 1
        if number == weights.shape[-1]:
            return weights
        index = torch.tensor(self.expert_of_output, device=weights.device)
        return weights.new_zeros(*weights.shape[:-1], number).index_add(-1, index, weights)


def _numbered(owner: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{group} {list(owner[:e]).count(group)}" for e, group in enumerate(owner))
