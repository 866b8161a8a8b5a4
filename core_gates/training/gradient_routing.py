"""Gradient routing: gates learn in their own pass, with their own optimizer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from core_gates.errors import check_option, check_positive
from core_gates.routing.repeated import unobserved

Mode = Literal["dual", "reference", "joint", "every_k", "off"]
Loss = Callable[[nn.Module], Tensor]


class RoutedStep(NamedTuple):
    """What one step of `GradientRouting` measured; None for what it did not compute.

    Attributes:
        loss: Mean loss of the main pass over the micro-batches, detached.
        gate_loss: The same of the gate pass.
        grad_norm: Gradient norm of the weights before clipping, if it is clipped.
        gate_grad_norm: The same of the gates.
    """

    loss: Tensor
    gate_loss: Tensor | None = None
    grad_norm: Tensor | None = None
    gate_grad_norm: Tensor | None = None


class GradientRouting:
    """Update gates and weights from two passes over the same batch (arXiv 2407.04400).

    The canonical rule ``dual``: (1) the gradient of the gate loss with respect to the gates alone,
    clipped, moves the gates; (2) a fresh forward pass with the new gates gives the gradient with
    respect to the weights alone, which moves the weights. Neither group ever sees a gradient of
    the other. The gate pass skips the gradients of the weights, leaves every buffer as it was
    (statistics of batch normalization) and draws the random numbers that the main pass then draws
    again (dropout masks): without its step the training would be that of a plain loop, bit for bit.

    Modes:

    - ``dual``: as above;
    - ``every_k``: the gate pass on steps 0, k, 2k, …, the main pass on all;
    - ``joint``: one pass; each group is clipped and moved from the gradient of the main loss;
    - ``off``: the gates stay as they are;
    - ``reference``: the published rule, for reproduction: gradients are zeroed once, both passes
      add to all of them and clip over all parameters, so that the weights move along the sum.
      Buffers and random numbers are treated as in ``dual``.

    Either group may be frozen, or both: its pass only measures the loss, or is left out. Under a
    `DistributedDataParallel` model the main pass uses its hooks, and the gate gradients,
    which they do not see, are averaged here. A gradient scaler is unscaled before clipping and
    updated once a step.

    Examples:
        >>> routing = GradientRouting(optimizer, gate_optimizer, clip=10.0, gate_clip=32.0)
        >>> for images, sizes in batches:
        ...     step = routing.step(model, lambda m: F.smooth_l1_loss(m(images), sizes))

    Args:
        optimizer: Optimizer of the weights.
        gate_optimizer: Optimizer of the gates; None in mode ``off``, for a model without gates.
        mode: One of the above.
        clip: Largest gradient norm of the weights, or None.
        gate_clip: Largest gradient norm of the gates, or None.
        every_k: Period k of mode ``every_k``.
        scaler: Gradient scaler for float16, or None.
        group: Ranks over which gate gradients are averaged; by default those of a distributed
            model. Give it where the hooks are there but the model is passed bare.
        backward: How to run a backward pass that fires the hooks of all parameters, such as
            ``LightningModule.manual_backward``; needed where ``group`` is. It gets the loss before
            scaling and scales it itself, if there is a scaler.

    Raises:
        ValueError: The mode is unknown, an argument is missing or out of range, or both optimizers
            hold the same parameter.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gate_optimizer: Optimizer | None,
        *,
        mode: Mode = "dual",
        clip: float | None = None,
        gate_clip: float | None = None,
        every_k: int = 1,
        scaler: GradScaler | None = None,
        group: dist.ProcessGroup | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> None:
        check_option("mode", mode, get_args(Mode))
        if gate_optimizer is None and mode != "off":
            raise ValueError(f"mode {mode!r} needs a gate_optimizer; without gates choose 'off'")
        check_positive(clip=clip, gate_clip=gate_clip, every_k=every_k)
        self.optimizer = optimizer
        self.gate_optimizer = gate_optimizer
        self.mode = mode
        self.clip = clip
        self.gate_clip = gate_clip
        self.every_k = every_k
        self.num_steps = 0
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._group = group
        self._backward = backward
        self._overflowed = False  # in this step, by the gates
        self._checked = False  # in this step, whether the scaler has looked at any gradient
        shared = {id(p) for p in self.weights} & {id(p) for p in self.gates}
        if shared:
            raise ValueError(
                f"{len(shared)} parameters are in both optimizers; give the gates to gate_optimizer"
                " alone"
            )

    @property
    def weights(self) -> list[Tensor]:
        """Parameters of the main optimizer that learn."""
        return _parameters(self.optimizer)

    @property
    def gates(self) -> list[Tensor]:
        """Parameters of the gate optimizer that learn."""
        return _parameters(self.gate_optimizer)

    def step(
        self,
        model: nn.Module,
        loss: Loss | Sequence[Loss],
        gate_loss: Loss | Sequence[Loss] | None = None,
    ) -> RoutedStep:
        """Take one optimizer step of both groups.

        Args:
            model: The model, distributed or not.
            loss: Function of the model that runs a forward pass on the batch and returns the scalar
                loss; or one such function for each micro-batch, whose mean is the loss. The model
                it is given is the bare one in the gate pass.
            gate_loss: The same for the gate pass; by default the loss. Modes ``joint`` and ``off``
                ignore it.

        Returns:
            Losses and gradient norms of this rank.

        Raises:
            ValueError: There is no micro-batch.
        """
        losses = [loss] if callable(loss) else list(loss)
        gate_losses = losses
        if gate_loss is not None:
            gate_losses = [gate_loss] if callable(gate_loss) else list(gate_loss)
        if not losses or not gate_losses:
            raise ValueError("a step needs at least one micro-batch, got none")
        for p in (*self.weights, *self.gates):
            p.grad = None
        self._overflowed = self._checked = False
        before = None if self._scaler is None else _state_of(self.gate_optimizer)
        if self.mode == "reference":
            step = self._reference_step(model, losses, gate_losses)
        elif self.mode == "joint":
            step = self._joint_step(model, losses)
        else:
            gate_value, gate_norm = None, None
            due = self.mode == "every_k" and self.num_steps % self.every_k == 0
            if self.mode == "dual" or due:
                gate_value, gate_norm = self._gate_pass(model, gate_losses)
            value = self._backward_pass(model, losses, self.weights)
            norm = self._move(self.optimizer, self.weights, self.clip)
            step = RoutedStep(value, gate_value, norm, gate_norm)
        for p in self.gates:
            p.grad = None  # hooks of a distributed model leave one
        if self._scaler is not None and self._checked:
            scale = self._scaler.get_scale()
            self._scaler.update()
            if before and self._scaler.get_scale() < scale:  # perhaps of the weights alone
                _restore(self.gate_optimizer, before)
        self.num_steps += 1
        return step

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps taken; the optimizers and the scaler save themselves."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the count of steps."""
        self.num_steps = state["num_steps"]

    def _gate_pass(
        self, model: nn.Module, losses: list[Loss]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Move the gates by their own gradient; touch neither weights, buffers nor generators."""
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        gates = self.gates
        if not gates:
            return None, None
        sums: list[Tensor | None] = [None] * len(gates)
        values = []
        with self._replayed(bare), _frozen(self.weights):
            for loss in losses:
                value = loss(bare) / len(losses)
                if value.requires_grad:  # else no gate took part in it
                    parts = torch.autograd.grad(self._scaled(value), gates, allow_unused=True)
                    sums = [_add(*pair) for pair in zip(sums, parts, strict=True)]
                values.append(value.detach())
        group = self._group
        if group is None and isinstance(model, DistributedDataParallel):
            group = model.process_group
        if group is not None:
            sums = _average(sums, gates, group)
        if all(grad is None for grad in sums):
            raise ValueError("the gate loss depends on no parameter of the gate_optimizer")
        for gate, grad in zip(gates, sums, strict=True):
            gate.grad = grad
        norm = self._move(self.gate_optimizer, gates, self.gate_clip)
        for gate in gates:
            gate.grad = None
        torch.clear_autocast_cache()  # it may hold the old gates in half precision
        return torch.stack(values).sum(), norm

    def _joint_step(self, model: nn.Module, losses: list[Loss]) -> RoutedStep:
        value = self._backward_pass(model, losses, [*self.weights, *self.gates])
        gate_norm = self._move(self.gate_optimizer, self.gates, self.gate_clip)
        norm = self._move(self.optimizer, self.weights, self.clip)
        return RoutedStep(value, None, norm, gate_norm)

    def _reference_step(
        self, model: nn.Module, losses: list[Loss], gate_losses: list[Loss]
    ) -> RoutedStep:
        weights, gates = self.weights, self.gates
        with self._replayed(model):
            gate_value = self._backward_pass(model, gate_losses, [*weights, *gates])
        gate_norm = self._move(self.gate_optimizer, gates, self.gate_clip, others=weights)
        torch.clear_autocast_cache()
        if self._scaler is not None:
            _scale([*weights, *gates], self._scaler.get_scale())  # to add to scaled gradients
        value = self._backward_pass(model, losses, [*weights, *gates])
        norm = self._move(self.optimizer, weights, self.clip, others=gates)
        return RoutedStep(value, gate_value, norm, gate_norm)

    def _backward_pass(
        self, model: nn.Module, losses: list[Loss], learners: list[Tensor]
    ) -> Tensor:
        """Add the gradient of the mean loss to that of the learners; return the mean loss."""
        values = []
        for i, loss in enumerate(losses):
            distributed = isinstance(model, DistributedDataParallel)
            local = distributed and i < len(losses) - 1
            with model.no_sync() if local else nullcontext():  # type: ignore[operator]
                value = loss(model) / len(losses)
                hooked = distributed or self._backward is not None  # hooks wait for the gates, too
                if learners or (hooked and value.requires_grad):
                    self._run_backward(value, None if distributed else learners)
            values.append(value.detach())
        return torch.stack(values).sum()

    def _run_backward(self, value: Tensor, learners: list[Tensor] | None) -> None:
        """Run the backward pass, for all parameters if no learners are named."""
        if self._backward is not None:
            self._backward(value)
        else:
            self._scaled(value).backward(inputs=learners)  # type: ignore[no-untyped-call]

    def _move(
        self,
        optimizer: Optimizer | None,
        parameters: list[Tensor],
        clip: float | None,
        others: Sequence[Tensor] = (),
    ) -> Tensor | None:
        """Unscale, clip over parameters and others, and step; return the norm before clipping."""
        assert optimizer is not None
        if self._scaler is not None:
            if parameters:
                self._scaler.unscale_(optimizer)
                self._checked = True
            if others:
                _scale(others, 1 / self._scaler.get_scale())
            if optimizer is self.gate_optimizer:
                self._overflowed = not _finite([*parameters, *others])
        norm = None if clip is None else clip_grad_norm_([*parameters, *others], clip)
        if not parameters:
            return None
        if self._scaler is None:
            optimizer.step()
        elif not self._overflowed:
            self._scaler.step(optimizer)
        return norm

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    @contextmanager
    def _replayed(self, model: nn.Module) -> Iterator[None]:
        """Undo what the block does to buffers and random generators; gates do not count it."""
        devices = {p.device for p in (*self.weights, *self.gates) if p.is_cuda}
        places = [
            (buffers, name, buffer, buffer.clone())
            for buffers in (module._buffers for module in model.modules())
            for name, buffer in buffers.items()
            if buffer is not None
        ]
        try:
            with torch.random.fork_rng(devices=sorted(devices, key=str)), unobserved():
                yield
        finally:
            with torch.no_grad():
                for buffers, name, buffer, value in places:
                    buffers[name] = buffer.copy_(value)


@contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    """Record nothing for the gradients of these parameters, which saves time and memory."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _parameters(optimizer: Optimizer | None) -> list[Tensor]:
    groups = [] if optimizer is None else optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.requires_grad]


