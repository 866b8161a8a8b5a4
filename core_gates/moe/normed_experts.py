"""Experts with normalization inside, stacked, and their norms."""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from core_gates.activations import activate, check_activation
from core_gates.collectives import Group, num_ranks
from core_gates.errors import check_at_least, check_option
from core_gates.moe.experts import stacked_linear, stretches_of
from core_gates.numerics import accumulation_dtype, widest_float
from core_gates.ops.norm_act.op import norm_act
from core_gates.ops.norm_act.reference import per_expert
from core_gates.routing.repeated import in_backward
from core_gates.training.batch_norm import SyncBatchNorm, moments_of_ranks


class ExpertNorm(SyncBatchNorm):
    """Normalize every channel of every expert over the rows of all ranks, then activate.

    Parameters and statistics are stacked: (E, C).

    Args:
        num_experts: Number of experts E.
        num_features: Channels C of an expert.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics; None averages all batches.
        group: Process group; all ranks if None.
        device: Device of parameters and statistics.
        dtype: Floating dtype of the parameters and statistics.
    """

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, group=group, device=device, dtype=dtype)
        options = {"device": device, "dtype": dtype}
        shape = num_experts, num_features
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(torch.empty(shape, **options)))  # type: ignore[arg-type]
        for name in ("running_mean", "running_var"):
            setattr(self, name, torch.empty(shape, **options))  # type: ignore[arg-type]
        self.reset_parameters()  # type: ignore[no-untyped-call]

    def forward(  # type: ignore[override]
        self, x: Tensor, offset: Tensor, experts: Sequence[int], activation: str
    ) -> Tensor:
        """Normalize and activate the outputs of linear layers.

        Args:
            x: Outputs (O, N, C).
            offset: Bias of the linear layers (E, C), added to ``x``.
            experts: Expert of every output (O,), in ascending order.
            activation: One of those of experts.

        Returns:
            Activations (O, N, C).

        Raises:
            ValueError: A single row is to be normalized by itself.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        tensors = x, offset, self.weight, self.bias
        options: dict[str, Any] = {"experts": experts, "activation": activation, "eps": self.eps}
        if not self.training:
            return norm_act(*tensors, (self.running_mean, self.running_var), **options)[0]
        counts: Tensor | int = x.shape[1]
        if num_ranks(self.group) > 1:
            mean, variance, counts = self._of_ranks(x, offset, experts)
            y, mean, variance = norm_act(*tensors, (mean, variance), **options)
        elif x.shape[1] < 2:
            raise ValueError(
                "batch normalization needs more than 1 row in training, got a batch of"
                f" {x.shape[1]}: drop the last, small batch"
            )
        else:
            if len(experts) > len(offset):
                counts = _counts(x, experts, len(offset))
            y, mean, variance = norm_act(*tensors, **options)
        if not in_backward():
            self._move(mean, variance, counts)
        return y

    def _of_ranks(
        self, x: Tensor, offset: Tensor, experts: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance (E, C) of the rows of all ranks, and their number (E, 1)."""
        exact = x.to(accumulation_dtype(x))
        rows = _counts(x, experts, len(offset))
        index = torch.tensor(list(experts), device=x.device)
        sums = per_expert(exact.sum(1), experts, len(offset))
        mean = sums / rows.clamp(min=1)
        squares = (exact - mean[index].unsqueeze(1)).square().sum(1)
        squares = per_expert(squares, experts, len(offset))
        mean, variance, rows = moments_of_ranks(mean, squares, rows, self.group)
        mean = mean + offset
        return mean.to(exact.dtype), variance.to(exact.dtype), rows

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, rows: Tensor | int) -> None:
        """Move the running statistics; a batch that is empty on all ranks moves nothing.

        Args:
            mean: Mean (E, C).
            variance: Biased variance (E, C).
            rows: Number of rows of every expert (E, 1), or of each.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share: Tensor | float | None = self.momentum
        if isinstance(rows, Tensor):
            moved = rows > 0
            self.num_batches_tracked += moved[0, 0].to(torch.int64)
            correction: Tensor | float = rows / (rows - 1).clamp(min=1)
        else:
            moved = None
            self.num_batches_tracked += 1
            correction = rows / (rows - 1)
        if share is None:
            share = 1 / self.num_batches_tracked.clamp(min=1).to(mean.dtype)
        share = share if moved is None else share * moved.to(mean.dtype)
        for running, new in (
            (self.running_mean, mean),
            (self.running_var, variance * correction),
        ):
            running.lerp_(new.to(running.dtype), _like(share, running))


def _like(share: Tensor | float, running: Tensor) -> Any:
    return share.to(running.dtype) if isinstance(share, Tensor) else share


def _counts(x: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """Return the number of rows of every expert (E, 1)."""
    rows = [x.shape[1] * list(experts).count(e) for e in range(num_experts)]
    return torch.tensor(rows, dtype=widest_float(x.device), device=x.device).unsqueeze(1)


class NormedExperts(nn.Module):
    """E networks of layers ``act(BN(W x + b))`` side by side, the last layer included.

    Without the normalization experts differ widely in scale, or have units that are zero nearly
    everywhere, and no gate can weigh them fairly (HoME, arXiv 2408.05430, section 3.1). The mean
    and variance are those of the batch, over all ranks; every expert has its own.

    Experts may come in groups: those of a group read one input. A group with several *runs* is
    applied to that many inputs with the same weights, and its statistics are those of the rows of
    all of them.

    Args:
        num_experts: Number of experts E, or the experts of each of G groups.
        dim: Features D of the input.
        hidden_dims: Features of the layers, the last of which are those of the output F.
        norm: ``batch``, or None for layers ``act(W x + b)``.
        activation: ``silu`` (Swish), ``gelu``, ``gelu_tanh``, ``relu`` or ``identity``.
        runs: Inputs of each group; one if None.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics.
        group: Ranks that share statistics; all ranks if None.
        device: Device of parameters and statistics.
        dtype: Floating dtype of parameters and statistics.

    Attributes:
        num_experts: Number of experts E; the leading dimension of every parameter.
        expert_of_output: Expert of each output; those of an expert with several runs are adjacent.

    Shape:
        ``x`` (N, D), which all experts see, or (N, E, D); of groups (N, D) or (N, I, D), where I
        counts the runs of all groups. To (N, O, F), O = E where no group has several runs. In
        memory the rows of an expert are adjacent.

    Raises:
        ValueError: A size is below 1, the number of runs is not that of groups, or norm or
            activation are unknown.
    """

    def __init__(
        self,
        num_experts: int | Sequence[int],
        dim: int,
        hidden_dims: Sequence[int],
        *,
        norm: str | None = "batch",
        activation: str = "silu",
        runs: Sequence[int] | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = [1] * num_experts if isinstance(num_experts, int) else list(num_experts)
        sizes = (sum(counts), dim, *hidden_dims)
        if min(sizes) < 1 or not hidden_dims:
            raise ValueError(f"num_experts, dim and hidden_dims must be at least 1, got {sizes}")
        check_at_least(0, num_experts=min(counts))
        check_activation(activation)
        check_option("norm", norm or "none", ("batch", "none"))
        runs = [1] * len(counts) if runs is None else list(runs)
        if len(runs) != len(counts) or min(runs) < 1:
            raise ValueError(
                f"runs must be one number for each of {len(counts)} groups, got {runs}"
            )
        self.counts, self.runs = tuple(counts), tuple(runs)
        self.num_experts, self.dim, self.activation = sum(counts), dim, activation
        self.hidden_dims = tuple(hidden_dims)
        self._first = stretches_of(counts, runs)
        each = [r for c, r in zip(counts, runs, strict=True) for _ in range(c)]
        self._rest = stretches_of([1] * len(each), each)
        self.expert_of_output = tuple(e for e, r in enumerate(each) for _ in range(r))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(self.num_experts, *shape, device=device, dtype=dtype))

        layers = list(zip((dim, *hidden_dims[:-1]), hidden_dims, strict=True))
        self.weights = nn.ParameterList(parameter(outputs, inputs) for inputs, outputs in layers)
        self.biases = nn.ParameterList(parameter(outputs) for _, outputs in layers)
        where = {"group": group, "device": device, "dtype": dtype}
        self.norms = nn.ModuleList(
            ExpertNorm(self.num_experts, outputs, eps, momentum, **where)  # type: ignore[arg-type]
            for _, outputs in (layers if norm else ())
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as ``nn.Linear`` does; the affine map starts as the identity."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
        for norm in self.norms:
            cast(ExpertNorm, norm).reset_parameters()  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all experts (N, O, F).

        Raises:
            ValueError: The shape of ``x`` does not fit, or a single row is to be normalized by
                itself.
        """
        if x.shape[1:] not in ((self.dim,), (sum(self.runs), self.dim)):
            raise ValueError(
                f"x {tuple(x.shape)} must be (N, {self.dim}) or (N, {sum(self.runs)}, {self.dim})"
            )
        if x.ndim == 2 and max(self.runs) > 1:
            raise ValueError(f"x {tuple(x.shape)} must be (N, {sum(self.runs)}, {self.dim})")
        single = stretches_of([self.num_experts], [1]) if x.ndim == 2 else None
        x = x.unsqueeze(0) if x.ndim == 2 else x.transpose(0, 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            stretches = single or (self._rest if layer else self._first)
            single = None
            if self.norms:  # which makes the bias a part of the mean
                norm = cast(ExpertNorm, self.norms[layer])
                x = stacked_linear(x, weight, stretches)
                x = norm(x, bias, self.expert_of_output, self.activation)
            else:
                x = stacked_linear(x, weight, stretches, bias)
                x = activate(x, self.activation, gated=False)
        return x.transpose(0, 1)

    @torch.no_grad()
    def fold(self) -> Self:
        """Return experts for inference whose normalization is folded into their weights.

        They are those of this module in evaluation mode, without ``norms``.
        """
        first = self.weights[0]
        options = {"norm": None, "activation": self.activation, "dtype": first.dtype}
        folded = type(self)(
            self.counts,
            self.dim,
            self.hidden_dims,
            runs=self.runs,
            device="meta",  # nothing is drawn
            **options,  # type: ignore[arg-type]
        ).to_empty(device=first.device)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if self.norms:
                norm = cast(ExpertNorm, self.norms[layer])
                mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
                scale = norm.weight * (variance + norm.eps).rsqrt()
                weight, bias = scale.unsqueeze(-1) * weight, norm.bias + scale * (bias - mean)
            folded.weights[layer].copy_(weight)
            folded.biases[layer].copy_(bias)
        return folded.eval()

    def experts_of(self, outputs: Tensor) -> Tensor:
        """Return the expert of each output (N, O), int64."""
        experts = torch.tensor(self.expert_of_output, device=outputs.device)
        return experts.expand(outputs.shape[:-1])

    def extra_repr(self) -> str:
        """Show the sizes in ``print(experts)``."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dims={self.hidden_dims},"
            f" activation={self.activation}"
        )
