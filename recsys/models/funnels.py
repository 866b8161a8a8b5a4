"""Networks for funnels of an exposure: conditional probabilities (ESMM), transfer (AITM)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.features.prior import TransferGate
from core_gates.moe.normed_experts import NormedExperts
from recsys.models.net import MultiTaskNet, Towers, rows_where, whole
from recsys.schema import Labels


class ESMM(MultiTaskNet):
    """``p(conversion) = p(click) p(conversion | click)`` over all exposures (Ma et al., 2018).

    A network per task predicts its conditional probability; the probability of a task is the
    product along its conditions, and both tasks are trained on all rows.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        conditions: Task -> the task without which it cannot happen, such as
            ``{"buy": "click"}``; other tasks have no condition.
        dim: Features of a task's network, the input of its tower; with ``hidden_dims`` None there
            is no such network.
        hidden_dims: Features of the layers before, or None: towers read the inputs.
        norm: ``batch``: normalize every layer before its activation; None for none.
        activation: Of the network.
        tower_dims: Features of the hidden layers of a tower.
        tower_norm: Normalization of those, ``batch`` or None.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, a name is unknown, or the conditions are no forest of tasks.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        conditions: Mapping[str, str],
        dim: int = 64,
        hidden_dims: Sequence[int] | None = (128,),
        norm: str | None = None,
        activation: str = "relu",
        tower_dims: Sequence[int] = (64,),
        tower_norm: str | None = None,
        tower_activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_dim, tasks)
        self.order = _in_order([task.name for task in self.tasks], conditions)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        number = len(self.tasks)
        self.bottoms = (
            None
            if hidden_dims is None
            else NormedExperts(
                [1] * number,
                input_dim,
                [*hidden_dims, dim],
                norm=norm,
                activation=activation,
                **where,
            )
        )
        self.towers = Towers(
            number,
            input_dim if hidden_dims is None else dim,
            tower_dims,
            norm=tower_norm,
            activation=tower_activation,
            **where,
        )

    def conditionals(self, v: Tensor) -> Tensor:
        """Return the logits (B, T) of each task given its condition."""
        return self.towers(v if self.bottoms is None else self.bottoms(v))

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        return self.joint(self.conditionals(v))

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the networks and towers of tasks that are a condition of others."""
        conditions = {condition for _, condition in self.order}
        shared = [task in conditions for task in range(len(self.tasks))]
        parts = [part for part in (self.bottoms, self.towers) if part is not None]
        return rows_where([p for part in parts for p in part.parameters()], shared)

    def joint(self, conditionals: Tensor) -> Tensor:
        """Return the logits (B, T) of each task, given those under its condition (B, T)."""
        logits = list(conditionals.unbind(1))
        for task, condition in self.order:
            logits[task] = product_logit(logits[task], logits[condition])
        return torch.stack(logits, 1)


def product_logit(a: Tensor, b: Tensor) -> Tensor:
    """Return the logit of σ(a) σ(b), exact also where the probabilities are close to 0 or 1.

    ``1 / (σ(a) σ(b)) - 1 = e^-a + e^-b + e^-(a+b)``.
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), 0)


def _in_order(names: Sequence[str], conditions: Mapping[str, str]) -> list[tuple[int, int]]:
    """Return pairs (task, condition), each after that of its condition."""
    if strangers := sorted({*conditions, *conditions.values()} - {*names}):
        raise ValueError(
            f"conditions name {', '.join(strangers)}, no task; the tasks are {', '.join(names)}"
        )
    if not conditions:
        raise ValueError(
            "ESMM needs conditions={'task': 'the task without which it cannot happen'}, got none"
        )
    done, pairs = [name for name in names if name not in conditions], []
    while waiting := [name for name in names if name not in done]:
        ready = [name for name in waiting if conditions[name] in done]
        if not ready:
            raise ValueError(f"conditions go in a circle among {', '.join(waiting)}")
        pairs += [(names.index(name), names.index(conditions[name])) for name in ready]
        done += ready
    return pairs


class AITM(MultiTaskNet):
    """Adaptive information transfer along a chain of tasks (Xi et al., 2021).

    Each task of the chain needs the one before: a later probability above an earlier one is
    penalized by ``α Σ_t mean max(p_t - p_{t-1}, 0)``.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        chain: Names of the tasks of the chain, the first step first; all tasks if None. Other tasks
            have a separate network.
        calibration: Weight α of the penalty.
        dim: Features of a task's network, the input of its tower.
        hidden_dims: Features of the layers before.
        norm: ``batch``: normalize every layer, also that between steps, before its activation;
            None for none.
        activation: Of the network and of the layer between steps.
        tower_dims: Features of the hidden layers of a tower.
        tower_norm: Normalization of those, ``batch`` or None.
        tower_activation: Activation of those.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1, a name is unknown, or the chain has fewer than two tasks.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        chain: Sequence[str] | None = None,
        calibration: float = 0.6,
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
        check_at_least(0, calibration=calibration)
        names = [task.name for task in self.tasks]
        chain = names if chain is None else list(chain)
        if len(chain) < 2 or len({*chain}) < len(chain) or not {*chain} <= {*names}:
            raise ValueError(
                f"chain must name two or more distinct tasks of {', '.join(names)}, got {chain}"
            )
        self.chain = [names.index(name) for name in chain]
        self.calibration = calibration
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        stack: dict[str, Any] = {"norm": norm, "activation": activation, **where}
        self.bottoms = NormedExperts([1] * len(names), input_dim, [*hidden_dims, dim], **stack)
        steps = range(len(chain) - 1)
        self.handed_on = nn.ModuleList(NormedExperts([1], dim, [dim], **stack) for _ in steps)
        self.transfers = nn.ModuleList(TransferGate(dim, bias=False, **where) for _ in steps)
        self.towers = Towers(
            len(names), dim, tower_dims, norm=tower_norm, activation=tower_activation, **where
        )

    def forward(
        self,
        v: Tensor,
        prior: Tensor | None = None,  # noqa: ARG002
        ids: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the logits (B, T) of rows (B, D)."""
        z = list(self.bottoms(v).unbind(1))
        steps = zip(self.chain[:-1], self.chain[1:], self.handed_on, self.transfers, strict=True)
        for before, task, hand_on, transfer in steps:
            z[task] = transfer(hand_on(z[before])[:, 0], z[task])
        return self.towers(torch.stack(z, 1))

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return what steps of the chain before the last learn, and hand on to several others."""
        sources = [task in self.chain[:-1] for task in range(len(self.tasks))]
        bottoms = rows_where(self.bottoms.parameters(), sources)
        return [*bottoms, *whole(*self.handed_on[:-1], *self.transfers[:-1])]

    def losses(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the penalty of later steps that are more probable than earlier ones."""
        p = logits[:, self.chain].sigmoid()
        return {"calibration": self.calibration * (p[:, 1:] - p[:, :-1]).relu().mean(0).sum()}