def _finite(parameters: Sequence[Tensor]) -> bool:
    grads = [p.grad for p in parameters if p.grad is not None]
    return all(bool(grad.isfinite().all()) for grad in grads)


def _state_of(optimizer: Optimizer | None) -> list[tuple[Tensor, Tensor, dict[str, Any] | None]]:
    """Return copies of the parameters of an optimizer and of what it knows about each."""
    return [
        (p, p.detach().clone(), deepcopy(optimizer.state[p]) if p in optimizer.state else None)
        for p in _parameters(optimizer)
        if optimizer is not None
    ]


def _restore(
    optimizer: Optimizer | None, states: list[tuple[Tensor, Tensor, dict[str, Any] | None]]
) -> None:
    assert optimizer is not None
    for p, value, state in states:
        p.data.copy_(value)
        if state is None:
            optimizer.state.pop(p, None)
        else:
            optimizer.state[p] = state


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total + part


def _scale(parameters: Sequence[Tensor], factor: float) -> None:
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor)


def _average(
    grads: list[Tensor | None], gates: list[Tensor], group: dist.ProcessGroup
) -> list[Tensor | None]:
    """Return the means over ranks, reduced as one vector; None where no rank used a gate."""
    present = torch.tensor([grad is not None for grad in grads]).to(gates[0])
    flat = [
        (torch.zeros_like(gate) if grad is None else grad).flatten()
        for gate, grad in zip(gates, grads, strict=True)
    ]
    vector = torch.cat([*flat, present])
    dist.all_reduce(vector, group=group)
    vector /= dist.get_world_size(group)
    *means, used = vector.split_with_sizes([*(gate.numel() for gate in gates), len(gates)])
    return [
        mean.view_as(gate).to(gate.dtype) if is_used else None
        for mean, gate, is_used in zip(means, gates, used.tolist(), strict=True)
    ]
