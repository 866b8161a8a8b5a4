"""Bytes of a safetensors file that depend on the content alone."""

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion.lora_file.container.header import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file: the same content gives the same bytes.

    Tensors of wide dtypes come first, so that each lies at a multiple of its item size.

    Args:
        tensors: By name; those of a dtype outside of :data:`DTYPES` are refused.
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
