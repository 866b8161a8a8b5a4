"""Budgets of blocks by the error that reaches the loss, from a few texts and their gradients."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.seer.gate import as_float32
from core_gates.errors import GatesError
from language.seer.attach import BlockGate, block_gates
from language.seer.attention import AttentionInputs, attend_to_all
from language.seer.budgets import (
    CHOOSERS,
    GATE,
    HALVINGS,
    Budgets,
    causal_density,
    digest_of,
    scores_of,
)
from language.seer.recording import attending
from language.seer.rivals import gate_scores

Errors = Mapping[str, Tensor]
"""Of every layer the errors (choosers, H, N) of 1 to N blocks a row."""


def loss_errors(model: nn.Module, tokens: Tensor, choosers: Sequence[str] = CHOOSERS) -> Errors:
    """Return the error that reaches the loss of a text, by head, chooser and number of blocks.

    The model reads the text once, densely, and back. With g the gradient of the summed loss at the
    output o of a head, and o_m its output from the m best blocks of every row, the error is the sum
    over queries of (g · (o_m - o))². In the order of a chooser, its own block first and then that
    of the beginning, sums over blocks of weights and of weights times g · v give it for all m.

    Args:
        model: A causal language model with gates for prompts, in evaluation mode.
        tokens: Of the text (T,).
        choosers: The first ones of `language.seer.budgets.CHOOSERS`, or all.

    Returns:
        By layer (choosers, H, N), of 1 to N blocks.
    """
    whole: Any = model
    calls: dict[str, tuple[AttentionInputs, Tensor]] = {}

    def attend(gate: BlockGate, seen: AttentionInputs) -> Tensor:
        calls[gate.name] = seen, attend_to_all(seen)
        return calls[gate.name][1]

    inputs = whole.get_input_embeddings()(tokens.unsqueeze(0)).detach().requires_grad_()
    with torch.enable_grad(), attending(model, attend):
        logits = whole(inputs_embeds=inputs, use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(as_float32(logits), tokens[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [out for _, out in calls.values()])
    del logits, loss
    errors, gates = {}, block_gates(model)
    with torch.no_grad():
        for (name, (seen, _)), gradient in zip(calls.items(), gradients, strict=True):
            size, scored = gates[name].gate.block_size, partial(gate_scores, gates[name], seen)
            scores = [scores_of(chooser, scored, seen, size) for chooser in choosers]
            errors[name] = _errors(seen, gradient, torch.cat(scores), size)
    return errors


def _errors(seen: AttentionInputs, gradient: Tensor, scores: Tensor, size: int) -> Tensor:
    """Return the errors of a layer (choosers, H, N).

    Args:
        seen: Of one sequence.
        gradient: Of the loss at the output (1, H, T, D).
        scores: Of blocks (choosers, H, N, N).
        size: Tokens of a block.
    """
    length, blocks = seen.q.shape[2], scores.shape[-1]
    scores = scores.clone()
    scores[..., 0] = scores.amax() + 1
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    future = torch.ones(blocks, blocks, dtype=torch.bool, device=scores.device).triu(1)
    order = scores.masked_fill(future, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order.repeat_interleave(size, 2)[:, :, :length]
    hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    errors, group = [], seen.q.shape[1] // seen.k.shape[1]
    for head in range(seen.q.shape[1]):  # a map of one head at a time
        k, v = seen.k[0, head // group], seen.v[0, head // group]
        weights = (seen.q[0, head] @ k.mT * seen.scale).masked_fill_(hidden, -torch.inf).softmax(-1)
        mass, gain = (
            F.pad(x, (0, -length % size))
            .unflatten(-1, (-1, size))
            .sum(-1)
            .expand(len(order), -1, -1)
            for x in (weights, weights * (gradient[0, head] @ v.mT))
        )
        read = mass.gather(-1, order[:, head]).cumsum(-1).clamp(min=torch.finfo(mass.dtype).tiny)
        out = gain.gather(-1, order[:, head]).cumsum(-1) / read
        errors.append((out - gain.sum(-1, keepdim=True)).square().sum(1))
    return torch.stack(errors, 1)


def budgets_of(
    errors: Errors, model: nn.Module, density: float, choosers: Sequence[str] = CHOOSERS
) -> Budgets:
    """Return the budgets of least error that read a fraction of the causal map.

    Every head has the chooser with the least error at its number of blocks, which minimizes the
    error plus a price of what is read; the price, one for all heads, is halved to the density, and
    what is left goes to the heads that gain most.

    Args:
        errors: Means of `loss_errors` over texts of the same length.
        model: Of them.
        density: The fraction.
        choosers: That take part.

    Raises:
        GatesError: The density is out of range, or less than that of one block a row.
    """
    places = torch.tensor([CHOOSERS.index(chooser) for chooser in choosers])
    table = torch.cat([*errors.values()], 1).double()[places]
    least, which = table.min(0)
    heads, length = least.shape
    read = causal_density(torch.arange(1, length + 1).double(), length)
    check_density(density, length)
    slopes = (least[:, :1] - least[:, 1:]) / (read[1:] - read[0])
    low, high = 0.0, max(float(slopes.max()), 0.0)
    for _ in range(2 * HALVINGS):
        middle = (low + high) / 2
        over = read[(least + middle * read).argmin(1)].mean() > density
        low, high = (middle, high) if over else (low, middle)
    most = (least + high * read).argmin(1)
    while True:
        more = (most + 1).clamp(max=length - 1)
        gains = (least.gather(1, most[:, None]) - least.gather(1, more[:, None]))[:, 0]
        gains[read[more] - read[most] > density * heads - read[most].sum() + 1e-9] = 0
        if gains.max() <= 0:
            break
        most[gains.argmax()] += 1
    sizes = [error.shape[1] for error in errors.values()]
    chosen = places[which.gather(1, most[:, None])[:, 0]]
    gates = {name: gate.gate for name, gate in block_gates(model).items()}
    return Budgets(
        dict(zip(errors, (most + 1).split(sizes), strict=True)),
        dict(zip(errors, chosen.split(sizes), strict=True)),
        block_size=next(iter(gates.values())).block_size,
        density=density,
        length=length,
        gates=digest_of(gates) if (chosen == CHOOSERS.index(GATE)).any() else "",
    )


def check_density(density: float, length: int) -> None:
    """Refuse a fraction of the causal map of ``length`` blocks that no budgets read.

    Raises:
        GatesError: It is less than that of one block a row, or more than 1.
    """
    if not (least := causal_density(1, length)) <= density <= 1:
        raise GatesError(
            f"the density is {density}, expected {least:.3g}, one block of {length} a row, to 1"
        )
