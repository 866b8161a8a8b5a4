"""Experts spread over the ranks of a process group."""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from core_gates.collectives import Group, all_to_all, num_ranks, rank_in
from core_gates.moe.checkpoint_layouts import take_own_experts
from core_gates.moe.experts import StackedExperts
from core_gates.routing.capacity import refuse_non_finite


class ExpertParallel(nn.Module):
    """Keep a part of the experts on every rank and send each token to where its experts are.

    Rank r of R holds the experts from r E / R on. It takes the place of the experts of a
    `core_gates.moe.layer.MoELayer`, on all ranks alike, with any dispatch::

        layer = MoELayer(gate, ExpertParallel.shard(StackedExperts(64, 512, 1024)))

    The ranks may have different numbers of tokens, also none, but must run the layer, and its
    backward pass, equally often. The exchange waits for the host once, to learn its sizes.

    The gradient of an expert is that of the sum of the losses of all ranks; it is complete on the
    rank that holds it, and needs no reduction. Alongside parameters whose gradients are averaged
    over the ranks (``DistributedDataParallel``, which must be told to ignore the experts), it has
    to be averaged, too: see ``average_gradients``.

    A published state, with one entry per expert, is loaded as it is: each rank takes its own. The
    part of a rank is written by `core_gates.moe.checkpoint_export.export_state_dict`.

    Args:
        experts: The experts of this rank, as many on each.
        group: Process group; all ranks if None.
        average_gradients: Whether gradients of the experts are divided by the number of ranks.

    Attributes:
        num_experts: Number of experts of all ranks.
        first_expert: Number of the first expert of this rank among those of all.
    """

    def __init__(
        self, experts: StackedExperts, group: Group = None, *, average_gradients: bool = False
    ) -> None:
        super().__init__()
        self.experts = experts
        self.group = group
        self.num_ranks = num_ranks(group)
        self.num_experts = experts.num_experts * self.num_ranks
        self.first_expert = experts.num_experts * rank_in(group)
        self.average_gradients = average_gradients
        self.register_load_state_dict_pre_hook(take_own_experts)  # type: ignore[no-untyped-call]

    @classmethod
    def shard(
        cls, experts: StackedExperts, group: Group = None, *, average_gradients: bool = False
    ) -> Self:
        """Return the part of this rank of experts that all ranks hold alike.

        Args:
            experts: All experts, with equal values on all ranks.
            group: Process group; all ranks if None.
            average_gradients: Whether gradients are divided by the number of ranks.

        Raises:
            ValueError: The number of experts is not a multiple of that of the ranks.
        """
        size = num_ranks(group)
        if experts.num_experts % size:
            raise ValueError(
                f"{experts.num_experts} experts cannot be spread evenly over {size} ranks"
            )
        number = experts.num_experts // size
        start = number * rank_in(group)
        mine = _alike(experts, number)
        with torch.no_grad():
            for name, parameter in mine.named_parameters():
                parameter.copy_(experts.get_parameter(name)[start : start + number])
        return cls(mine, group, average_gradients=average_gradients)

    def unshard(self) -> StackedExperts:
        """Return the experts of all ranks, on every rank; for checkpoints and for serving."""
        everyone = _alike(self.experts, self.num_experts)
        with torch.no_grad():
            for name, parameter in everyone.named_parameters():
                mine = self.experts.get_parameter(name).detach().contiguous()
                parts = [mine]
                if self.num_ranks > 1:
                    parts = [torch.empty_like(mine) for _ in range(self.num_ranks)]
                    dist.all_gather(parts, mine, group=self.group)
                parameter.copy_(torch.cat(parts))
        return everyone

    def run(
        self,
        rows: Tensor,
        counts: Tensor,
        *,
        gather: Tensor | None = None,
        non_finite: Tensor | None = None,
    ) -> Tensor:
        """Apply each expert to its rows, wherever it is; see `StackedExperts.run`.

        Args:
            rows: Rows (N, D) sorted by expert, or any rows (M, D) with ``gather``.
            counts: Number of rows of every expert of all ranks (E,).
            gather: For each sorted row, the row of ``rows`` that it is (N,).
            non_finite: Number of weights that are not finite (), which travels with the counts.

        Raises:
            GatesError: On every rank: the weights of some rank are not finite.
        """
        if self.num_ranks == 1:
            return self.experts.run(rows, counts, gather=gather)
        number = self.experts.num_experts
        flag = counts.new_zeros(()) if non_finite is None else non_finite
        flags = flag.expand(self.num_ranks, 1)
        leaving = torch.cat([counts.view(self.num_ranks, number), flags], 1)
        coming = torch.empty_like(leaving)  # for each rank, the rows for each expert here
        dist.all_to_all_single(coming, leaving, group=self.group)
        by_rank, flags = torch.stack([leaving, coming])[..., :-1], coming[:, -1]
        sent, received, bad = torch.stack([*by_rank.sum(-1), flags]).tolist()
        refuse_non_finite(sum(bad), "a gate")
        rows = rows if gather is None else rows.index_select(0, gather)
        here = all_to_all(rows[: sum(sent)], sent, received, self.group)

        expert = torch.arange(number, device=counts.device).repeat(self.num_ranks)
        arriving = by_rank[1].flatten()
        order = expert.repeat_interleave(arriving, output_size=sum(received)).argsort(stable=True)
        back = torch.empty_like(order).scatter(
            0, order, torch.arange(len(order), device=order.device)
        )
        if self.average_gradients:  # only what lies between the two sees the smaller gradient
            here = _scale_gradient(here, self.num_ranks)
        out = self.experts.run(here, by_rank[1].sum(0), gather=order)
        if self.average_gradients:
            out = _scale_gradient(out, 1 / self.num_ranks)
        out = all_to_all(out.index_select(0, back), received, sent, self.group)
        return torch.cat([out, out.new_zeros(rows.shape[0] - sum(sent), out.shape[1])])

    def batched(self, x: Tensor, *, used: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Apply each expert to as many rows as every other: (E, C, D) to (E, C, D)."""
        counts = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return self.run(x.flatten(0, 1), counts).view(x.shape)

    def dense(self, x: Tensor, *, used: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Apply all experts to all tokens: (..., D) to (..., E, D)."""
        out = self.batched(x.reshape(1, -1, x.shape[-1]).expand(self.num_experts, -1, -1))
        return out.transpose(0, 1).reshape(*x.shape[:-1], self.num_experts, x.shape[-1])

    def single(self, x: Tensor, expert: int) -> Tensor:
        """Apply one expert, the same on all ranks: (..., D) to (..., D)."""
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts[expert] = x.shape[:-1].numel()
        return self.run(x.reshape(-1, x.shape[-1]), counts).view(x.shape)


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that differ between ranks because experts are spread, by name.

    ``DistributedDataParallel`` must ignore them, as must the sum of norms for clipping, which needs
    those of all ranks.
    """
    return {
        f"{prefix}.{name}".lstrip("."): parameter
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertParallel)
        for name, parameter in module.named_parameters()
    }


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return cast(Tensor, _ScaleGradient.apply(x, factor))  # type: ignore[no-untyped-call]


def _alike(experts: StackedExperts, num_experts: int) -> StackedExperts:
    """Return new experts of the same form, in another number."""
    weight = experts.down_proj
    return StackedExperts(
        num_experts,
        experts.dim,
        experts.hidden_dim,
        activation=experts.activation,
        gated=experts.gated,
        bias=experts.down_proj_bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
