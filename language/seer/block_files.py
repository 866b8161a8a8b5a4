"""Block gates of a model as one small file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.files.rounding import from_8_bits
from language.hf.gate_file import copy_into, read_gates, write_gates
from language.hf.locate import attached
from language.seer.attach import BlockGate, attach_block_gates, block_gates, detach_block_gates
from language.seer.attention import CHILD

FILE, KIND = "gates.safetensors", "block"
Round = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def state_of(gates: Mapping[str, BlockGate]) -> dict[str, Tensor]:
    """Return the parameters of gates, by the name of the attention and that within its gate."""
    return {
        f"{name}.{key}": tensor
        for name, gate in gates.items()
        for key, tensor in gate.gate.state_dict().items()
    }


def options_of(gates: Mapping[str, BlockGate]) -> dict[str, Any]:
    """Return the options that block gates were attached and distilled with."""
    first = next(iter(gates.values()))
    return {"kind": first.kind, "block_size": first.gate.block_size, "context": first.context}


def save_block_gates(model: nn.Module, path: str | Path, *, rounded: Round | None = None) -> Path:
    """Write the block gates of a model, and nothing else of it.

    Args:
        model: With gates, see `language.seer.attach.attach_block_gates`.
        path: A ``.safetensors`` file. Its metadata hold kind and block of the gates, the tokens of
            the sequences that they learned from (``context``), and the fingerprint of the base, see
            `language.hf.gate_file.fingerprint`.
        rounded: Rounds the parameters, such as ``harness.files.rounding.in_8_bits``.

    Returns:
        The path.

    Raises:
        GatesError: The model has no block gates, or the file cannot be written.
    """
    gates = block_gates(model)
    tensors = state_of(gates) if rounded is None else rounded(state_of(gates))
    return write_gates(path, model, kind=KIND, options=options_of(gates), tensors=tensors)


def load_block_gates(model: nn.Module, path: str | Path) -> dict[str, BlockGate]:
    """Read block gates into a model, and attach them before if it has none.

    Args:
        model: The base that they were distilled from, with gates of the same kind and block or
            without.
        path: What `save_block_gates` has written.

    Returns:
        The gates by the names of their attention modules.

    Raises:
        GatesError: The file is missing, damaged, or holds gates of another base, kind or block; the
            model is then as before.
    """
    options, stored = read_gates(path, model, kind=KIND)
    context = options.pop("context", None)  # which older files do not have
    before = attached(model, CHILD, BlockGate)
    gates = before or attach_block_gates(model, **options)
    given, tensors = options_of(gates), from_8_bits(stored)
    del given["context"]
    try:
        copy_into(state_of(gates), tensors, options=options, given=given, path=path)
    except GatesError:
        if not before:
            detach_block_gates(model)
        raise
    for gate in gates.values():
        gate.context = context
    return gates
