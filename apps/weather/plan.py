"""``gates weather plan``: what training and use cost on many GPUs, before anything is built."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError, check_option
from harness.command.verbs import Place
from harness.planning import Device, check_counts, training_sections
from harness.runs.terminal import print_plan, write_plan
from harness.step_cost import StepCost, cost_of_step
from weather.models.adas.network import Adas
from weather.models.adas.presets import PRESETS as ADAS_SIZES
from weather.models.adas.presets import adas_preset
from weather.models.fengwu.network import PRESETS as FENGWU_SIZES
from weather.models.fengwu.network import FengWu, fengwu_preset
from weather.training.optimization import gaussian_loss

Precision = Literal["bf16", "fp32"]
Network = Literal["adas", "fengwu"]
NETWORKS: tuple[Network, ...] = ("adas", "fengwu")
SIZES = {"adas": ADAS_SIZES, "fengwu": FENGWU_SIZES}
DEVICE = Device(flops=5e14)  # of matmuls in TF32


def plan(
    place: Place,
    size: str = "official",
    networks: tuple[str, ...] = NETWORKS,
    gpus: int = 8,
    batch_size: int = 1,
    precision: Precision = "fp32",
    sharded: bool = False,
    device: Device = DEVICE,
) -> None:
    """Estimate weights, arithmetic, memory, exchange and price of the networks on many GPUs.

    The networks are built on the meta device: shapes without values. A whole training step is run
    there; its arithmetic is counted, and the memory of every tensor is followed from its creation
    to its end. Rates and prices follow from the figures of the device, which are assumptions.

    Args:
        place: Filled in by the command line.
        size: ``official``, the published 0.25 degrees, ``small``, ``tiny`` or another preset of
            the networks.
        networks: ``adas``, the assimilation, ``fengwu``, the forecast, or both.
        gpus: Number of GPUs.
        batch_size: Samples of a GPU in a step.
        precision: Type of the activations; weights and optimizers are in fp32.
        sharded: Spread weights, gradients and moments over the GPUs (FSDP2) instead of keeping
            them on each (DDP).
        device: What is assumed of a GPU.
    """
    check_counts(gpus=gpus, batch_size=batch_size)
    sections: dict[str, Any] = {}
    for network in networks:
        check_option("--networks", network, NETWORKS, GatesError)
        check_option(f"--size of {network}", size, SIZES[network], GatesError)
        cost = network_cost(network, size, batch_size=batch_size, precision=precision)
        sections |= training_sections(
            network, *cost, device, gpus=gpus, batch_size=batch_size, sharded=sharded
        )
    print(f"planned: {size}, {batch_size} samples a GPU, {precision}")
    print_plan(sections)
    print(write_plan(place.run_folder.path / "plan.json", sections))


def network_cost(
    network: str,
    size: str,
    *,
    batch_size: int = 1,
    precision: Precision = "fp32",
) -> tuple[nn.Module, StepCost]:
    """Build a network and count a training step of it.

    Args:
        network: ``adas`` or ``fengwu``.
        size: One of its presets.
        batch_size: Samples of the step.
        precision: Type of activations and weights.
    """
    with torch.device("meta"):
        module = adas_preset(size) if network == "adas" else fengwu_preset(size)
        states = torch.randn(batch_size, module.num_channels, *module.grid_shape)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    module, states = module.to(kind).train(), states.to(kind)
    return module, cost_of_step(step_of(module, states), module.parameters(), [states])


def step_of(network: Adas | FengWu, states: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs the forward pass on made-up states and returns a loss."""
    if isinstance(network, Adas):
        return lambda: network(states, states, states).abs().mean()

    def loss() -> Tensor:
        change = network(states, states)
        return gaussian_loss(change.mean, change.log_variance, states)

    return loss
