"""What spawning changes of the loss of a trained decoder, and what later tokens change before."""

from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.gates.dense_to_sparse import Combine, DenseToSparseGate
from core_gates.moe.experts import StackedExperts
from core_gates.moe.layer import MoELayer
from core_gates.moe.spawn import advance_gates
from core_gates.routing import StagedSchedule
from language.decoder import Decoder

APPENDED = 32  # tokens


@torch.no_grad()
def spawning_changes(
    model: Decoder, tokens: Tensor, *, combine: Combine, temperature: float, num_experts: int
) -> dict[str, float]:
    """Return by how much the loss changes where the first experts of a decoder are copied.

    Copies are not masked, and gates are zero. Computed in float64. Until they are spawned all
    other experts return 0, so that the loss would change if nothing were copied.

    Args:
        model: A decoder with experts.
        tokens: Windows (N, T + 1).
        combine: How experts are weighed.
        temperature: Of the first step after spawning.
        num_experts: Copies.

    Returns:
        Nats per token, in the modes ``train`` and ``eval``.
    """
    stages = StagedSchedule(shared_steps=1, annealing_steps=1, start=temperature)
    model = deepcopy(model).double()
    for block in model.blocks:
        if isinstance(block.mlp, MoELayer):
            alone = {
                name: F.pad(weight[:1], [0, 0, 0, 0, 0, num_experts - 1])
                for name, weight in block.mlp.experts.named_parameters()
            }
            experts = StackedExperts(num_experts, model.dim, alone["down_proj"].shape[-1])
            experts.load_state_dict(alone)
            gate = DenseToSparseGate(model.dim, num_experts, stages=stages, combine=combine)
            block.mlp = MoELayer(gate, experts, return_routing=False).double()

    def losses() -> list[float]:
        losses = []
        for training in (True, False):
            logits = model.train(training)(tokens[:, :-1]).flatten(0, 1)
            losses.append(float(F.cross_entropy(logits, tokens[:, 1:].flatten())))
        return losses

    before = losses()
    advance_gates(model, mask_prob=0.0)
    changed = [abs(new - old) for new, old in zip(losses(), before, strict=True)]
    return dict(zip(("train", "eval"), changed, strict=True))


@torch.no_grad()
def leak(model: Decoder, tokens: Tensor) -> float:
    """Return the largest change of a logit when 32 tokens are appended, evaluated in float64.

    Args:
        model: A decoder.
        tokens: (N, T), of which the last 32 are appended to the others.
    """
    model = deepcopy(model).double().eval()
    first = tokens[:, :-APPENDED]
    return float((model(tokens)[:, : first.shape[1]] - model(first)).abs().max())
