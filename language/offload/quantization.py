"""Experts that travel in 4 or 2 bits and are numbers of the model again when they arrive."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.files import replacing, sha256, short_digest, write_text
from harness.files.atomic import locked
from language.offload.expert_store import ExpertStore, Span

GROUP = 64
"""Neighboring weights with one scale and one zero."""

PART = 4096
"""Groups that become numbers at a time, so that they stay in the cache of a core."""

BITS = {"int4": (4,), "int2": (2,), "hybrid": (4, 2)}
"""Numbers that experts travel in; the second is that of rare experts of a prompt."""

FINEST = 1024
"""Steps between zero and the weights of a group of one sign, at most."""

VERSION = 3  # of the file


def packed_bytes(weights: int, bits: int) -> int:
    """Return the bytes of so many weights: a scale and a zero for each group, then codes."""
    return -(-weights // GROUP) * (6 + GROUP * bits // 8)


class Packed(NamedTuple):
    """Weights in few bits: ``(code - zero) scale``.

    Attributes:
        codes: (..., N bits / 8) uint8, the first of neighbors in the lowest bits.
        scale: One for each group (..., N / group).
        zero: One for each group (..., N / group): a code, or any float16 in groups of one sign.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(x: Tensor, bits: int, group: int = GROUP) -> Packed:
    """Return weights (..., N) in 4 or 2 bits, between the least and the largest of each group.

    In groups of one sign zero lies beyond the codes, where published formulas clip it and lose the
    group; it keeps its place as a float there, so that equal weights are exact.

    Args:
        x: Weights, N a multiple of ``group``.
        bits: Of a weight.
        group: Weights that share a scale.
    """
    groups, most = x.unflatten(-1, (-1, group)), 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    one_sign = low.sign() * high.sign() > 0
    scale = ((high - low) / most).maximum(one_sign * low.abs() / FINEST)
    scale = scale.where(scale > 0, 1)
    zero = (-low / scale).half().to(x.dtype).where(one_sign, (-low / scale).round())
    codes = (groups / scale + zero).round().clamp(0, most).to(torch.uint8).flatten(-2)
    parts = codes.unflatten(-1, (-1, 8 // bits)) << torch.arange(0, 8, bits, dtype=torch.uint8)
    return Packed(parts.sum(-1, dtype=torch.uint8), scale.squeeze(-1), zero.squeeze(-1))


def dequantize(packed: Packed, bits: int) -> Tensor:
    """Return the weights (..., N) in the dtype of the scale."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed.codes.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2)
    groups = codes.unflatten(-1, (packed.scale.shape[-1], -1)).to(packed.scale.dtype)
    return ((groups - packed.zero.unsqueeze(-1)) * packed.scale.unsqueeze(-1)).flatten(-2)


def unpack(packed: Packed, bits: int, into: Tensor) -> None:
    """Write the weights of an expert (N,), part by part, into numbers of the model."""
    codes, scale, zero = packed
    some = (codes.split(PART * GROUP * bits // 8), scale.split(PART), zero.split(PART))
    for part, *own in zip(into.split(PART * GROUP), *some, strict=True):
        part.copy_(dequantize(Packed(*own), bits)[: len(part)])


class QuantizedStore(ExpertStore):
    """Experts read in few bits from a file that is written once for a checkpoint, biases as stored.

    An expert whose number is ``num_experts`` larger is the same one in the second number of bits.

    Args:
        folder: See `ExpertStore`.
        layers: See `ExpertStore`.
        bits: Of the experts.
        cache: Folder of the file.

    Raises:
        GatesError: What `ExpertStore` raises; the file is damaged.
        ValueError: Experts have tensors of several dtypes, as no known model does.
    """

    def __init__(
        self, folder: Path, layers: Mapping[str, nn.Module], bits: Sequence[int], cache: Path
    ) -> None:
        super().__init__(folder, layers)
        self.hybrid = len(bits) > 1
        (self._dtype,) = {one.dtype for tensors in self.tensors for one in tensors.values()}
        self._weights = self.slab_bytes // self._dtype.itemsize  # alignment included
        self._biases = [
            [one.bytes for name, one in tensors.items() if name.endswith("bias")]
            for tensors in self.tensors
        ]
        self._kept = max(sum(one.stop - one.start for one in biases) for biases in self._biases)
        self._sizes = [packed_bytes(self._weights, one) + self._kept for one in bits]
        self._bits, self._record = bits, torch.empty(max(self._sizes), dtype=torch.uint8)
        self._packed = [self._written(one, cache) for one in bits]

    def transfer_bytes(self, expert: int) -> int:
        """Return the number of bytes that are read for an expert."""
        return self._sizes[expert // self.num_experts]

    def read_into(self, layer: int, expert: int, slab: memoryview) -> None:
        """Read an expert and turn it into numbers of the model in its slab.

        Raises:
            GatesError: The file ends too early.
            OSError: The file cannot be read.
        """
        which, expert = divmod(expert, self.num_experts)
        bits, size, groups = self._bits[which], self._sizes[which], -(-self._weights // GROUP)
        place, record = (layer * self.num_experts + expert) * size, self._record[:size]
        self._read(Span(self._packed[which], place, None, ()), record.numpy().data)
        scale, zero, codes = record[: size - self._kept].split(
            [4 * groups, 2 * groups, groups * GROUP * bits // 8]
        )
        packed = Packed(codes, scale.view(torch.float32), zero.view(torch.float16).float())
        unpack(packed, bits, torch.frombuffer(slab, dtype=self._dtype))
        begin = size - self._kept
        for one in self._biases[layer]:
            end = begin + one.stop - one.start
            slab[one], begin = record[begin:end].numpy().data, end

    def _written(self, bits: int, cache: Path) -> Path:
        """Return the file of all experts in so many bits, written now if it is not there.

        Raises:
            GatesError: It is not as it was written.
        """
        shards = {span.path for experts in self._spans for one in experts for _, span in one}
        known = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in sorted(shards)]
        digest = short_digest([VERSION, GROUP, self.digest, known], 12)
        path = cache / f"experts-{digest}.int{bits}"
        lock, hashed = (path.with_name(n.format(path.name)) for n in (".{}.lock", "{}.sha256"))
        with locked(lock, path, "wait until it is written", wait=True):
            if not (path.is_file() and hashed.is_file()):  # another process may have written it
                with replacing(path) as temporary, temporary.open("wb") as file:
                    for layer, experts in enumerate(self._spans):
                        for expert in range(self.num_experts):
                            file.write(self._packed_expert(layer, expert % len(experts), bits))
                write_text(hashed, sha256(path))
        if hashed.read_bytes() != sha256(path).encode():
            raise GatesError(f"{path} is not as it was written: delete it, and it is made again")
        return path

    def _packed_expert(self, layer: int, expert: int, bits: int) -> bytes:
        slab = torch.zeros(-(-self._weights // GROUP) * GROUP, dtype=self._dtype)
        super().read_into(layer, expert, slab.view(torch.uint8).numpy().data)
        stored = slab.view(torch.uint8)
        biases = [stored[place].clone() for place in self._biases[layer]]
        for place in self._biases[layer]:
            stored[place] = 0  # else a bias sets the scale of the weights in its group
        packed = quantize(slab.float(), bits)
        size = self._sizes[self._bits.index(bits)]
        parts = (packed.scale, packed.zero.half(), packed.codes, *biases)
        return b"".join(part.numpy().tobytes() for part in parts).ljust(size)
