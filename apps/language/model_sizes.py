"""``gates language plan``: what mixtures of published sizes cost, before anything is built."""

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import core_gates.ops.flops  # noqa: F401  # experts count, on the meta device too
from core_gates import MoELayer, StackedExperts, TopKGate
from core_gates.errors import GatesError, check_option
from harness.command.verbs import Place
from harness.planning import Device, check_counts, count_weights, training_sections
from harness.runs.terminal import Line, print_plan, working, write_plan
from harness.step_cost import StepCost, cost_of_step
from language.decoder import Decoder

Precision = Literal["bf16", "fp32"]


class Size(NamedTuple):
    """A network of EvoMoE (Nie et al., 2021), as its reference names it.

    Attributes:
        num_layers: Blocks.
        dim: Features of a token.
        hidden_dim: Features between the two matrices of a block.
        num_heads: Heads of the attention.
    """

    num_layers: int
    dim: int
    hidden_dim: int
    num_heads: int


SIZES = {
    "gpt_moe_small": Size(12, 768, 3072, 12),
    "gpt_moe_medium": Size(24, 1024, 4096, 16),
    "gpt_moe_xl": Size(48, 1600, 6400, 25),
}
VOCABULARY, CONTEXT = 50257, 1024  # of GPT-2
EVERY, K = 2, 1  # every second block has experts, and a token uses one
DEVICE = Device()


def plan(
    place: Place,
    size: str = "gpt_moe_small",
    experts: int = 16,
    gpus: int = 8,
    batch_size: int = 8,
    precision: Precision = "bf16",
    sharded: bool = False,
    device: Device = DEVICE,
) -> None:
    """Estimate weights, arithmetic, memory, exchange and price of a mixture on many GPUs.

    The decoder is built on the meta device: shapes without values. A whole training step is run
    there; its arithmetic is counted, and the memory of every tensor is followed from its creation
    to its end. Rates and prices follow from the figures of the device, which are assumptions.
    Blocks have three matrices of two thirds of the width in place of two of the reference.

    Args:
        place: Filled in by the command line.
        size: ``gpt_moe_small``, ``gpt_moe_medium`` or ``gpt_moe_xl`` of EvoMoE.
        experts: Number of experts in every second block.
        gpus: Number of GPUs.
        batch_size: Sequences of 1,024 tokens of a GPU in a step.
        precision: Type of the activations; weights and optimizers are in fp32.
        sharded: Spread weights, gradients and moments over the GPUs (FSDP2) instead of keeping
            them on each (DDP).
        device: What is assumed of a GPU.
    """
    check_option("--size", size, SIZES, GatesError)
    check_counts(gpus=gpus, batch_size=batch_size, experts=experts)
    print(f"planned: {size}, {batch_size} sequences a GPU, {precision}")
    with working("counting a training step"):
        model, cost = decoder_cost(size, experts, batch_size=batch_size, precision=precision)
    sections = training_sections(
        size, model, cost, device, gpus=gpus, batch_size=batch_size, sharded=sharded,
        unit="token", units=CONTEXT, parts=[model.model["embed_tokens"], *model.blocks],
    )  # fmt: skip
    used = Line("used by a token", used_weights(model), note=f"{K} of {experts} experts")
    first = next(iter(sections))
    sections = {**sections, first: [*sections[first], used]}
    print_plan(sections)
    print(write_plan(place.run_folder.path / f"plan-{size}.json", sections))


def decoder_cost(
    size: str, experts: int, *, batch_size: int = 1, precision: Precision = "fp32"
) -> tuple[Decoder, StepCost]:
    """Build a decoder without values and count a training step of it.

    Args:
        size: One of the sizes.
        experts: Number of experts in every second block.
        batch_size: Sequences of the step.
        precision: Type of activations and weights.
    """
    layers, dim, hidden, heads = SIZES[size]
    width = 2 * hidden // 3
    with torch.device("meta"):
        model = Decoder(
            VOCABULARY, dim, layers, heads, hidden_dim=width, context=CONTEXT, tie_embeddings=True,
            gate=partial(TopKGate, num_experts=experts, k=K),
            experts=partial(StackedExperts, hidden_dim=width, gated=True),
            moe_every=EVERY,
        )  # fmt: skip
        tokens = torch.zeros(batch_size, CONTEXT + 1, dtype=torch.int64)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()

    def loss() -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, cost_of_step(loss, model.parameters(), [tokens])


def used_weights(model: Decoder) -> int:
    """Return how many weights one token meets: all but those of the experts it does not use."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    inside = sum(count_weights(layer.experts)[0] for layer in layers)
    experts = layers[0].gate.num_experts
    return count_weights(model)[0] - inside * (experts - K) // experts
