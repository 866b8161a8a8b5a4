"""Training FLOPs of a decoder in closed form, over the choices that its gates really kept."""

from torch import nn

from core_gates.moe.layer import MoELayer
from core_gates.routing.output import RoutingOutput
from language.decoder import Decoder

FORWARD, BACKWARD = 2, 4  # FLOPs of a weight and a token


def kept_choices(routing: RoutingOutput) -> int:
    """Return how many experts the tokens of a routing are really computed by, in all."""
    return int(routing.chosen(dropped=False).sum())


def step_flops(model: Decoder, sequences: int, length: int, kept: float) -> int:
    """Return the FLOPs of the matmuls of one training step.

    A weight costs 2 FLOPs a token forward and 4 backward, of which 2 fall away where it is frozen;
    attention costs as much for each pair of tokens and each feature of keys and of values. The
    weights of an expert count for the tokens that it computes, those of gates and all others for
    every token. Norms, activations, softmax and the look-up of the embedding count nothing.

    Args:
        model: The decoder.
        sequences: Of the batch.
        length: Tokens of each.
        kept: Tokens that experts compute, summed over experts and layers.
    """
    tokens, total = sequences * length, 0.0
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for block in model.blocks:
        inner = block.self_attn.num_heads * block.self_attn.head_dim
        total += 2 * (FORWARD + BACKWARD) * tokens * length * inner
        if isinstance(block.mlp, MoELayer):
            weights += [*block.mlp.gate.parameters()]
            experts = block.mlp.experts
            size = sum(weight.numel() // len(weight) for weight in experts.parameters())
            total += (FORWARD + BACKWARD) * size * kept / num_mixtures(model)
    for weight in weights:
        total += (FORWARD + (BACKWARD if weight.requires_grad else 2)) * tokens * weight.numel()
    return round(total)


def num_mixtures(model: Decoder) -> int:
    """Return the number of layers with experts."""
    return sum(isinstance(block.mlp, MoELayer) for block in model.blocks)
