"""Block gates of a model as one small file."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.files.rounding import from_8_bits
from language.hf.gate_file import read_gates, write_gates
from language.hf.locate import locate_attention
from language.seer.attach import BlockGate, attach_block_gates, block_gates
from language.seer.attention import CHILD

KIND = "block"
Round = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def state_of(gates: Mapping[str, BlockGate]) -> dict[str, Tensor]:
    """Return the parameters of gates, by the name of the attention and that within its gate."""
    return {
        f"{name}.{key}": tensor
        for name, gate in gates.items()
        for key, tensor in gate.gate.state_dict().items()
    }


def save_block_gates(model: nn.Module, path: str | Path, *, rounded: Round | None = None) -> Path:
    """Write the block gates of a model, and nothing else of it.

    Args:
        model: With gates, see :func:`language.seer.attach.attach_block_gates`.
        path: A ``.safetensors`` file. Its metadata hold kind and block of the gates, and the
            fingerprint of the base, see :func:`language.hf.gate_file.fingerprint`.
        rounded: Rounds the parameters, such as ``harness.files.rounding.in_8_bits``.

    Returns:
        The path.

    Raises:
        GatesError: The model has no block gates, or the file cannot be written.
    """
    gates = block_gates(model)
    first, tensors = next(iter(gates.values())), state_of(gates)
    options = {"kind": first.kind, "block_size": first.gate.block_size}
    tensors = tensors if rounded is None else rounded(tensors)
    return write_gates(path, model, kind=KIND, options=options, tensors=tensors)


def load_block_gates(model: nn.Module, path: str | Path) -> dict[str, BlockGate]:
    """Read block gates into a model, and attach them before if it has none.

    Args:
        model: The base that they were distilled from, with gates of the same kind and block or
            without.
        path: What :func:`save_block_gates` has written.

    Returns:
        The gates by the names of their attention modules.

    Raises:
        GatesError: The file is missing, damaged, or holds gates of another base, kind or block; the
            model is then as before.
    """
    options, stored = read_gates(path, model, kind=KIND)
    attached = any(CHILD in one.module._modules for one in locate_attention(model))
    gates = block_gates(model) if attached else attach_block_gates(model, **options)
    first, tensors, own = next(iter(gates.values())), from_8_bits(stored), state_of(gates)
    given = {"kind": first.kind, "block_size": first.gate.block_size}
    found, expected = ({n: tuple(t.shape) for n, t in d.items()} for d in (tensors, own))
    if options != given or found != expected:
        raise GatesError(
            f"{path} holds gates with {options}, which do not fit those of the model with {given}:"
            " call detach_block_gates(model) before"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return gates
