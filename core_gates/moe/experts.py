"""Experts as stacked weights: one grouped matmul for all of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.activations import activate, check_activation
from core_gates.errors import GatesError, check_at_least
from core_gates.moe.checkpoint_layouts import merge_experts
from core_gates.moe.dense_mlp import check_copy, read_mlps
from core_gates.numerics import autocast_dtype
from core_gates.ops._native import add_products, product, products
from core_gates.ops._select import derivatives, use_cpp, use_slices
from core_gates.ops.grouped_linear.segments import WEIGHT_FIRST
from core_gates.ops.grouped_mlp.op import grouped_mlp


class Stretch(NamedTuple):
    """Neighboring groups of as many experts each, with as many inputs each.

    Attributes:
        groups: Number of groups.
        experts: Experts of each.
        runs: Inputs of each.
    """

    groups: int
    experts: int
    runs: int


def stretches_of(counts: Sequence[int], runs: Sequence[int]) -> list[Stretch]:
    """Merge neighboring groups of equal experts and inputs into stretches.

    Args:
        counts: Experts of each group.
        runs: Inputs of each group.
    """
    stretches: list[Stretch] = []
    for experts, inputs in zip(counts, runs, strict=True):
        if stretches and stretches[-1][1:] == (experts, inputs):
            stretches[-1] = stretches[-1]._replace(groups=stretches[-1].groups + 1)
        else:
            stretches.append(Stretch(1, experts, inputs))
    return stretches


def stacked_linear(
    x: Tensor, weight: Tensor, stretches: Sequence[Stretch], bias: Tensor | None = None
) -> Tensor:
    """Return ``W_e x_i + b_e`` (O, N, F) for every expert e and every input i of its group.

    Args:
        x: Inputs (I, N, D), those of a group next to each other.
        weight: Weights of the experts (E, F, D), those of a group next to each other.
        stretches: The groups.
        bias: Biases of the experts (E, F).

    Returns:
        Outputs, those of an expert next to each other.
    """
    bias = weight.new_zeros(len(weight), 0) if bias is None else bias
    if use_slices(x, weight, bias):
        return _sliced(x, weight, bias, list(stretches))
    return _define(x, weight, bias, stretches)


def _define(x: Tensor, weight: Tensor, bias: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    outputs = []
    for part in _parts(x, weight, bias, stretches):
        groups, experts, runs = part.stretch
        rows = part.rows.view(groups, 1, runs * x.shape[1], x.shape[2])
        y = rows @ part.weight.view(groups, experts, *weight.shape[1:]).mT
        if bias.shape[1]:
            y = y + part.bias.view(groups, experts, 1, bias.shape[1]).to(y.dtype)
        outputs.append(y.view(groups * experts * runs, x.shape[1], weight.shape[1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Part(NamedTuple):
    """A stretch with experts, its inputs (groups, runs N, D), weights and biases."""

    stretch: Stretch
    rows: Tensor
    weight: Tensor
    bias: Tensor


def _parts(
    x: Tensor, weight: Tensor, bias: Tensor, stretches: Sequence[Stretch]
) -> Iterator[_Part]:
    row = expert = 0
    for stretch in stretches:
        groups, experts, runs = stretch
        rows, row = x[row : row + groups * runs], row + groups * runs
        mine, expert = slice(expert, expert + groups * experts), expert + groups * experts
        if experts:
            rows = rows.reshape(groups, runs * x.shape[1], x.shape[2])
            yield _Part(stretch, rows, weight[mine], bias[mine])


def _outputs(y: Tensor, stretches: Sequence[Stretch]) -> Iterator[Tensor]:
    """Iterate over the stretches and their outputs (groups experts, runs N, F)."""
    start = 0
    for groups, experts, runs in stretches:
        end = start + groups * experts * runs
        if experts:
            yield y[start:end].view(groups * experts, runs * y.shape[1], y.shape[2])
        start = end


class _Sliced(torch.autograd.Function):
    """Every matmul writes to its part of the result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stretches: list[Stretch]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.stretches, ctx.cpp = stretches, use_cpp(x, weight, bias)
        number = sum(groups * experts * runs for groups, experts, runs in stretches)
        out = x.new_empty(number, x.shape[1], weight.shape[1])
        parts = zip(_parts(x, weight, bias, stretches), _outputs(out, stretches), strict=True)
        for part, result in parts:
            if part.stretch.experts == 1:
                _multiply(part.rows, part.weight, part.bias, result, cpp=ctx.cpp)
                continue
            grouped = [_grouped(t, part.stretch) for t in (part.weight, part.bias, result)]
            for rows, *group in zip(part.rows, *grouped, strict=True):
                _multiply(rows.expand(part.stretch.experts, -1, -1), *group, cpp=ctx.cpp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivatives(_define, (x, weight, bias), (ctx.stretches,), grad), None
        grad = grad.contiguous()
        idle = any(not stretch.experts for stretch in ctx.stretches)
        of_x = (torch.zeros_like if idle else torch.empty_like)(
            x, memory_format=torch.contiguous_format
        )
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        parts = zip(
            _parts(x, weight, bias, ctx.stretches),
            _parts(of_x, of_weight, of_bias, ctx.stretches),
            _outputs(grad, ctx.stretches),
            strict=True,
        )
        for part, to, outer in parts:
            if bias.shape[1]:
                torch.sum(outer, 1, out=to.bias)
            if part.stretch.experts == 1:
                products(outer, part.weight, to.rows, cpp=ctx.cpp)
                products(outer.mT, part.rows, to.weight, cpp=ctx.cpp)
                continue
            grouped = [_grouped(t, part.stretch) for t in (part.weight, to.weight, outer)]
            for group in zip(part.rows, to.rows, *grouped, strict=True):
                _backward_of_group(*group, cpp=ctx.cpp)
        return of_x, of_weight, of_bias, None


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, cpp: bool) -> None:
    """Write the outputs (E, N, F) of experts, each with its rows (E, N, D)."""
    products(rows, weight.mT, out, bias if bias.shape[1] else None, cpp=cpp)


