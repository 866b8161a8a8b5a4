"""Experts that are spawned from one, by hand or when the stages of their gate ask for it."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core_gates.collectives import gathered, sharded_like
from core_gates.errors import check_at_least, check_fraction, check_option
from core_gates.gates.dense_to_sparse import DenseToSparseGate
from core_gates.moe.expert_parallel import ExpertParallel
from core_gates.moe.layer import MoELayer
from core_gates.routing.collect import update_gates


def advance_gates(
    model: nn.Module, optimizer: Optimizer | None = None, *, mask_prob: float = 0.1, seed: int = 0
) -> None:
    """Advance all gates by one optimizer step and spawn the experts whose gate leaves ``shared``.

    Call it once a step, after the optimizer, in place of
    `core_gates.routing.collect.update_gates`. When to spawn follows from the step that the
    gate keeps in a buffer, so that a resumed training run neither forgets nor repeats it, and the
    copies from ``seed`` alone, so that all ranks get the same ones.

    Args:
        model: Model with every `core_gates.moe.layer.MoELayer` whose experts are spawned.
        optimizer: Optimizer of the experts; every expert gets the moments of the first.
        mask_prob: Probability that a weight of a copy becomes zero, as in `spawn_experts`.
        seed: Seed of the masks; every layer draws others.

    Raises:
        ValueError: A gate was not called since the last step (see ``update_gates``), the
            probability is out of range, or experts to be spawned are spread over ranks. No gate is
            advanced then.
    """
    check_fraction(mask_prob=mask_prob)
    staged = {}  # experts -> number of the layer, and its gate
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, MoELayer)):
        for gate in layer.gate.modules():
            if isinstance(gate, DenseToSparseGate) and gate.stages.shared_steps > 0:
                staged[layer.experts] = number, gate
    for experts in staged:
        if isinstance(experts, ExpertParallel) and experts.num_ranks > 1:
            raise ValueError(
                f"experts spread over {experts.num_ranks} ranks cannot be spawned from the first:"
                " train the phase 'shared' with StackedExperts and spread them afterwards"
            )
    update_gates(model)
    for experts, (number, gate) in staged.items():
        if gate.stages.spawns_at(gate.known_step):
            device = next(experts.parameters()).device
            generator = torch.Generator(device).manual_seed(seed + number)
            spawn_experts(experts, mask_prob=mask_prob, optimizer=optimizer, generator=generator)


OptimizerState = Literal["copy", "reset"]


@torch.no_grad()
def spawn_experts(
    experts: nn.Module,
    *,
    source: int = 0,
    mask_prob: float = 0.1,
    rescale: bool = False,
    noise_std: float = 0.0,
    reinit_fraction: float = 0.0,
    keep_source: bool = False,
    optimizer: Optimizer | None = None,
    optimizer_state: OptimizerState = "copy",
    generator: torch.Generator | None = None,
) -> None:
    """Replace all experts by differently perturbed copies of one, in place (Nie et al., 2021).

    Each weight of each copy is masked to zero with probability ``mask_prob``, independently; the
    variants redraw a fraction of the weights or add noise. Biases are copied as they are.

    Under FSDP every rank must call this; all get the copies of rank 0.

    Args:
        experts: Module whose every parameter stacks the experts along its first dimension: weights
            (E, …, …) and biases (E, …).
        source: The expert that is copied.
        mask_prob: Probability that a weight becomes zero (recommended: 0.1).
        rescale: Whether the weights left are divided by ``1 - mask_prob``.
        noise_std: Standard deviation of Gaussian noise on the weights, as a fraction of the
            standard deviation of the source's weights.
        reinit_fraction: Probability that a weight is drawn again, from a normal distribution with
            the standard deviation of the source's weights.
        keep_source: Whether the source itself stays as it was.
        optimizer: Optimizer of the experts, if it has run already.
        optimizer_state: ``copy`` gives every expert the moments of the source, ``reset`` forgets
            the state of all parameters of the experts.
        generator: Source of the random numbers; the global one if None. Ranks that hold copies of
            the same experts must give it the same seed.

    Raises:
        ValueError: A number is out of range, the parameters do not stack one number of experts, or
            the optimizer holds a state that cannot be copied.
    """
    experts.state_dict()  # makes FSDP shard again what a forward pass has left gathered
    parameters = dict(experts.named_parameters())
    num_experts = _num_experts(parameters)
    if not 0 <= source < num_experts:
        raise ValueError(f"source must lie between 0 and {num_experts - 1}, got {source}")
    _check(mask_prob, noise_std, reinit_fraction, optimizer_state)
    if optimizer is not None:  # first, because it may refuse
        _spawn_state(optimizer, parameters, source, optimizer_state)
    for parameter in parameters.values():
        copies = gathered(parameter)
        original = copies[source].clone()
        copies.copy_(original.expand_as(copies))
        if copies.ndim > 2:
            copies.mul_(_mask(copies, mask_prob, rescale, generator))
            _redraw(copies, original, reinit_fraction, noise_std, generator)
        if keep_source:
            copies[source] = original
        if copies is not parameter:
            parameter.copy_(sharded_like(copies, parameter))


def _mask(like: Tensor, prob: float, rescale: bool, generator: torch.Generator | None) -> Tensor:
    kept = _uniform(like, generator) >= prob
    return kept / (1 - prob) if rescale else kept


def _redraw(
    copies: Tensor,
    original: Tensor,
    fraction: float,
    noise_std: float,
    generator: torch.Generator | None,
) -> None:
    spread = original.std(correction=0)
    if fraction > 0:
        drawn = _uniform(copies, generator) < fraction
        copies.copy_(torch.where(drawn, spread * _normal(copies, generator), copies))
    if noise_std > 0:
        copies.add_(noise_std * spread * _normal(copies, generator))


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _spawn_state(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter], source: int, choice: OptimizerState
) -> None:
    if choice == "reset":
        for parameter in parameters.values():
            optimizer.state.pop(parameter, None)
        return
    moments = [
        (f"{key!r} of {name}", value, parameter.shape)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.numel() > 1
    ]
    for name, value, shape in moments:
        if value.shape != shape:
            raise ValueError(
                f"the optimizer state {name} has shape {tuple(value.shape)}, not that of the"
                f" parameter {tuple(shape)}, and cannot be copied: choose optimizer_state='reset'"
            )
    for _, value, _ in moments:
        original = gathered(value)[source].clone()
        value.copy_(sharded_like(original.expand(value.shape), value))


def _num_experts(parameters: dict[str, nn.Parameter]) -> int:
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "every parameter must stack the experts along its first dimension, got"
            f" {shapes or 'a module without parameters'}"
        )
    return next(iter(sizes))[0]


def _check(mask_prob: float, noise_std: float, reinit_fraction: float, state: str) -> None:
    check_fraction(mask_prob=mask_prob)
    if not 0 <= reinit_fraction <= 1:
        raise ValueError(f"reinit_fraction must lie between 0 and 1, got {reinit_fraction}")
    check_at_least(0, noise_std=noise_std)
    check_option("optimizer_state", state, get_args(OptimizerState))
