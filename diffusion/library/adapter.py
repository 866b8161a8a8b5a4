"""An adapter as the index knows it."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from diffusion.library.errors import LibraryError
from diffusion.lora_file.container import clean

SHOWN = 10  # names of a message


@dataclass(frozen=True)
class Adapter:
    """A file of a library. All text is cleaned of control characters, but not escaped for HTML.

    Attributes:
        id: In ascending order of indexing; it decides between equal scores.
        name: Unique in the library; letters, digits, dots, dashes and underscores.
        path: Below the root of the library.
        title: As given by its author, else its name.
        size: Bytes.
        family: Of models, such as ``flux``; empty if the file cannot be read.
        dialect: How most tensors are named; empty if only the metadata is read.
        num_modules: Layers of the transformer that it changes.
        ranks: Smallest, mean and largest rank.
        norm: ‖ΔW‖ (Frobenius) of all layers; NaN if it is not known.
        triggers: Words that a prompt should hold.
        tags: The most frequent first.
        license: Such as ``CC0-1.0``; empty if none is stated.
        text: Its description.
        flags: Such as ``nonfinite``, see :mod:`diffusion.library.record`.
        problem: Why the strict reader refuses it; empty if it does not.
        error: Why it cannot be read at all; empty if it can.
        sha256: Of the file, with its configuration if it has one.
        digest: Of its content, whatever dialect, metadata and precision.
    """

    id: int
    name: str
    path: str
    title: str
    size: int
    family: str
    dialect: str
    num_modules: int
    ranks: tuple[int, float, int]
    norm: float
    triggers: tuple[str, ...]
    tags: tuple[str, ...]
    license: str
    text: str
    flags: tuple[str, ...]
    problem: str
    error: str
    sha256: str
    digest: str


class Candidate(NamedTuple):
    """An adapter as the index knows it.

    Attributes:
        id: In ascending order of indexing.
        location: Of its file.
        digest: Of its content.
        norm: ‖ΔW‖ of all layers.
        norms: ‖ΔW‖ of each layer.
    """

    id: int
    location: bytes
    digest: str
    norm: float
    norms: Mapping[str, float]


def required(
    adapter: Adapter | None, name: str, names: Callable[[], Iterable[str]] = tuple
) -> Adapter:
    """Return an adapter that was looked up by name.

    Args:
        adapter: None if there is none.
        name: What it was looked up by.
        names: Returns all names.

    Raises:
        LibraryError: There is none.
    """
    if adapter is not None:
        return adapter
    known = list(names())[:10_000]
    near = difflib.get_close_matches(name, known)
    hint = "scan the folder of the library first"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif known:
        hint = f"there are {', '.join(sorted(known)[:SHOWN])}"
        hint += f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    raise LibraryError(f"the library has no adapter {clean(name, 200)!r}: {hint}")
