"""A decoder whose attention learns to read few blocks while it is trained, not afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor, autocast, nn

from core_gates.attention.head_gate import RotaryTable
from core_gates.attention.output_gate import GatedAttention
from core_gates.attention.seer.decode import BlockSelector
from core_gates.attention.seer.gate import AttnGate, gate_distillation_loss
from core_gates.ops import block_sparse_attention
from core_gates.routing.collect import refuse_coupled_gates
from core_gates.routing.output import RoutingOutput
from core_gates.routing.schedules import SteppedGate
from language.decoder import Decoder
from language.hf.model_folder import read_model
from language.seer.attention import AttentionInputs, attend_to_all
from language.seer.distillation import SKIPPED
from language.seer.recording import logits_of, record
from language.seer.rivals import GATE, SCORES, SINK_MEAN_POOL, SINK_WINDOW, gate_scores

ALL = "all"
Reading = Callable[[Any, AttentionInputs], Tensor]
SHIPPED = Path(__file__).parents[1] / "weights"


class BlockRouting(SteppedGate):
    """Blocks that blocks of queries are routed to, and what the gate that scores them learns.

    A block of queries is pooled, so that its first ones are routed by later ones.
    """

    couples_tokens = True

    def forward(self, logits: Tensor, target: Tensor) -> RoutingOutput:  # type: ignore[override]
        """Return how much blocks are wanted (B, H, N, N), and the loss ``blocks``.

        The loss is the divergence from attention in nats per row, without the first quarter of the
        rows, in which there is nothing to choose (arXiv 2410.13276).

        Args:
            logits: Of the gate (B, H, N, N).
            target: Attention that it should predict, see `language.seer.recording.record`.
        """
        loss = gate_distillation_loss(logits, target, skip=SKIPPED, reduction="row")
        return RoutingOutput(logits.softmax(-1), logits=logits, aux={"blocks": loss})


class BlockAttention(nn.Module):
    """Causal attention with a gate that learns its blocks, and after some steps reads them alone.

    The gate learns from attention to everything, by its own loss alone; the model learns through
    what it reads. Steps are those of `core_gates.routing.collect.update_gates`.

    Args:
        attention: Whose heads these are.
        context: Tokens of a sequence in training.
        block_size: Tokens of a block.
        blocks: Blocks that a row reads, the first one and its own among them.
        dense_steps: Steps in which everything is read.

    Attributes:
        reading: Which of `READINGS` takes the place of all this; None by default.
    """

    reading: str | None = None

    def __init__(
        self,
        attention: GatedAttention,
        context: int,
        block_size: int,
        blocks: int,
        dense_steps: int,
    ) -> None:
        super().__init__()
        dim, device = attention.head_dim, attention.q_proj.weight.device
        self.gate = AttnGate(
            attention.num_heads, attention.num_kv_heads, dim, block_size=block_size, gate_dim=dim,
            rope_theta=cast(float, attention.rope_theta), device=device,
        )  # fmt: skip
        self.routing = BlockRouting(dim, -(-context // block_size), device=device)
        self.routing.reset_parameters()
        self.selector = BlockSelector(k=blocks, sinks=1, recent=1, dense_rows=0)
        self.dense_steps = dense_steps

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotary: RotaryTable) -> Tensor:
        """Return what the heads read (B, H, T, D); see `GatedAttention`."""
        q, k = (x.to(v.dtype) for x in (q, k))  # float32 after rotation under autocast
        seen = AttentionInputs(q, k, v, q.shape[-1] ** -0.5, None, rotary)
        sparse = int(self.routing.step) >= self.dense_steps
        if self.reading or not self.training:
            return READINGS[self.reading or (GATE if sparse else ALL)](self, seen)
        out, inputs = record(self, seen)  # type: ignore[arg-type]
        logits = logits_of(self.gate, {name: x.detach() for name, x in inputs.items()})
        self.routing(logits, inputs["target"])
        return self.read(logits, seen) if sparse else out

    def read(self, scores: Tensor, seen: AttentionInputs) -> Tensor:
        """Return what heads read of the blocks with the best scores (B, H, N, N)."""
        mask, size = self.selector(scores.detach()), self.gate.block_size
        with autocast(seen.q.device.type, enabled=False):  # which would round its sums
            return block_sparse_attention(seen.q, seen.k, seen.v, mask, size)


def _by(score: Reading) -> Reading:
    return lambda attention, seen: attention.read(score(attention, seen), seen)


READINGS: dict[str, Reading] = {
    ALL: lambda _, seen: attend_to_all(seen),
    GATE: _by(gate_scores),
    SINK_WINDOW: _by(SCORES[SINK_WINDOW]),
    SINK_MEAN_POOL: _by(SCORES[SINK_MEAN_POOL]),
}
"""How a `BlockAttention` may read: everything, or as many blocks by its gate and other rules."""


class SparseDecoder(Decoder):
    """A decoder that reads few blocks, chosen by gates that learn alongside it.

    Sequences with padding, and what follows in a cache, read everything.

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
        if start is not None and not self.lm_head.weight.is_meta:
            self.load_state_dict(read_model(SHIPPED / start)[0].state_dict())
        for attention in (block.self_attn for block in self.blocks):
            sizes = self.context, block_size, blocks, dense_steps
            attention.attend = BlockAttention(attention, *sizes)
        refuse_coupled_gates(self, allow_leak=allow_leak)
