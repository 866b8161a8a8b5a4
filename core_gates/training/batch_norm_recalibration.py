"""Running statistics of batch normalization, measured again as evaluation sees them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from core_gates.routing.repeated import unobserved

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
