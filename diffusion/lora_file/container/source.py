"""A safetensors file whose tensors are read one by one, when they are asked for."""

import hashlib
import os
import stat
import struct
import weakref
from pathlib import Path

import torch
from torch import Tensor

from diffusion.lora_file.container.header import LIMITS, Header, Limits, TensorEntry, parse_header
from diffusion.lora_file.container.text import clean
from diffusion.lora_file.errors import ContainerError

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
        self._data_start, self._header = self._parse()

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Name to dtype, shape and place."""
        return self._header.tensors

    @property
    def metadata(self) -> dict[str, str]:
        """Text of the header, in one line per value and without control characters."""
        return self._header.metadata

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
