"""Training of gates on several processes: the frozen model whole on each, or sharded over all."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import distributed, nn

from core_gates.errors import GatesError, check_option

Parallel = Literal["ddp", "fsdp2"]


def strategy_of(name: Parallel, processes: int, backend: str | None = None) -> Strategy:
    """Return the strategy of a Trainer for :class:`diffusion.fusion.module.FusionModule`.

    Args:
        name: ``ddp``: each process holds the model; ``fsdp2``: each holds a part of every block,
            which are put together one at a time. Gates are replicated in both.
        processes: On all machines together.
        backend: Of ``torch.distributed``, by default that of the device: ``nccl`` or ``gloo``.
    """
    check_option("strategy", name, get_args(Parallel), GatesError)
    if name == "ddp":
        return DDPStrategy(process_group_backend=backend)
    return ModelParallelStrategy(
        data_parallel_size=processes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend=backend,
    )


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard each block of a transformer, then what is left, over a mesh of devices (FSDP2).

    Args:
        model: A transformer, without adapters.
        mesh: One-dimensional.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return
    for blocks in (one for one in model.children() if isinstance(one, nn.ModuleList)):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a module over all processes, in one message."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if not grads or not distributed.is_initialized():
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
