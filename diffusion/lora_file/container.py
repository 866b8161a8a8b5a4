"""Safetensors files of unknown origin.

The header is parsed and checked by hand before any tensor is read; tensors are read one by one.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError


class LoraFileError(GatesError):
    """A file of low-rank adapters cannot be read or written."""


class ContainerError(LoraFileError):
    """A file is unsafe, damaged or larger than the limits allow."""


class FamilyError(LoraFileError):
    """A file belongs to another family of models."""


class FormatError(LoraFileError):
    """A format has no way to store some modules."""


_BLANKS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def clean(text: str, limit: int | None = None) -> str:
    """Return a text in one line, without control characters, text direction marks and surrogates.

    Args:
        text: Any string.
        limit: Characters that are kept; all of them if None.
    """
    line = _CONTROLS.sub("", _BLANKS.sub(" ", text))
    return line[: limit - 1] + "…" if limit is not None and len(line) > limit else line


def label(path: str | Path) -> str:
    """Return a path for messages."""
    return clean(str(path), 200)


def listed(names: list[str], shown: int = 3) -> str:
    """Return the first names of a list, with the number of the others."""
    text = ", ".join(clean(name, 120) for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def parse_json(raw: bytes | str, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: UTF-8 or text.
        source: What it is, for messages.

    Raises:
        ContainerError: It is damaged, is not an object, is nested too deeply or names a key twice.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ContainerError(
            f"{source} is not valid JSON: {clean(reason, 200)}; get the file again"
        ) from error
    if not isinstance(content, dict):
        raise ContainerError(
            f"{source} is a JSON {type(content).__name__}, expected an object; get the file again"
        )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} occurs twice")
    return table


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}  # what tensors of an adapter are stored as; integers occur as α

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


LIMITS = Limits()  # what is allowed by default


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
        metadata: Cleaned text, see `clean`.
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


PICKLES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}
_PICKLED = (b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of the archives of ``torch.save``, and of pickles from protocol 2."""

_LENGTH = 8
_BLOCK = 2**20


class SafetensorsFile:
    """Names, shapes and metadata of a file; tensors are read from it on demand.

    Bytes are read by position and not mapped into memory, so that a file that another process
    truncates raises an error instead of ending this process.

    Args:
        path: Its place; it must end with ``.safetensors``.
        limits: What it may cost.

    Attributes:
        tensors: Name to dtype, shape and place.
        metadata: Text of the header, in one line per value and without control characters.

    Raises:
        ContainerError: The file is missing, is a pickle, is damaged or breaks a limit.
    """

    def __init__(self, path: Path, limits: Limits = LIMITS) -> None:
        self.path = path
        self.label = clean(str(path), 200)
        self.limits = limits
        self._check_name()
        self._descriptor = self._open()
        weakref.finalize(self, os.close, self._descriptor)
        self.size = self._size()
        self._data_start, (self.tensors, self.metadata) = self._parse()

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, in the dtype it is stored as.

        Raises:
            ContainerError: The file has changed since it was opened.
        """
        entry = self.tensors[name]
        raw = self._read(self._data_start + entry.start, entry.stop - entry.start)
        if not raw:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(raw, dtype=torch.uint8).view(entry.dtype).reshape(entry.shape)

    def content_sha256(self) -> str:
        """Return the SHA-256 of the whole file; its first 10 digits are AutoV2."""
        return self._sha256(0)

    def tensors_sha256(self) -> str:
        """Return the SHA-256 of what follows the header; its first 12 digits are AutoV3."""
        return self._sha256(self._data_start)

    def _check_name(self) -> None:
        suffix = self.path.suffix.lower()
        if suffix in PICKLES:
            raise ContainerError(
                f"{self.label} is a pickle, which can run any code when it is opened; "
                "get the .safetensors file"
            )
        if suffix != ".safetensors":
            raise ContainerError(f"{self.label} must end with .safetensors")

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "its name is not a path"
            raise ContainerError(f"{self.label} cannot be opened: {reason}") from error

    def _size(self) -> int:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ContainerError(f"{self.label} is not a file; name a .safetensors file")
        if status.st_size > self.limits.file_bytes:
            raise ContainerError(
                f"{self.label} has {status.st_size} bytes, more than the limit of "
                f"{self.limits.file_bytes}"
            )
        return status.st_size

    def _parse(self) -> tuple[int, Header]:
        if self.size < _LENGTH:
            raise ContainerError(
                f"{self.label} has {self.size} bytes, too few for a safetensors file; get it again"
            )
        start = bytes(self._read(0, _LENGTH))
        (length,) = struct.unpack("<Q", start)
        room = min(self.limits.header_bytes, self.size - _LENGTH)
        if length > room and start.startswith(_PICKLED):
            raise ContainerError(
                f"{self.label} is a pickle in spite of its name, which can run any code when it is "
                "opened; get the .safetensors file"
            )
        if length > room:
            raise ContainerError(
                f"{self.label} announces a header of {length} bytes, more than the {room} that are "
                "possible; get the file again"
            )
        raw = bytes(self._read(_LENGTH, length))
        data_start = _LENGTH + length
        return data_start, parse_header(raw, self.size - data_start, self.limits, self.label)

    def _read(self, start: int, count: int) -> bytearray:
        raw = bytearray(count)
        view, have = memoryview(raw), 0
        try:
            while have < count:
                received = os.preadv(self._descriptor, [view[have:]], start + have)
                if not received:
                    raise ContainerError(f"{self.label} became shorter while it was read")
                have += received
        except OSError as error:
            raise ContainerError(f"{self.label} cannot be read: {error.strerror}") from error
        return raw

    def _sha256(self, start: int) -> str:
        digest = hashlib.sha256()
        while start < self.size:
            count = min(_BLOCK, self.size - start)
            digest.update(self._read(start, count))
            start += count
        return digest.hexdigest()


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file: the same content gives the same bytes.

    Tensors of wide dtypes come first, so that each lies at a multiple of its item size.

    Args:
        tensors: By name; those of a dtype outside of `DTYPES` are refused.
        metadata: Text of the header.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    blocks, end = [], 0
    for name, tensor in ordered:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(raw)],
        }
        blocks.append(raw)
        end += len(raw)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, *blocks])
