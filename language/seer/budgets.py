"""How many blocks of a prompt every head reads, and by which scores, as one small file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.attention.seer.decode import BlockSelector
from core_gates.attention.seer.gate import (
    AttnGate,
    hide_blocks,
    mean_pool_logits,
    pad_to_blocks,
)
from core_gates.errors import GatesError
from language.hf.gate_file import read_gates, write_gates
from language.seer.attention import AttentionInputs

FILE, KIND = "budgets.safetensors", "budgets"
WINDOW, MEAN, GATE = CHOOSERS = "window", "mean-pool", "gate"
"""What scores the blocks of a head: how near they are, mean queries and keys, or its gate."""

UNTRAINED = CHOOSERS[:2]
SCALED_FROM = 2  # blocks of a head, its own and the first one, which no length changes
HALVINGS = 60  # of an interval in which a number is looked for

Scored = Callable[[], Tensor]
"""Returns the logits (B, H, Nq, Nk) of the gate of a layer."""


def causal_density(blocks: Any, length: int) -> Any:
    """Return what ``blocks`` of every row, its own included, are of the causal map.

    Args:
        blocks: A number, or a tensor of numbers, from 0 to ``length``.
        length: Blocks of a text.
    """
    return blocks * (2 * length + 1 - blocks) / (length * (length + 1))


def scores_of(chooser: str, scored: Scored, seen: AttentionInputs, block_size: int) -> Tensor:
    """Return the scores of blocks (B, H, Nq, Nk) by one of `CHOOSERS`, hidden as those of a gate.

    Args:
        chooser: Which.
        scored: Is called for the gate alone.
        seen: What attention has before it.
        block_size: Tokens of a block.
    """
    if chooser == GATE:
        return scored()
    if chooser == MEAN:
        q, k = seen.q.transpose(1, 2), seen.k.transpose(1, 2)
        return mean_pool_logits(q, k, block_size, padding_mask=seen.padding)
    length, place = seen.k.shape[2], seen.q.device
    blocks = -(-length // block_size)
    rows = blocks - (length - seen.q.shape[2]) // block_size
    near = torch.arange(blocks, dtype=torch.float32, device=place)
    empty = None if seen.padding is None else pad_to_blocks(seen.padding, block_size).all(-1)
    return hide_blocks(near.expand(*seen.q.shape[:2], rows, blocks), empty)


@dataclass(frozen=True, eq=False)
class Budgets:
    """Blocks of a prompt that every head reads: its own, the first one, and the best by scores.

    Args:
        blocks: How many of a text of ``length`` blocks, whole numbers (H,), by layer.
        choosers: By which of `CHOOSERS`, places in it (H,), by layer.
        block_size: Tokens of a block.
        density: Fraction of the causal map that all heads read together.
        length: Blocks of the texts that were calibrated with.
        gates: Digest of the gates that some heads choose by, see `digest_of`; empty if none does.
    """

    blocks: Mapping[str, Tensor]
    choosers: Mapping[str, Tensor]
    block_size: int
    density: float
    length: int
    gates: str = ""
    _selectors: dict[int, dict[str, BlockSelector]] = field(
        default_factory=dict, repr=False, init=False
    )

    def at(self, length: int) -> dict[str, Tensor]:
        """Return the blocks of each head (H,) of a text of ``length`` blocks, by layer.

        Of another length than that of the calibration, a head with m > 2 blocks has 2 + c (m - 2),
        with the largest c that keeps to the density; heads with one or two keep them.
        """
        if length == self.length:
            return dict(self.blocks)

        def scaled(factor: float) -> dict[str, Tensor]:
            return {
                name: torch.where(
                    m > SCALED_FROM, (SCALED_FROM + factor * (m - SCALED_FROM)).round().long(), m
                ).clamp(max=length)
                for name, m in self.blocks.items()
            }

        low, high = 0.0, float(length)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            read = causal_density(torch.cat([*scaled(middle).values()]).double(), length).mean()
            low, high = (low, middle) if read > self.density else (middle, high)
        return scaled(low)

    def choose(self, layer: str, scored: Scored, seen: AttentionInputs) -> Tensor:
        """Return the kept blocks (B, H, Nq, Nk) of a prompt in a layer.

        Args:
            layer: Its name.
            scored: Returns the logits of its gate; not called if no head chooses by them.
            seen: What its attention has before it.
        """
        length = -(-seen.k.shape[2] // self.block_size)
        if length not in self._selectors:
            self._selectors[length] = {
                name: BlockSelector(k=m, sinks=(m > 1).long(), recent=1, dense_rows=0)
                for name, m in self.at(length).items()
            }
        which = self.choosers[layer].to(seen.q.device)
        made = {
            n: scores_of(CHOOSERS[n], scored, seen, self.block_size) for n in set(which.tolist())
        }
        scores = next(iter(made.values()))
        for number, others in made.items():
            scores = torch.where((which == number)[:, None, None], others, scores)
        mask: Tensor = self._selectors[length][layer](scores)
        return mask

    def require(self, gates: Mapping[str, nn.Module]) -> None:
        """Refuse gates that these budgets are not of.

        Args:
            gates: `AttnGate` by layer.

        Raises:
            GatesError: They choose for decoding, have blocks of another size, a layer without
                budgets or with other heads, or are not the gates that were calibrated.
        """
        for name, gate in gates.items():
            if not isinstance(gate, AttnGate):
                raise GatesError("budgets are of prompts: attach gates of kind 'prefill'")
            if gate.block_size != self.block_size:
                raise GatesError(
                    f"budgets are in blocks of {self.block_size}, the gates have"
                    f" {gate.block_size}: attach gates of {self.block_size}, or calibrate again"
                )
            heads = None if name not in self.blocks else len(self.blocks[name])
            if heads != gate.num_heads:
                raise GatesError(
                    f"budgets hold {'no' if heads is None else heads} heads of {name}, expected"
                    f" {gate.num_heads}: calibrate again"
                )
        if self.gates and self.gates != (digest := digest_of(gates)):
            raise GatesError(
                f"budgets were calibrated with the gates {self.gates}, these are {digest}: load"
                " those by load_block_gates, or calibrate again"
            )


def digest_of(gates: Mapping[str, nn.Module]) -> str:
    """Return a digest of the weights of gates by layer, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, gate in gates.items():
        for weight in gate.parameters():
            digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_budgets(model: nn.Module, budgets: Budgets, path: str | Path) -> Path:
    """Write budgets, whole or not at all; the file knows the model that they belong to.

    Raises:
        GatesError: It cannot be written.
    """
    options = {
        name: getattr(budgets, name) for name in ("block_size", "density", "length", "gates")
    }
    tensors = {n: torch.stack([m, budgets.choosers[n]]) for n, m in budgets.blocks.items()}
    options["choosers"] = CHOOSERS
    return write_gates(path, model, kind=KIND, options=options, tensors=tensors)


def load_budgets(model: nn.Module, path: str | Path) -> Budgets:
    """Read budgets that `save_budgets` has written, which `choose_blocks` takes.

    Raises:
        GatesError: The file is missing, damaged, or of another model, or names other choosers.
    """
    options, tensors = read_gates(path, model, kind=KIND)
    if options.pop("choosers") != list(CHOOSERS):
        raise GatesError(f"{path} names other choosers than {', '.join(CHOOSERS)}: calibrate again")
    blocks, choosers = ({name: x[part] for name, x in tensors.items()} for part in (0, 1))
    return Budgets(blocks, choosers, **options)
