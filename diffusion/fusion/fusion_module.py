"""Training of the gates of a fusion, the model and its adapters frozen (AutoLoRA, 2025)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR

from core_gates.errors import GatesError, check_option
from diffusion.fusion.fusion_tasks import FusionBatch
from diffusion.lora_file import LoraBundle
from diffusion.models.flow_matching import flow_matching_losses

Parallel = Literal["ddp", "fsdp2"]


def strategy_of(name: Parallel, processes: int, backend: str | None = None) -> Strategy:
    """Return the strategy of a Trainer for `diffusion.fusion.fusion_module.FusionModule`.

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
    for blocks in (child for child in model.children() if isinstance(child, nn.ModuleList)):
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


Schedule = Literal["linear", "cosine"]
Common = Callable[[Mapping[str, LoraBundle]], LoraBundle]

COMMON = "common"  # name of the adapter that is made of the others

WEIGHTS = ("weight_base", "weight_lora", "weight_cross")
"""What a gate sees of its input is multiplied by these, which start at 0 as a rule."""


class FusionModule(L.LightningModule):
    """Trains the parameters of a fusion by the loss of flow matching.

    The loss of a batch is the mean squared error of the velocity for the right captions, and with
    ``contrast`` also ``max(0, margin - error)`` of each latent for a wrong one, with independent
    times and noise. A checkpoint holds the parameters of the fusion alone. While it trains the
    fusion is attached; its model is frozen from the start.

    Under ``ModelParallelStrategy`` the blocks of the model are sharded (FSDP2), while each process
    has all gates.

    Args:
        fusion: A ``GatedFusion``, or any with parameters that can be attached, detached
            and given other adapters, see `diffusion.fusion.protocol.Fusion`. Give it room
            for as many adapters as a task has.
        library: Name -> adapter, all that tasks name.
        steps: Steps of the training, over which the learning rate falls to 0.
        learning_rate: Of AdamW, at the start.
        weight_rate: That of `WEIGHTS`, where it is another.
        roles: Name -> role of an adapter of the library, told in the steps that know it.
        schedule: How the learning rate falls: ``linear``, or ``cosine`` as published.
        weight_decay: Of AdamW.
        contrast: Whether wrong captions are to be off by ``margin``.
        margin: The smallest error that is wanted for them; it depends on the scale of latents.
        relative: Whether the logarithm of the error is made small, so that tasks count alike.
        common: Makes one more adapter of those of a task, such as
            `diffusion.fusion.gated_fusion.global_lora` with its rank.
        checkpointing: Whether activations are computed again in the backward pass, which saves
            memory.

    Raises:
        GatesError: The fusion has nothing to train.
    """

    def __init__(
        self,
        fusion: nn.Module,
        library: Mapping[str, LoraBundle],
        *,
        steps: int,
        learning_rate: float = 2e-2,
        weight_rate: float | None = None,
        roles: Mapping[str, str] | None = None,
        schedule: Schedule = "linear",
        weight_decay: float = 0.0,
        contrast: bool = False,
        margin: float = 0.5,
        relative: bool = False,
        common: Common | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_option("schedule", schedule, get_args(Schedule))
        if next(fusion.parameters(), None) is None:
            raise GatesError(
                f"{type(fusion).__name__} has no parameters: there is nothing to train"
            )
        self.fusion: Any = fusion
        self.fusion.model.requires_grad_(False)
        self._library = {  # none reads its file at every step
            name: dataclasses.replace(bundle, modules=dict(bundle.modules))
            for name, bundle in library.items()
        }
        self._sets: dict[tuple[str, ...], dict[str, LoraBundle]] = {}
        self.steps, self.learning_rate, self.schedule = steps, learning_rate, schedule
        self.weight_rate, self.roles = weight_rate, dict(roles or {})
        self.weight_decay, self.contrast, self.margin = weight_decay, contrast, margin
        self.relative, self.common, self.checkpointing = relative, common, checkpointing

    def adapters_of(self, names: tuple[str, ...]) -> dict[str, LoraBundle]:
        """Return the adapters of a task, with what they have in common where that is wanted.

        Raises:
            GatesError: The library has none of a name.
        """
        if names not in self._sets:
            if unknown := [name for name in names if name not in self._library]:
                raise GatesError(f"a task names the adapter {unknown[0]!r}, which is not given")
            loaded = {name: self._library[name] for name in names}
            if self.common is not None:
                loaded[COMMON] = self.common(loaded)
            self._sets[names] = loaded
        return self._sets[names]

    def configure_model(self) -> None:
        """Shard the frozen model where a strategy has a mesh of devices."""
        if self._device_mesh is not None:
            shard(self.fusion.model, self._device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that detaches the fusion after an error."""
        return [_DetachesAfterErrors()]

    def on_fit_start(self) -> None:
        """Attach the fusion, on the device of the gates."""
        model = self.fusion.model
        if self._device_mesh is None:
            model.to(self.device)
        if self.checkpointing:
            model.enable_gradient_checkpointing()
        self.fusion.attach().train()  # the layers of a model in evaluation took the gates along

    def on_fit_end(self) -> None:
        """Detach the fusion."""
        self.release()

    def release(self) -> None:
        """Leave the model as it was."""
        self.fusion.detach()
        if self.checkpointing:
            self.fusion.model.disable_gradient_checkpointing()

    def training_step(self, batch: FusionBatch, _: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            GatesError: ``contrast`` is wanted, but the task has no wrong captions.
        """
        self.fusion.set_adapters(self.adapters_of(tuple(batch.adapters)))
        roles = {n: self.roles[n] for n in batch.adapters if n in self.roles and batch.roles_known}
        self.fusion.describe(roles=roles, scores=batch.scores)
        if batch.found is not None:
            self.fusion.suit(batch.found)
        model = self.fusion.model
        loss = flow_matching_losses(model, batch.at, batch.text).mean()
        self.log("train/flow_matching", loss)
        if self.relative:
            loss = loss.log()
        if self.contrast:
            if batch.wrong_at is None or batch.wrong_text is None:
                raise GatesError(
                    f"task {' + '.join(batch.adapters)} has no wrong captions, which contrast needs"
                )
            wrong = flow_matching_losses(model, batch.wrong_at, batch.wrong_text)
            hinge = (self.margin - wrong).relu().mean()
            self.log("train/contrast", hinge)
            loss = loss + hinge
        self.log("train/loss", loss)
        return loss

    def on_after_backward(self) -> None:
        """Average the gradients of the gates where no strategy does it."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            average_gradients(self.fusion)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW and a learning rate that falls to 0."""
        groups: list[dict[str, Any]] = [{"params": [*self.fusion.parameters()]}]
        if self.weight_rate is not None:
            named = [(n.rpartition(".")[2] in WEIGHTS, p) for n, p in self.named_parameters()]
            groups = [
                {"params": [p for apart, p in named if apart == group]} for group in (False, True)
            ]
            groups[1]["lr"] = self.weight_rate
        optimizer = torch.optim.AdamW(groups, self.learning_rate, weight_decay=self.weight_decay)

        def factor(step: int) -> float:
            done = min(1.0, step / self.steps)
            return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }


class _DetachesAfterErrors(Callback):
    """Leave the model as it was when a training breaks off."""

    def on_exception(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Detach."""
        assert isinstance(pl_module, FusionModule)
        pl_module.release()
