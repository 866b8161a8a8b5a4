"""The header of a safetensors file, checked against limits before anything else is read."""

import math
from typing import Any, NamedTuple

import torch

from diffusion.lora_file.container.strict_json import parse_json
from diffusion.lora_file.container.text import clean
from diffusion.lora_file.errors import ContainerError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}
"""What tensors of an adapter are stored as; integers occur as α."""

_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MARK = b'"data_offsets"'
_MAX_DIMENSIONS = 8


class Limits(NamedTuple):
    """What a file of unknown origin may cost.

    Attributes:
        file_bytes: Size of the file.
        header_bytes: Length of the header.
        tensors: Number of tensors.
        rank: Components of an adapter as stored.
        metadata_bytes: Length of all metadata together.
        value_bytes: Length of one value of the metadata.
        name_chars: Length of the name of a tensor.
    """

    file_bytes: int = 4 * 2**30
    header_bytes: int = 100 * 10**6
    tensors: int = 20_000
    rank: int = 1_024
    metadata_bytes: int = 16 * 2**20
    value_bytes: int = 8 * 2**20
    name_chars: int = 512


LIMITS = Limits()
"""What is allowed by default."""


class TensorEntry(NamedTuple):
    """Where a tensor lies.

    Attributes:
        dtype: As stored.
        shape: Its sizes.
        start: First byte, counted from the end of the header.
        stop: Byte after the last.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What the header of a file states.

    Attributes:
        tensors: Name to place, in the order of the data.
        metadata: Cleaned text, see :func:`clean`.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def parse_header(
    raw: bytes, data_bytes: int, limits: Limits = LIMITS, source: str = "the header"
) -> Header:
    """Check a header and return what it states.

    Args:
        raw: JSON, without the length before it.
        data_bytes: Bytes that follow it in the file.
        limits: What it may cost.
        source: What it is, for messages.

    Raises:
        ContainerError: It is damaged, breaks a limit, or the tensors overlap or leave gaps.
    """
    if (count := raw.count(_MARK)) > limits.tensors:
        raise ContainerError(
            f"{source} holds {count} tensors, more than the limit of {limits.tensors}; "
            "this is no file of adapters"
        )
    if not raw.startswith(b"{"):
        raise ContainerError(f"{source} does not start with '{{'; get the file again")
    content = parse_json(raw, f"the header of {source}")
    metadata = _metadata(content.pop(_METADATA, {}), limits, source)
    if len(content) > limits.tensors:
        raise ContainerError(
            f"{source} holds {len(content)} tensors, more than the limit of {limits.tensors}"
        )
    tensors = {name: _entry(name, entry, limits, source) for name, entry in content.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_places(ordered, data_bytes, source)
    return Header(ordered, metadata)


def _metadata(content: Any, limits: Limits, source: str) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ContainerError(f"{source}: metadata must map text to text; get the file again")
    lengths = [len(value.encode("utf-8", "replace")) for value in content.values()]
    total = sum(lengths) + sum(len(key.encode("utf-8", "replace")) for key in content)
    if total > limits.metadata_bytes or max(lengths, default=0) > limits.value_bytes:
        raise ContainerError(
            f"{source} holds {total} bytes of metadata; the limits are {limits.metadata_bytes}, "
            f"and {limits.value_bytes} for one value"
        )
    return {clean(key): clean(value) for key, value in content.items()}


def _entry(name: str, entry: Any, limits: Limits, source: str) -> TensorEntry:
    where = f"{source}: tensor {clean(name, 120)!r}"
    if not name or len(name) > limits.name_chars or clean(name) != name:
        raise ContainerError(
            f"{where} has no usable name: expected 1 to {limits.name_chars} printable characters"
        )
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise ContainerError(f"{where} must state dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ContainerError(
            f"{where} is stored as {clean(str(dtype), 40)}; expected one of {', '.join(DTYPES)}"
        )
    if not _counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ContainerError(
            f"{where} has the shape {clean(str(shape), 80)}; expected up to {_MAX_DIMENSIONS} sizes"
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ContainerError(
            f"{where} has the offsets {clean(str(offsets), 80)}; expected a start and a stop"
        )
    kind = DTYPES[dtype]
    needed = math.prod(shape) * kind.itemsize
    if offsets[1] - offsets[0] != needed:
        raise ContainerError(
            f"{where} takes {clean(str(offsets[1] - offsets[0]), 40)} bytes, but its shape needs "
            f"{clean(str(needed), 40)}; get the file again"
        )
    return TensorEntry(kind, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    """Return whether a value is a list of sizes below 2^63; JSON's true is no size."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_places(tensors: dict[str, TensorEntry], data_bytes: int, source: str) -> None:
    """Refuse tensors that overlap, leave gaps, or do not end with the file."""
    end = 0
    for name, entry in tensors.items():
        if entry.start != end:
            what = "overlaps another" if entry.start < end else "leaves a gap before it"
            raise ContainerError(
                f"{source}: tensor {clean(name, 120)!r} {what}: it starts at byte {entry.start}, "
                f"expected {end}; get the file again"
            )
        end = entry.stop
    if end != data_bytes:
        raise ContainerError(
            f"{source}: the tensors take {end} bytes, but {data_bytes} follow the header; "
            "get the file again"
        )
