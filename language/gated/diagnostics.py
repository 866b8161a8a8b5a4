"""What attention and its gates do in each layer of a model; no map of T x T weights is made."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from core_gates.monitor import GateMonitor
from core_gates.numerics import accumulation_dtype
from language.decoder import Decoder
from language.gated.attach import CHILD
from language.hf.locate import Attention, base_of, locate_attention

IMPLEMENTATION = "gates_rows"
"""Name of this attention in transformers, while a model is diagnosed."""

ROWS = 64  # queries at once
CHECKED, GAP = 256, 1e-2  # first tokens whose logits are compared with those of the model as it is
BLOCK = re.compile(r".*?\.\d+(?=\.)")
"""The block of a layer in the name of its attention, such as ``layers.3``."""

GATES = {"gate_mean": "mean", "gate_below_0.1": "closed"}
"""Figures of gates, and what the monitor calls them."""


class Rows(NamedTuple):
    """Attention by rows, one for each query.

    Attributes:
        out: What the heads return, (B, H, T, D).
        first: Weight of the first token in each row, (B, H, T).
        entropy: Of each row in nats, (B, H, T).
    """

    out: Tensor
    first: Tensor
    entropy: Tensor


def attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Rows:
    """Causal attention, and what its rows are like, a few rows at a time.

    With the log-sum-exp of the scores of a row, a weight is ``exp(score - lse)`` and the entropy is
    the mean of ``lse - score`` under the weights.

    Args:
        q: Queries (B, H, T, D).
        k: Keys (B, K, T, D), where K divides H.
        v: Values (B, K, T, D').
        scale: Factor of the scores, ``D ** -0.5`` if None.
        window: Keys that a query sees, its own included; all before it if None.
        softcap: Scores are ``softcap * tanh(score / softcap)``, none if None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    numbers, length, group = accumulation_dtype(q), q.shape[2], q.shape[1] // k.shape[1]
    parts = []
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        low = max(0, start - window + 1) if window else 0
        query = q[:, :, start:stop].to(numbers) * scale
        keys, values = (t[:, :, low:stop].to(numbers) for t in (k, v))
        # The queries of one key head become its rows: no key is copied.
        rows = query.reshape(len(q), k.shape[1], -1, q.shape[-1])
        scores = (rows @ keys.mT).unflatten(2, (group, stop - start))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        row = torch.arange(start, stop, device=q.device).unsqueeze(1)
        place = torch.arange(low, stop, device=q.device)
        hidden = place > row
        if window:
            hidden |= place <= row - window
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp()
        surprise = (lse - scores).masked_fill(hidden, 0)
        out = (weights.flatten(2, 3) @ values).unflatten(2, (group, stop - start))
        first = weights[..., 0] if low == 0 else torch.zeros_like(weights[..., 0])
        parts.append([t.flatten(1, 2) for t in (out, first, (weights * surprise).sum(-1))])
    out, first, entropy = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return Rows(out.to(v.dtype), first, entropy)


class Diagnosis(NamedTuple):
    """What was measured of one sequence, by layer.

    Attributes:
        figures: By name (layers,): ``first_token_attention``, the mean over heads and rows but the
            first, which sees nothing else; ``with_row_0``, the same with that row; ``row_entropy``
            in nats, without it; ``largest_activation``, the largest absolute value of a feature
            after the block; with output gates ``gate_mean`` and ``gate_below_0.1``.
        histograms: Counts (layers, 20) of gates from 0 to 1; None without output gates.
    """

    figures: dict[str, np.ndarray]
    histograms: np.ndarray | None


def decoder_diagnostics(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Measure our own decoder, whose attention may be gated anywhere, on sequences without padding.

    Args:
        model: The decoder, in evaluation mode afterwards.
        tokens: Tokens (B, T), two at least.

    Returns:
        What `Diagnosis` describes, of each sequence and layer (B, layers):
        ``first_token_attention``, ``largest_activation``, with gates ``gate_mean``.
    """
    first: list[Tensor] = []
    largest: list[Tensor] = []
    gates: list[Tensor] = []

    def attended(module: Any, args: tuple[Tensor], options: dict[str, Any]) -> None:
        rows = attention_rows(*module.project(args[0], options["rotary"]))
        first.append(rows.first[..., 1:].double().mean((1, 2)))
        if module.gate is not None:
            gates.append(module.gate_values(args[0]).double().mean((1, 2, 3)))

    def returned(_module: nn.Module, _inputs: Any, states: Tensor) -> None:
        largest.append(states.double().abs().amax((1, 2)))

    hooks = []
    for block in model.eval().blocks:
        hooks.append(block.self_attn.register_forward_pre_hook(attended, with_kwargs=True))
        hooks.append(block.register_forward_hook(returned))
    try:
        with torch.inference_mode():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    measured = {"first_token_attention": first, "largest_activation": largest, "gate_mean": gates}
    return {name: torch.stack(values, 1) for name, values in measured.items() if values}


def attention_diagnostics(model: Any, tokens: Tensor) -> Diagnosis:
    """Measure a model on a sequence of tokens (*Gated Attention for LLMs*, arXiv 2505.06708).

    Args:
        model: A causal language model of transformers, with output gates or without.
        tokens: Tokens (T,) without padding, two at least.

    Raises:
        GatesError: The model does not fit, or its attention is another one than causal softmax
            attention with a window or a soft cap.
    """
    attentions, base = locate_attention(model), base_of(model)
    found: dict[str, list[float]] = {}
    hooks = [_block_of(base, a).register_forward_hook(_largest(found)) for a in attentions]
    gated = [f"{a.name}.{CHILD}" for a in attentions if CHILD in a.module._modules]
    batch = tokens.to(next(model.parameters()).device).unsqueeze(0)
    try:
        with torch.inference_mode(), GateMonitor(base) as monitor, _by_rows(model, found):
            logits = model(batch).logits
    finally:
        for hook in hooks:
            hook.remove()
    if [len(values) for values in found.values()] != [len(attentions)] * 4:
        raise _unknown(model, "is not called once a layer")
    _check(model, batch, logits)
    figures = {name: np.array(values) for name, values in found.items()}
    if not gated:
        return Diagnosis(figures, None)
    measured, counts = monitor.compute(), monitor.histograms()
    for name, key in GATES.items():
        figures[name] = np.array([measured[gate][key] for gate in gated])
    return Diagnosis(figures, np.stack([counts[gate]["histogram"].numpy() for gate in gated]))


@contextmanager
def _by_rows(model: Any, measured: dict[str, list[float]]) -> Iterator[None]:
    """Let a model attend by rows, and keep what its layers are like.

    Raises:
        GatesError: Its attention cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        _module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Any,
        scaling: float | None = None, sliding_window: int | None = None,
        softcap: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Attend by rows, and keep the figures of the layer."""
        rows = attention_rows(q, k, v, scale=scaling, window=sliding_window, softcap=softcap)
        figures = {
            "first_token_attention": rows.first[..., 1:],
            "with_row_0": rows.first,
            "row_entropy": rows.entropy[..., 1:],
        }
        for name, values in figures.items():
            measured.setdefault(name, []).append(values.double().mean().item())
        return rows.out.transpose(1, 2).contiguous(), None

    if not type(model)._can_set_attn_implementation():
        raise _unknown(model, "cannot be replaced")
    before = model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(before)


def _block_of(base: nn.Module, attention: Attention) -> nn.Module:
    """Return the block that an attention is part of."""
    match = BLOCK.match(f"{attention.name}.")
    return base.get_submodule(match[0] if match else attention.name.rpartition(".")[0])


def _largest(measured: dict[str, list[float]]) -> Any:
    """Return a hook that keeps the largest absolute value of what a block returns."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        measured.setdefault("largest_activation", []).append(states.abs().max().item())

    return hook


def _check(model: Any, batch: Tensor, logits: Tensor) -> None:
    """Refuse a model whose own attention computes something else.

    Raises:
        GatesError: It does, such as with sinks or biases of positions.
    """
    ours = logits[:, :CHECKED].double()
    with torch.inference_mode():
        theirs = model(batch[:, :CHECKED]).logits.double()
    if not (ours - theirs).norm() <= GAP * theirs.norm():
        raise _unknown(model, "adds what is not known here, such as sinks or biases of positions")


def _unknown(model: Any, why: str) -> GatesError:
    return GatesError(
        f"the attention of {type(model).__name__} {why}, expected causal softmax attention through"
        " the interface of transformers: choose another model"
    )
