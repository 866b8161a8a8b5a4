"""Experts whose weights are stacked, so that all of them are one module and one op."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.activations import activate, check_activation
from core_gates.errors import GatesError, check_at_least
from core_gates.moe.checkpoint_layouts import merge_experts
from core_gates.moe.dense_mlp import check_copy, read_mlps
from core_gates.ops.grouped_linear.segments import WEIGHT_FIRST
from core_gates.ops.grouped_mlp.op import grouped_mlp

Method = Literal["run", "batched", "dense", "single", "chosen"]


class StackedExperts(nn.Module):
    """E feed-forward networks ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if not gated.

    The weights are those of E pairs of linear layers, stacked: ``gate_up_proj`` (E, 2F, D) with the
    gate first (``up_proj`` (E, F, D) if not gated) and ``down_proj`` (E, D, F), which are also the
    names of the fused layout of transformers. State dictionaries with one entry per expert, as
    Mixtral, Qwen3-MoE and DeepSeek-V3 publish them, are loaded as they are;
    :func:`~core_gates.moe.checkpoint_export.export_state_dict` writes them.

    Args:
        num_experts: Number of experts E.
        dim: Features D of a token.
        hidden_dim: Hidden features F of an expert.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``identity``.
        gated: Whether the activated half multiplies another one (Shazeer, 2020: SwiGLU).
        bias: Whether both layers have biases.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Attributes:
        first_expert: Number of the first expert in a state with one entry per expert; not 0 where
            the experts are a part of those of all ranks.

    Raises:
        ValueError: A size is below 1, or the activation is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        check_activation(activation)
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.first_expert = 0
        self.activation, self.gated = activation, gated

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        width = 2 * hidden_dim if gated else hidden_dim
        self._first = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self._first, parameter(width, dim))
        self.register_parameter(f"{self._first}_bias", parameter(width) if bias else None)
        self.down_proj = parameter(dim, hidden_dim)
        self.register_parameter("down_proj_bias", parameter(dim) if bias else None)
        self.register_load_state_dict_pre_hook(merge_experts)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every weight as ``nn.Linear`` of its size does; zero the biases."""
        for name, parameter in self.named_parameters():
            if "_bias" in name:  # a parametrization calls it parametrizations.NAME.original
                nn.init.zeros_(parameter)
            else:
                bound = parameter.shape[-1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_dense(
        cls,
        mlp: nn.Module | Sequence[nn.Module],
        num_experts: int | None = None,
        *,
        activation: str | None = None,
    ) -> Self:
        """Return experts that are copies of a trained network (Komatsuzaki et al., 2023).

        Args:
            mlp: One network that all experts copy, or one for each expert. Its linear layers are
                named ``gate_proj up_proj down_proj``, ``w1 w3 w2``, ``fc1 fc2`` or ``w1 w2``, or it
                is ``nn.Sequential(linear, activation, linear)``. Dropout, which experts have none
                of, is passed over. Random tokens show that the experts compute what it does.
            num_experts: Number of copies of one network.
            activation: Needed where no submodule of the network shows it.

        Raises:
            ValueError: The network is of another form, such as with a normalization, or computes
                something else, or the number of experts is unclear.
        """
        if isinstance(mlp, nn.Module):
            if num_experts is None:
                raise ValueError("num_experts is needed where one network is copied")
            networks = [mlp] * num_experts
        else:
            networks = list(mlp)
            if not networks or num_experts not in (None, len(networks)):
                raise ValueError(f"{num_experts} experts cannot copy {len(networks)} networks")
        parts = read_mlps(networks, activation)
        first = parts[0]
        experts = cls(
            len(parts),
            first.down.shape[0],
            first.down.shape[1],
            activation=first.activation,
            gated=first.gate is not None,
            bias=first.up_bias is not None,
            device=first.down.device,
            dtype=first.down.dtype,
        )
        with torch.no_grad():
            for e, part in enumerate(parts):
                for name, value in part.stacked().items():
                    experts.get_parameter(name)[e] = value
        for e, network in enumerate(networks[:1] if isinstance(mlp, nn.Module) else networks):
            check_copy(network, parts[e], partial(experts.single, expert=e))
        return experts

    def run(
        self,
        rows: Tensor,
        counts: Tensor,
        *,
        gather: Tensor | None = None,
        non_finite: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: Rows (N, D) sorted by expert, or any rows (M, D) with ``gather``.
            counts: Number of rows of every expert (E,), int64. Rows beyond their sum belong to no
                expert and give zeros.
            gather: For each sorted row, the row of ``rows`` that it is (N,).
            non_finite: Not read: on a GPU nothing here waits for the host.

        Returns:
            Rows (N, D), sorted by expert.
        """
        return cast(Tensor, self("run", rows, counts, gather))

    def batched(self, x: Tensor, *, used: Tensor | None = None) -> Tensor:
        """Apply each expert to as many rows as every other: (E, C, D) to (E, C, D).

        Hooks learn from ``used`` (E, C) which results are of use; it changes none of them.
        """
        return cast(Tensor, self("batched", x, used=used))

    def dense(self, x: Tensor, *, used: Tensor | None = None) -> Tensor:
        """Apply all experts to all tokens: (..., D) to (..., E, D); ``used`` is (..., E)."""
        return cast(Tensor, self("dense", x, used=used))

    def single(self, x: Tensor, expert: int) -> Tensor:
        """Apply one expert: (..., D) to (..., D). Called for many, its backward pass is slow."""
        return cast(Tensor, self("single", x, expert))

    def chosen(self, x: Tensor, indices: Tensor, *, used: Tensor | None = None) -> Tensor:
        """Apply to each token its own experts: (T, D) and (T, K) to (T, K, D).

        For a step of few tokens, where reading the weights takes the time. Inside
        ``torch.compile`` these are element-wise multiplications and sums, which read at the
        bandwidth of the memory once they are fused.
        """
        return cast(Tensor, self("chosen", x, indices, used=used))

    def forward(self, method: Method, *inputs: Any, used: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return what the method of that name does.

        All go through here, so that hooks on the module (FSDP gathers its parameters in one) run.

        Raises:
            GatesError: ``method`` is the name of none.
        """
        if not isinstance(method, str) or method not in get_args(Method):
            found = repr(method) if isinstance(method, str) else type(method).__name__
            raise GatesError(
                f"{type(self).__name__} was called with {found}, expected the name of a method:"
                " use a MoELayer, or experts.run(rows, counts), .batched, .dense or .chosen"
            )
        return cast(Tensor, getattr(self, f"_{method}")(*inputs))

    def experts_of(
        self, outputs: Tensor, method: Method, *inputs: Any, used: Tensor | None = None
    ) -> Tensor:
        """Return which expert each result of a call of ``forward`` is of, for hooks.

        Args:
            outputs: Results (..., D) of the call.
            method: Method of the call.
            inputs: Its arguments.
            used: True (...) at the results that are of use; all by default.

        Returns:
            Experts (...), int64; E where a result is of no expert or of no use.
        """
        shape, device = outputs.shape[:-1], outputs.device
        if method == "run":
            ends, row = inputs[1].cumsum(0), torch.arange(shape[0], device=device)
            experts = torch.searchsorted(ends, row, right=True)
        elif method == "single":
            experts = torch.full(shape, inputs[1], device=device)
        elif method == "chosen":
            experts = inputs[1]
        else:
            experts = torch.arange(self.num_experts, device=device)
            experts = (experts.unsqueeze(1) if method == "batched" else experts).expand(shape)
        return experts if used is None else experts.masked_fill(~used, self.num_experts)

    def _run(self, rows: Tensor, counts: Tensor, gather: Tensor | None) -> Tensor:
        first, first_bias, down, down_bias = self._weights()
        return grouped_mlp(
            rows,
            first,
            down,
            counts,
            first_bias=first_bias,
            down_bias=down_bias,
            activation=self.activation,
            gated=self.gated,
            gather=gather,
        )

    def _batched(self, x: Tensor) -> Tensor:
        first, first_bias, down, down_bias = self._weights()

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            product = torch.bmm(x, weight.mT)
            return product if bias is None else product + bias.unsqueeze(1)

        hidden = activate(linear(x, first, first_bias), self.activation, self.gated)
        return linear(hidden, down, down_bias)

    def _dense(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, self.dim).expand(self.num_experts, -1, -1)
        out = self._batched(flat).transpose(0, 1)
        return out.reshape(*x.shape[:-1], self.num_experts, self.dim)

    def _single(self, x: Tensor, expert: int) -> Tensor:
        first, first_bias, down, down_bias = (
            None if parameter is None else parameter[expert] for parameter in self._weights()
        )
        assert first is not None
        assert down is not None
        hidden = activate(F.linear(x, first, first_bias), self.activation, self.gated)
        return F.linear(hidden, down, down_bias)

    def _chosen(self, x: Tensor, indices: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            if not WEIGHT_FIRST:
                pairs = zip(x, indices.tolist(), strict=True)
                rows = [self._single(row, e) for row, experts in pairs for e in experts]
                return torch.stack(rows).view(*indices.shape, -1)
            twice = x.repeat_interleave(2, 0).view(-1, 2, self.dim)
            pairs = zip(twice, indices.tolist(), strict=True)
            rows = [self._step(pair, e) for pair, experts in pairs for e in experts]
            return torch.stack(rows).view(*indices.shape, -1)
        first, first_bias, down, down_bias = self._weights()

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            product = (weight[indices].float() * x.float().unsqueeze(-2)).sum(-1).to(x.dtype)
            return product if bias is None else product + bias[indices]

        hidden = activate(linear(x.unsqueeze(-2), first, first_bias), self.activation, self.gated)
        return linear(hidden, down, down_bias)

    def _step(self, pair: Tensor, expert: int) -> Tensor:
        """Apply one expert to a row that is duplicated: a weight is read faster for two rows."""
        first, first_bias, down, down_bias = self._weights()
        hidden = (first[expert] @ pair.t()).t().contiguous()
        hidden = hidden if first_bias is None else hidden + first_bias[expert]
        hidden = activate(hidden, self.activation, self.gated)
        out = (down[expert] @ hidden.t())[:, 0]
        return out if down_bias is None else out + down_bias[expert]

    def _weights(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        # By name, not from ``_parameters``, where a parametrized weight does not lie.
        first: Tensor = getattr(self, self._first)
        first_bias: Tensor | None = getattr(self, f"{self._first}_bias")
        return first, first_bias, self.down_proj, cast(Tensor | None, self.down_proj_bias)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(experts)``."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim},"
            f" activation={self.activation}, gated={self.gated}"
        )
