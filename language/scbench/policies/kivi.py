"""Keys and values in few bits (KIVI, arXiv 2402.02750)."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from language.hf.locate import locate_attention
from language.scbench.policies.base import KVPolicy
from language.scbench.policies.cache import LayerState

BITS = (2, 4, 8)
WORD = 32
"""Bits of an integer that codes are packed into."""


class Quantized(NamedTuple):
    """A tensor in few bits: of each group its smallest value, and steps above it.

    Attributes:
        codes: Steps, the lowest bits first, in int32: ``x.shape`` with bits / 32 of the last size.
        scale: Size of a step, ``x.shape`` with one number per group in place of the last size.
        smallest: The smallest value, like ``scale``.
    """

    codes: Tensor
    scale: Tensor
    smallest: Tensor


def quantize(x: Tensor, bits: int, group: int) -> Quantized:
    """Round groups of values along the last dimension to ``2 ** bits`` even steps.

    Groups whose values are equal have steps of 0, and are restored exactly.

    Args:
        x: Values (..., n), n a multiple of ``group`` and of ``32 / bits``.
        bits: Of a code.
        group: Values of a group.
    """
    groups, most = x.float().unflatten(-1, (-1, group)), 2**bits - 1
    low = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - low) / most).to(x.dtype)  # rounded as it is held
    steps = (groups - low) / scale.float().masked_fill(scale == 0, 1)
    codes = steps.clamp_(0, most).round_().to(torch.int32)
    shifts = torch.arange(0, WORD, bits, device=x.device, dtype=torch.int32)
    words = codes.flatten(-2).unflatten(-1, (-1, WORD // bits)) << shifts
    packed = words.sum(-1, dtype=torch.int32)
    return Quantized(packed, scale.squeeze(-1), low.squeeze(-1).to(x.dtype))


def dequantize(packed: Quantized, bits: int, group: int) -> Tensor:
    """Return the values (..., n) of `quantize`, in the dtype that they had."""
    shifts = torch.arange(0, WORD, bits, device=packed.codes.device, dtype=torch.int32)
    codes = (packed.codes.unsqueeze(-1) >> shifts) & (2**bits - 1)
    steps = codes.flatten(-2).unflatten(-1, (-1, group)).to(packed.scale.dtype)
    return (steps * packed.scale.unsqueeze(-1) + packed.smallest.unsqueeze(-1)).flatten(-2)


class PackedState(LayerState):
    """Keys and values in few bits, the last ones whole.

    Keys are grouped along tokens, values along features. Groups are appended when they are complete
    and more than the last tokens are whole; what was rounded is never rounded again.
    """

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens (B, K, T, D), and return all keys and values; new ones are read whole."""
        super().extend(keys, values)
        read = self._restored("keys"), self._restored("values")
        bits, group = self.policy.bits, self.policy.group
        number = (self.held["keys"].shape[2] - self.policy.residual) // group * group
        if number > 0:
            for name in ("keys", "values"):
                whole = self.held[name]
                part = whole[:, :, :number]
                self.held[name] = whole[:, :, number:].clone()
                packed = quantize(part.mT if name == "keys" else part, bits, group)
                for field, new in zip(packed._fields, packed, strict=True):
                    new = new.mT.contiguous() if name == "keys" else new
                    before = self.held.get(f"{name}.{field}", new[:, :, :0])
                    self.held[f"{name}.{field}"] = torch.cat([before, new], 2)
        return read

    def _restored(self, name: str) -> Tensor:
        """Return all keys or values (B, K, n, D)."""
        if f"{name}.codes" not in self.held:
            return self.held[name]
        packed = Quantized(*(self.held[f"{name}.{field}"] for field in Quantized._fields))
        if name == "keys":
            packed = Quantized(*(x.mT for x in packed))
        x = dequantize(packed, self.policy.bits, self.policy.group)
        return torch.cat([x.mT if name == "keys" else x, self.held[name]], 2)


@dataclass(frozen=True)
class KIVIPolicy(KVPolicy):
    """Keeps all tokens in few bits (KIVI, arXiv 2402.02750).

    Attributes:
        bits: 2, 4 or 8.
        group: Numbers that share a scale: tokens of a feature of keys, features of a token of
            values; a multiple of 32 / bits that divides the features of a head.
        residual: Last tokens that stay whole; fewer than ``group`` more do until a group is
            complete.
    """

    name: ClassVar[str] = "kivi"
    state: ClassVar[type[LayerState]] = PackedState
    bits: int = 4
    group: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        super().__post_init__()
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group % (codes := WORD // self.bits):
            raise ValueError(
                f"group must be a multiple of {codes}, the codes of {self.bits} bits in an integer"
                f" of {WORD}, got {self.group}"
            )

    def make_cache(self, model: nn.Module) -> Any:
        """Return a cache, see `KVPolicy.make_cache`.

        Raises:
            GatesError: Groups do not divide the features of a head.
        """
        for attention in locate_attention(model):
            if attention.head_dim % self.group:
                raise GatesError(
                    f"group={self.group} of 'kivi' does not divide the {attention.head_dim}"
                    f" features of a head of {attention.name}: give one that does, a multiple of"
                    f" {WORD // self.bits}"
                )
        return super().make_cache(model)
