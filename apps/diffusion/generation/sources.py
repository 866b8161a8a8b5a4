"""Where the base, the library and the gates that images are made with are read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sources:
    """Where everything is read from.

    Attributes:
        library: Folder of adapters, which is indexed; those that ship if null.
        base: Folder of a pipeline of diffusers or of an embedded base, or a GGUF file; the embedded
            base that ships if null.
        gates: File of trained gates; those that ship for the embedded base, and none for others, if
            null.
        encoder: Folder of the encoder of adapters; the shipped one for the embedded base if null.
        index: Folder of the index; .gates-index in the library if null.
        components: Folder of a pipeline with all other parts, for a GGUF file.
        dtype: Type of the parameters of other bases than the embedded one.
        offload: What is moved to a device at a time, where its memory is small.
    """

    library: str | None = None
    base: str | None = None
    gates: str | None = None
    encoder: str | None = None
    index: str | None = None
    components: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    offload: Literal["none", "model", "sequential", "group"] = "none"
