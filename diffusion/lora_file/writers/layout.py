"""What is written: tensors, text of the header, and the configuration of PEFT."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file.container.text import listed
from diffusion.lora_file.errors import FormatError
from diffusion.lora_file.factors.change import Factors

STALE = {
    "lora_adapter_metadata",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "ss_network_args",
    "format",
}
"""Metadata that describes the former file."""


class Layout(NamedTuple):
    """An adapter in a format.

    Attributes:
        tensors: By name, not yet in the dtype of the file.
        metadata: Text of the header.
        config: Content of ``adapter_config.json``; None for formats of a single file.
        exact: Names of tensors that keep their dtype, such as α.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None = None
    exact: frozenset[str] = frozenset()


def kept_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that is true of the new file, too."""
    return {key: text for key, text in metadata.items() if key not in STALE} | {"format": "pt"}


def refuse(format_name: str, names: list[str], why: str) -> None:
    """Refuse an adapter if there are layers that a format cannot store.

    Raises:
        FormatError: ``names`` is not empty.
    """
    if names:
        raise FormatError(
            f"the format {format_name} cannot store {listed(sorted(names), 8)}: {why}; "
            "choose another format"
        )


def most_common(values: Iterable[float]) -> float:
    """Return the most frequent value, the smallest of several."""
    count = Counter(values)
    return min(count, key=lambda value: (-count[value], value))


def in_storage(tensor: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Return a tensor in the dtype of a file.

    Args:
        tensor: As computed.
        dtype: Wanted; float8 is written as bfloat16, which holds the same values.
        exact: Keep float32 where a value would change.
    """
    if dtype.itemsize == 1:
        dtype = torch.bfloat16
    stored = tensor.to(dtype)
    if exact and not torch.equal(stored.to(tensor.dtype), tensor):
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return stored


def alpha_of(factors: Factors) -> float:
    """Return the α that gives the scale of a layer, α/r."""
    return factors.scale * factors.rank