def _backward_of_group(
    rows: Tensor, to_rows: Tensor, factors: Tensor, to_factors: Tensor, grad: Tensor, *, cpp: bool
) -> None:
    """Write the gradients of the input of a group and of the weights of its experts."""
    if cpp:
        to_rows.copy_(product(grad[0], factors[0], cpp=True))
    else:
        torch.mm(grad[0], factors[0], out=to_rows)
    for left, right in zip(grad[1:], factors[1:], strict=True):
        add_products(to_rows, left, right, cpp=cpp)
    products(grad.mT, rows.expand(len(factors), -1, -1), to_factors, cpp=cpp)


def _grouped(t: Tensor, stretch: Stretch) -> Tensor:
    return t.view(stretch.groups, stretch.experts, *t.shape[1:])


_sliced: Callable[..., Tensor] = _Sliced.apply


Method = Literal["run", "batched", "dense", "single", "chosen"]


class StackedExperts(nn.Module):
    """E feed-forward networks ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if not gated.

    The weights are those of E pairs of linear layers, stacked: ``gate_up_proj`` (E, 2F, D) with the
    gate first (``up_proj`` (E, F, D) if not gated) and ``down_proj`` (E, D, F), which are also the
    names of the fused layout of transformers. State dictionaries with one entry per expert, as
    Mixtral, Qwen3-MoE and DeepSeek-V3 publish them, are loaded as they are;
    `core_gates.moe.checkpoint_export.export_state_dict` writes them.

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
        mlp = list(mlp) if isinstance(mlp, nn.ModuleList) else mlp
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
        """Call the method of that name, and return its result.

        All go through here, so that hooks on the module (FSDP gathers its parameters in one) run.

        Raises:
            GatesError: ``method`` is the name of none.
        """
        if not isinstance(method, str) or method not in get_args(Method):
            given = repr(method) if isinstance(method, str) else type(method).__name__
            raise GatesError(
                f"{type(self).__name__} was called with {given}, expected the name of a method:"
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
            return product if bias is None else product + bias.unsqueeze(1).to(product.dtype)

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
        x = x.to(autocast_dtype(x) or x.dtype)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            product = (weight[indices].float() * x.float().unsqueeze(-2)).sum(-1).to(x.dtype)
            return product if bias is None else product + bias[indices].to(product.dtype)

        hidden = activate(linear(x.unsqueeze(-2), first, first_bias), self.activation, self.gated)
        return linear(hidden, down, down_bias)

    def _step(self, pair: Tensor, expert: int) -> Tensor:
        """Apply one expert to a row that is duplicated: a weight is read faster for two rows."""
        first, first_bias, down, down_bias = self._weights()
        hidden = (first[expert] @ pair.t()).t().contiguous()
        hidden = hidden if first_bias is None else hidden + first_bias[expert].to(hidden.dtype)
        hidden = activate(hidden, self.activation, self.gated)
        out = (down[expert] @ hidden.t())[:, 0]
        return out if down_bias is None else out + down_bias[expert].to(out.dtype)

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
