"""A decoder whose attention learns to read few blocks while it is trained, not afterwards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.attention.head_gate import RotaryTable
from core_gates.attention.output_gate import GatedAttention
from core_gates.attention.seer.decode import BlockSelector
from core_gates.attention.seer.gate import AttnGate, gate_distillation_loss
from core_gates.errors import check_whole
from core_gates.ops import block_sparse_attention
from core_gates.routing.collect import refuse_coupled_gates
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import SteppedGate
from language.decoder import Decoder
from language.hf.model_folder import read_model
from language.seer.attention import AttentionInputs, attend_to_all
from language.seer.distillation import SKIPPED
from language.seer.recording import Record, inputs_of, logits_of, record
from language.seer.rivals import (
    GATE,
    SINK_MEAN_POOL,
    SINK_WINDOW,
    gate_scores,
    mean_scores,
    recent_scores,
)

Reads = Callable[[Any, AttentionInputs], Tensor]
"""Returns what heads read (B, H, T, D) in a `BlockAttention`."""

SHIPPED = Path(__file__).parents[1] / "weights"
LOSS = "blocks"
"""Name of the divergence of gates from attention, in nats per row of blocks."""


class BlockRouter(SteppedGate):
    """Route blocks of queries to the blocks of keys that they read (arXiv 2410.13276).

    Queries of a block are pooled, so that earlier ones are routed by later ones of their block.

    Args:
        gate: What scores blocks.
        num_blocks: Blocks of a sequence in training.
        blocks: Blocks that a row reads, the first one and its own among them.
    """

    couples_tokens = True

    def __init__(self, gate: AttnGate, num_blocks: int, blocks: int) -> None:
        super().__init__(gate.head_dim, num_blocks, device=gate.weight_k.device)
        self.gate = gate
        self.selector = BlockSelector(k=blocks, sinks=1, recent=1, dense_rows=0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to step 0 and draw the gate again."""
        super().reset_parameters()
        self.gate.reset_parameters()

    def forward(self, x: Record) -> RoutingOutput:  # type: ignore[override]
        """Return the blocks that are read, weights 0 or 1 (B, H, N, N), and scores of all.

        Args:
            x: Pooled queries and keys, and the ``target`` to learn, see
                `language.seer.recording.record`; without it there is no loss.
        """
        logits = logits_of(self.gate, x)
        aux = None
        if "target" in x:
            loss = gate_distillation_loss(logits, x["target"], skip=SKIPPED, reduction="row")
            aux = {LOSS: loss}
        return RoutingOutput(self.selector(logits).to(logits.dtype), logits=logits, aux=aux)


class BlockAttention(nn.Module):
    """Causal attention with a gate that learns its blocks, and after some steps reads them alone.

    The gate learns from attention to everything, with gradients of its own divergence alone; the
    model learns through what it reads. Steps are those of the optimizer, which
    `core_gates.routing.collect.update_gates` counts.

    Args:
        attention: Whose heads these are.
        num_blocks: Blocks of a sequence in training.
        block_size: Tokens of a block.
        blocks: Blocks that a row reads, see `BlockRouter`.
        dense_steps: Steps in which everything is read.

    Attributes:
        reads: Takes the place of all this, such as another rule: returns what heads read of
            `AttentionInputs`; None by default.
    """

    def __init__(
        self,
        attention: GatedAttention,
        num_blocks: int,
        *,
        block_size: int,
        blocks: int,
        dense_steps: int,
    ) -> None:
        super().__init__()
        heads = attention.num_heads, attention.num_kv_heads, attention.head_dim
        theta = {"rope_theta": attention.rope_theta, "gate_dim": attention.head_dim}
        gate = AttnGate(
            *heads, block_size=block_size, device=attention.q_proj.weight.device, **theta
        )
        self.router = BlockRouter(gate, num_blocks, blocks)
        self.dense_steps = dense_steps
        self.reads: Reads | None = None

    @property
    def gate(self) -> AttnGate:
        """What scores blocks."""
        return self.router.gate

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotary: RotaryTable) -> Tensor:
        """Return what the heads read (B, H, T, D); see `GatedAttention`."""
        q, k = (x.to(v.dtype) for x in (q, k))  # float32 after rotation under autocast
        seen = AttentionInputs(q, k, v, q.shape[-1] ** -0.5, None, rotary)
        if self.reads is not None:
            return self.reads(self, seen)
        dense = int(self.router.step) < self.dense_steps
        if dense and not self.training:
            return attend_to_all(seen)
        out, inputs = record(self, seen) if self.training else (q, inputs_of(self, seen))
        routing = self.router({name: x.detach() for name, x in inputs.items()})
        return out if dense else self.attend_to(routing.weights > 0, seen)

    def attend_to(self, mask: Tensor, seen: AttentionInputs) -> Tensor:
        """Return what heads read of some blocks (B, H, N, N)."""
        with torch.autocast(seen.q.device.type, enabled=False):  # which would round its sums
            return block_sparse_attention(seen.q, seen.k, seen.v, mask, self.gate.block_size)


class SparseDecoder(Decoder):
    """A decoder that reads few blocks, chosen by gates that learn beside it.

    Without gates its weights are those of a `Decoder` with the same seed. Sequences with padding, and
    what follows in a cache, read everything.

    Args:
        block_size: Tokens of a block.
        blocks: Blocks of keys that a block of queries reads, the first and its own among them.
        dense_steps: First steps of the optimizer, in which everything is read.
        start: Folder of the decoder whose weights it begins with, as transformers writes it; one
            that ships, such as ``long/weights/decoder-s0``, or any other. None: they are drawn.
        allow_leak: Must be true: a token is routed by later ones of its block.
        **options: Those of `Decoder`.

    Raises:
        ValueError: A number is out of range, or the leak is not allowed.
    """

    def __init__(
        self,
        *,
        block_size: int = 64,
        blocks: int = 4,
        dense_steps: int = 0,
        start: str | None = None,
        allow_leak: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_whole(0, dense_steps=dense_steps)
        if start is not None:
            self.load_state_dict(read_model(SHIPPED / start)[0].state_dict())
        for block in self.blocks:
            block.self_attn.attend = BlockAttention(
                block.self_attn, -(-self.context // block_size), block_size=block_size,
                blocks=blocks, dense_steps=dense_steps,
            )  # fmt: skip
        refuse_coupled_gates(self, allow_leak=allow_leak)


def _by_rule(attention: BlockAttention, seen: AttentionInputs, score: Reads) -> Tensor:
    """Return what heads read by the scores of a rule, as many blocks as in training."""
    return attention.attend_to(attention.router.selector(score(attention, seen)), seen)


READINGS: dict[str, Reads] = {
    "all": lambda _, seen: attend_to_all(seen),
    GATE: partial(_by_rule, score=gate_scores),
    SINK_WINDOW: partial(_by_rule, score=recent_scores),
    SINK_MEAN_POOL: partial(_by_rule, score=mean_scores),  # the selector adds the first block
}
"""How a model that is trained may be read; see ``BlockAttention.reads``."""
