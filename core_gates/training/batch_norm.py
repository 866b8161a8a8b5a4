"""Batch normalization: statistics of all ranks, and statistics measured again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from core_gates.collectives import Group, all_reduce, num_ranks
from core_gates.numerics import accumulation_dtype, widest_float
from core_gates.routing.repeated import in_backward, unobserved


class SyncBatchNorm(_BatchNorm):
    """Normalize every channel by the mean and variance of all ranks (Ioffe and Szegedy, 2015).

    It does what ``torch.nn.SyncBatchNorm`` does, and more: it runs on any backend, gloo on the CPU
    included; ranks may have batches of different sizes, also empty ones; and it can be
    differentiated twice. Count, sum and square sum of a rank travel together, in float64; an
    all-reduce takes part in the backward pass. On a single rank it is ordinary batch normalization.

    In the second forward pass of activation checkpointing the running statistics stay as they are.

    Args:
        num_features: Channels C.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics; None averages all batches.
        affine: Whether there are a weight and a bias.
        track_running_stats: Whether evaluation uses running statistics rather than the batch's.
        num_experts: Number E of stacked experts, each with its own channels; weight, bias and
            statistics (E C,) hold those of one expert after those of the other.
        group: Process group; all ranks if None.
        device: Device of parameters and statistics.
        dtype: Floating dtype of the parameters and statistics.

    Shape:
        ``x`` (N, C, ...), or (N, E, C, ...) for stacked experts, to the same.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        num_experts: int | None = None,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            num_features * (num_experts or 1),
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
        )
        self.num_experts = num_experts
        self.group = group

    @classmethod
    def convert(cls, module: nn.Module, group: Group = None) -> nn.Module:
        """Return the module with every batch normalization in it synchronized.

        Parameters and buffers are taken over, not copied.

        Args:
            module: Any module; ``BatchNorm1d``, ``2d``, ``3d`` and ``SyncBatchNorm`` are replaced.
            group: Process group; all ranks if None.
        """
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            norm = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                group=group,
                device="meta",
            )
            norm._parameters.update(module._parameters)
            norm._buffers.update(module._buffers)
            return norm.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child, group))
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` normalized.

        Raises:
            ValueError: The channels of ``x`` are others, or a single value per channel is to be
                normalized by itself.
        """
        flat = x if self.num_experts is None else self._flatten(x)
        self._check_input_dim(flat)
        by_batch = self.training or self.running_mean is None
        update = self.training and self.running_mean is not None and not in_backward()
        if not by_batch or (num_ranks(self.group) == 1 and flat.numel()):
            return self._alone(flat, by_batch, update).view(x.shape)
        return self._together(flat, update).view(x.shape)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"x {tuple(input.shape)} must be (N, C, ...) with {self.num_features} channels"
            )

    def _flatten(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != self.num_experts:
            raise ValueError(
                f"x {tuple(x.shape)} must be (N, E, C, ...) with {self.num_experts} experts"
            )
        return x.flatten(1, 2)

    def _alone(self, x: Tensor, by_batch: bool, update: bool) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / float(self.num_batches_tracked)
        tracked = update or not by_batch
        return F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
        )

    def _together(self, x: Tensor, update: bool) -> Tensor:
        exact = x.to(accumulation_dtype(x))
        others = [0, *range(2, x.ndim)]
        shape = (1, -1, *(1,) * (x.ndim - 2))
        number = x.numel() // x.shape[1]
        # About the local mean first: a square sum about zero would lose digits to a large mean.
        mean = exact.sum(others) / max(number, 1)
        squares = (exact - mean.view(shape)).square().sum(others)
        count = mean.new_full((1,), number, dtype=widest_float(x.device))
        mean, variance, count = moments_of_ranks(mean, squares, count, self.group)
        if update:
            self._track(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt()
        out = (exact - mean.to(exact.dtype).view(shape)) * scale.to(exact.dtype).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics; a batch that is empty on all ranks moves nothing."""
        tracked = cast(Tensor, self.num_batches_tracked)
        tracked += (count[0] > 0).to(tracked.dtype)
        share = 1 / tracked.clamp(min=1).to(count) if self.momentum is None else self.momentum
        share = share * (count > 0).to(count)
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running += (share * (new - running)).to(running.dtype)


def moments_of_ranks(
    mean: Tensor, squares: Tensor, count: Tensor, group: Group = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of the values of all ranks, and their number.

    Count, sum and square sum of a rank travel together, in float64; the all-reduce takes part in
    the backward pass. A rank may have no value.

    Args:
        mean: Mean of this rank's values.
        squares: Sum of their squared deviations from that, of the same shape.
        count: Their number, of a shape that broadcasts to it.
        group: Process group; all ranks if None.
    """
    widest = widest_float(mean.device)
    mean, squares, count = mean.to(widest), squares.to(widest), count.to(widest)
    parts = count, count * mean, squares + count * mean.square()
    local = torch.cat([part.flatten() for part in parts])
    total = all_reduce(local, group) if num_ranks(group) > 1 else local
    totals = torch.split(total, [part.numel() for part in parts])
    count, sums, squares = (t.view(p.shape) for t, p in zip(totals, parts, strict=True))
    count = count.detach()
    mean = sums / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0), count


Batch = TypeVar("Batch")


def _call(model: nn.Module, batch: Any) -> object:
    return model(batch)


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    run: Callable[[nn.Module, Batch], object] = _call,
) -> int:
    """Measure the running statistics of batch normalization again, with gates as in evaluation.

    A gate that draws noise once a batch (hard concrete) spreads what follows it: the running
    variances of training are too large for evaluation, where the gate is deterministic. Here all
    modules evaluate and only the normalizations update. Each of their statistics becomes the mean
    over the batches (Izmailov et al., 2018, for averaged weights), which may take any order; the
    same batches give the same bits. Nothing else changes: no parameter, mode or random number, and
    nothing at all if a batch fails.

    Args:
        model: The trained model; distributed models take part with all ranks.
        batches: Training batches as training normalizes them, of one size and in number enough for
            the statistics; augmented as in training.
        run: How to run the model on a batch; by default ``model(batch)``.

    Returns:
        Number of normalizations measured; those without running statistics do not count.

    Raises:
        ValueError: There are statistics to measure, but no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    empty = True
    with _measuring(model, norms), unobserved():
        for batch in batches:
            run(model, batch)
            empty = False
        if empty:
            raise ValueError("measuring statistics needs at least one batch, got none")
    return len(norms)


@contextmanager
def _measuring(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let the normalizations alone train, on averages from zero; undo that if the block fails."""
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    places = [b for norm in norms for b in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in places]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.training = True
        yield
    except BaseException:
        for buffer, value in zip(places, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
