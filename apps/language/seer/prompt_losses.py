"""Loss and CPU seconds of one prompt, read by block gates, by their rivals and by everything."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.language.seer.distill import model_with_gates
from core_gates.ops import block_sparse_attention
from harness.experiment import Job, Piece
from language.hf.pretrained import open_pretrained
from language.seer.attach import Attend, BlockGate
from language.seer.attention import AttentionInputs, attend_to_all
from language.seer.block_files import load_block_gates
from language.seer.budgets import Budgets
from language.seer.recording import attending, read
from language.seer.rivals import (
    BY_SUM,
    SCORES,
    SINK_MEAN_POOL,
    SINK_WINDOW,
    VERTICAL_SLASH,
    Score,
    attention_mass,
    chosen,
    kept_mass,
    scores_by,
    with_first,
)

MASS, LOSS, SECONDS = "attention_mass", "loss_increase_nats", "cpu_seconds"
DENSE, RULES, UNIFORM = "dense", "rules with budgets", "gate, uniform"
UNTIMED = BY_SUM  # it attends to everything before it chooses

Choose = Callable[[BlockGate, AttentionInputs], Tensor]
"""Returns the kept blocks."""

MadeBudgets = Mapping[str, Mapping[float, Budgets]]
"""With the gates of one seed and with rules alone, by fraction."""


def measure(
    piece: Piece, job: Job, place: str, tokens: Mapping[int, Sequence[Sequence[int]]],
    paths: Sequence[Any], budgets: Sequence[MadeBudgets],
) -> dict[str, Tensor]:  # fmt: skip
    """Return losses and seconds of one prompt, and the attention mass by layer of a short one.

    A name is that of the figure, the method with the number of a seed, and the fraction. The method
    that reads the prompt first differs from prompt to prompt, so that what a process is slow at in
    the beginning falls on all.
    """
    del job
    model: Any = model_with_gates(place, piece["kind"], piece["block_size"])
    trained = [copies(load_block_gates(model, path)) for path in paths]
    length, n = int(piece.keys["tokens"]), int(piece.keys["n"])
    sequence, figures = torch.tensor(tokens[length][n]), dict[str, list[float]]()
    methods = methods_of(piece, trained, budgets)
    if length == piece["context"]:

        def weigh(gate: BlockGate, seen: AttentionInputs) -> Tensor:
            """Return the output of a layer, dense, after measuring what all methods keep there."""
            mass = attention_mass(gate, seen)
            for (name, fraction), choose in methods.items():
                kept = kept_mass(mass, choose(gate, seen))
                figures.setdefault(f"{MASS}/{name}/{fraction}", []).append(kept)
            return attend_to_all(seen)

        read(model, sequence, weigh)
    keys = [(DENSE, 1.0), *methods]
    prompts = {
        key: prefill(model, sequence, partial(_sparse, choose=methods[key]))
        if key in methods
        else prefill(_stock(place), sequence)
        for key in keys[n % len(keys) :] + keys[: n % len(keys)]
    }
    dense, stock_seconds = prompts.pop((DENSE, 1.0))
    for (name, fraction), (nats, seconds) in prompts.items():
        figures[f"{LOSS}/{name}/{fraction}"] = [nats - dense]
        figures[f"{SECONDS}/{DENSE}/{fraction}"] = [stock_seconds]
        if name != UNTIMED:
            figures[f"{SECONDS}/{name}/{fraction}"] = [seconds]
    return {name: torch.tensor(values) for name, values in figures.items()}


def methods_of(
    piece: Piece, trained: Sequence[Mapping[str, Any]], budgets: Sequence[MadeBudgets]
) -> dict[tuple[str, float], Choose]:
    """Return what chooses blocks, by name and fraction; gates have the number of a seed.

    Prompts longer than those that gates learned from are read by what can be used alone.
    """
    methods: dict[tuple[str, float], Choose] = {}
    short = int(piece.keys["tokens"]) == piece["context"]
    for fraction in piece["fractions"]:
        names = (SINK_WINDOW, SINK_MEAN_POOL, VERTICAL_SLASH, *[BY_SUM] * short)
        scores: dict[str, Score] = {name: SCORES[name] for name in names}
        for seed, gates in enumerate(trained):
            if short:
                scores[f"{UNIFORM}{seed}"] = partial(with_first, partial(scores_by, gates=gates))
            for name, made in budgets[seed].items():
                choose = partial(_by_budgets, budgets=made[fraction], gates=gates)
                methods[f"{name}{seed}", fraction] = choose
        for method, score in scores.items():
            methods[method, fraction] = partial(_equally, score=score, fraction=fraction)
    return methods


def _equally(gate: BlockGate, seen: AttentionInputs, score: Score, fraction: float) -> Tensor:
    return chosen(score(gate, seen), fraction)


def _by_budgets(
    gate: BlockGate, seen: AttentionInputs, budgets: Budgets, gates: Mapping[str, Any]
) -> Tensor:
    return budgets.choose(gate.name, partial(scores_by, gate, seen, gates), seen)


def _sparse(gate: BlockGate, seen: AttentionInputs, choose: Choose) -> Tensor:
    mask, size = choose(gate, seen), gate.gate.block_size
    return block_sparse_attention(seen.q, seen.k, seen.v, mask, size, scale=seen.scale)


def copies(gates: Mapping[str, BlockGate]) -> dict[str, Any]:
    """Return copies of gates, by layer."""
    return {name: copy.deepcopy(gate.gate) for name, gate in gates.items()}


@cache
def _stock(place: str) -> nn.Module:
    """Return the model as it comes, opened once in a process."""
    model: nn.Module = open_pretrained(place, place).model.requires_grad_(False)
    return model


def prefill(model: Any, sequence: Tensor, attend: Attend | None = None) -> tuple[float, float]:
    """Return what reading a prompt (T,) gives: nats per token, and the CPU seconds that it takes.

    The seconds are those of all layers, up to the head, of which a prompt needs the last row alone.
    The logits are those of the model itself, which may scale them.

    Args:
        model: A causal language model; with block gates if there is something that attends.
        sequence: The tokens.
        attend: Takes the place of attention; None: the model as it is.
    """
    times = [time.process_time()]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: times.append(time.process_time()))
    layers = nullcontext() if attend is None else attending(model, attend)
    with torch.inference_mode(), layers, hook:
        logits = model(sequence.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        return float(F.cross_entropy(logits, sequence[1:])), times[1] - times[0]
