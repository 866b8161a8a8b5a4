"""Experts in the shards of a checkpoint, read one at a time and never mapped."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.files import short_digest

ALIGNMENT = 64
"""Bytes that a slab and each tensor in it start at a multiple of."""

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}
PARTS = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
"""Tensors of one expert in per-expert shards that make one tensor of fused ones, in order."""

SHARDS, INDEX = "*.safetensors", "model.safetensors.index.json"


class Span(NamedTuple):
    """A tensor in a shard: its bytes begin at ``offset`` of the file."""

    path: Path
    offset: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


class SlabTensor(NamedTuple):
    """A tensor of one expert in its slab: its bytes begin at ``place``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    place: int

    @property
    def bytes(self) -> slice:
        """Its bytes in the slab."""
        return slice(self.place, self.place + math.prod(self.shape) * self.dtype.itemsize)

    def of(self, slab: Tensor) -> Tensor:
        """The tensor in a slab (bytes), as a view."""
        return slab[self.bytes].view(self.dtype).view(self.shape)


class ExpertStore:
    """The experts of a folder of safetensors, fused by layer or one by one.

    All that can be wrong with the folder is found here, before anything is read.

    Args:
        folder: Checkpoint as transformers writes it, experts fused or one by one.
        layers: Modules with the fused parameters of experts, on any device, by name.

    Attributes:
        slab_bytes: Size of the slab of an expert.
        tensors: For each layer, the tensors in a slab by the name of the parameter.
        hybrid: Whether the rare experts of a prompt travel in fewer bits.
        others: Spans of all tensors that are not of experts, by name.

    Raises:
        GatesError: A shard is missing, truncated or no safetensors; an expert is missing or of
            another shape or dtype.
    """

    def __init__(self, folder: Path, layers: Mapping[str, nn.Module]) -> None:
        self.folder, self.hybrid = folder, False
        named = _spans(folder)  # older files, such as Mixtral's, have other names of modules
        self.others = {key.replace(".block_sparse_moe.", ".mlp."): span for key, span in named}
        self.names = list(layers)
        self.tensors: list[dict[str, SlabTensor]] = []
        self._spans: list[list[list[tuple[int, Span]]]] = []  # layer, expert: place and span
        self.slab_bytes = 0
        for name, module in layers.items():
            tensors: dict[str, SlabTensor] = {}
            spans: list[list[tuple[int, Span]]] = []
            place = 0
            for parameter, fused in module.named_parameters(recurse=False):
                tensors[parameter] = SlabTensor(fused.dtype, tuple(fused.shape[1:]), place)
                spans = spans or [[] for _ in range(len(fused))]
                self._find(name, parameter, fused, place, spans)
                place += -(-fused[0].numel() * fused.dtype.itemsize // ALIGNMENT) * ALIGNMENT
            self.tensors.append(tensors)
            self._spans.append(spans)
            self.slab_bytes = max(self.slab_bytes, place)
        self._files: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}

    @property
    def num_experts(self) -> int:
        """Experts of a layer, of the largest one."""
        return max(len(spans) for spans in self._spans)

    @property
    def nbytes(self) -> int:
        """Size of the slabs of all experts together."""
        return self.slab_bytes * sum(len(spans) for spans in self._spans)

    @property
    def digest(self) -> str:
        """What tells the experts from others of equal sizes: a hash of the first bytes of each."""
        spans = [one[-1][1] for experts in self._spans for one in experts]
        some = bytearray(ALIGNMENT * len(spans))
        for number, span in enumerate(spans):
            self._read(span, memoryview(some)[number * ALIGNMENT :][: min(ALIGNMENT, span.nbytes)])
        return short_digest([self.names, self.slab_bytes, some.hex()], 12)

    def transfer_bytes(self, expert: int) -> int:  # noqa: ARG002
        """Return the number of bytes that are read for an expert."""
        return self.slab_bytes

    def read_into(self, layer: int, expert: int, slab: memoryview) -> None:
        """Read an expert into its slab.

        Raises:
            GatesError: The file ends too early, or was changed since it was read first.
            OSError: The file cannot be read.
        """
        for place, span in self._spans[layer][expert]:
            self._read(span, slab[place : place + span.nbytes])

    def read_other(self, name: str) -> Tensor:
        """Return a tensor that is not of experts, on the CPU."""
        span = self.others[name]
        if span.dtype is None:
            raise GatesError(f"{span.path} has {name} in a dtype that is not known: convert it")
        tensor = torch.empty(span.shape, dtype=span.dtype)
        self._read(span, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def close(self) -> None:
        """Close the files; a read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read(self, span: Span, buffer: memoryview) -> None:
        if span.path not in self._files:
            self._files[span.path] = os.open(span.path, os.O_RDONLY)
            self._stamps.setdefault(span.path, _stamp(self._files[span.path]))
        file, done = self._files[span.path], 0
        while done < len(buffer):
            count = os.preadv(file, [buffer[done:]], span.offset + done)
            if not count:
                raise GatesError(f"{span.path} ends too early")
            done += count
        if _stamp(file) != self._stamps[span.path]:
            raise GatesError(f"{span.path} was changed while it was open: load the model again")

    def _take(self, *names: str) -> tuple[str, Span]:
        """Return the first of these tensors that is there, which is then none of the others."""
        for name in names:
            if name in self.others:
                return name, self.others.pop(name)
        raise GatesError(f"{self.folder} lacks {names[0]}: copy the whole checkpoint")

    def _find(
        self,
        name: str,
        parameter: str,
        fused: Tensor,
        place: int,
        spans: list[list[tuple[int, Span]]],
    ) -> None:
        """Add the spans of a parameter to those of each expert."""
        shape, parts = tuple(fused.shape), PARTS.get(parameter, ())
        if not parts or f"{name}.{parameter}" in self.others:
            key, found = self._take(f"{name}.{parameter}")
            _check(key, found, fused.dtype, shape)
            size = found.nbytes // len(spans)
            for expert, into in enumerate(spans):
                one = found._replace(offset=found.offset + expert * size, shape=shape[1:])
                into.append((place, one))
            return
        for expert, into in enumerate(spans):
            start = place
            for names in parts:
                key, one = self._take(*(f"{name}.{expert}.{part}.weight" for part in names))
                _check(key, one, fused.dtype, (shape[1] // len(parts), *shape[2:]))
                into.append((start, one))
                start += one.nbytes


def _stamp(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def _check(key: str, span: Span, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if span.dtype != dtype or span.shape != shape:
        raise GatesError(
            f"{span.path} has {key} as {span.dtype} {span.shape}, the model needs {dtype} {shape}:"
            " save the checkpoint in the dtype of its config.json"
        )


def _spans(folder: Path) -> Iterator[tuple[str, Span]]:
    index = folder / INDEX
    if index.is_file():
        try:
            shards = json.loads(index.read_text())["weight_map"].values()
            files = sorted({folder / name for name in shards})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise GatesError(f"{index} names no shards: copy it again") from None
    else:
        files = sorted(folder.glob(SHARDS))
    if not files:
        raise GatesError(f"{folder} has no {SHARDS}: give the folder of a checkpoint")
    for path in files:
        yield from _header(path)


def _header(path: Path) -> Iterator[tuple[str, Span]]:
    """Yield the tensors of a shard.

    Raises:
        GatesError: It is missing, not a safetensors file, or not as long as its header says.
    """
    try:
        with safe_open(path, "pt"):  # checks the header; nothing is read
            pass
    except (SafetensorError, OSError) as error:
        raise GatesError(
            f"{path} is missing, truncated or no safetensors file ({error}): copy it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for key, one in header.items():
        start = 8 + length + one["data_offsets"][0]
        yield key, Span(path, start, DTYPES.get(one["dtype"]), tuple(one["shape"]))
