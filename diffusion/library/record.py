"""What the index keeps of a file, an adapter as the index knows it, and what a search returns."""

import dataclasses
import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from torch import Tensor

from diffusion.library.paths import Found, LibraryError
from diffusion.lora_file import (
    Limits,
    LoraBundle,
    LoraFileError,
    SafetensorsFile,
    inspection,
    load_lora,
)
from diffusion.lora_file.container import clean
from diffusion.lora_file.reading import find, recognize_file
from diffusion.lora_file.scales import locate


class WeightEncoder(Protocol):
    """Encodes an adapter by its weights into the space of a text encoder."""

    @property
    def family(self) -> str:
        """Family of models that it was trained on, such as ``flux``."""

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders only if all embeddings are; it decides what is encoded again."""

    @property
    def dim(self) -> int:
        """Numbers of an embedding."""

    def refusal(self, bundle: LoraBundle) -> str | None:
        """Return why it cannot encode an adapter, in a few words; None if it can."""

    def encode(self, bundle: LoraBundle) -> Tensor:
        """Return the embedding (dim,) of unit length.

        Raises:
            LoraFileError: It cannot encode the adapter after all.
        """


class TextEncoder(Protocol):
    """Encodes prompts into the space in which adapters are found."""

    @property
    def fingerprint(self) -> str:
        """Equal for two encoders only if all embeddings are."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings (n, dim) of unit length."""


TITLE, PHRASE, TEXT = 200, 120, 2_000
"""Characters that are kept of a title, of a tag or trigger, and of a description."""
TRIGGERS, TAGS = 16, 64  # triggers and tags that are kept


class Description(NamedTuple):
    """What a file tells about itself; everything may be empty.

    Attributes:
        title: As given by its author.
        triggers: Words that a prompt should hold.
        tags: The most frequent first.
        license: Such as ``CC0-1.0``.
        text: Description and comment.
    """

    title: str = ""
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str = ""
    text: str = ""


NOTHING_TOLD = Description()


def describe(metadata: Mapping[str, str]) -> Description:
    """Return what the metadata tells; names of kohya's folders count as triggers."""
    told = inspection.describe(metadata)
    stated = [tag for tag, count in told.tags.items() if not count]
    return Description(
        clean(told.title, TITLE).strip(),
        _phrases([*told.triggers, *told.folders], TRIGGERS),
        _phrases([*stated, *told.tags], TAGS),
        clean(told.license, PHRASE).strip(),
        clean(told.comment, TEXT).strip(),
    )


def _phrases(texts: Iterable[str], most: int) -> tuple[str, ...]:
    """Return texts without repetition, whatever their case."""
    kept: dict[str, str] = {}
    for text in texts:
        if phrase := clean(text, PHRASE).strip():
            kept.setdefault(phrase.casefold(), phrase)
        if len(kept) == most:
            break
    return tuple(kept.values())


READER = 1  # raised when equal files would give other records; all files are then read again

READ_IN_FULL = ("flux", "sd3")  # families whose factors are read; of others only metadata is

NONFINITE, ZERO, EMPTY = "nonfinite", "zero", "no transformer"
REASONS = {
    NONFINITE: "it holds NaN or infinity",
    ZERO: "the change of every layer is zero",
    EMPTY: "it changes no layer of the transformer",
}  # flags of adapters that are never found by their weights, and what they mean
TEXT_ENCODER, DORA, UNMAPPED = "text encoder", "DoRA", "unmapped"

_LINE = 300
_MAGNITUDE = re.compile(r"\.(?:dora_scale|lora_magnitude_vector)")


@dataclass(frozen=True)
class Record:
    """A file as the index keeps it.

    Attributes:
        found: Where it lies, and its size and times.
        sha256: Of the file, with its configuration if it has one; empty if it cannot be read.
        digest: Of its content, whatever dialect, metadata and precision, see ``LoraBundle``; of
            the bytes of its tensors if some of them are unknown.
        family: Such as ``flux``.
        dialect: How most tensors are named.
        ranks: Smallest, mean and largest rank.
        norms: ‖ΔW‖ (Frobenius) of each layer of the transformer.
        description: What its metadata tells.
        flags: Such as ``nonfinite``.
        problem: Why the strict reader refuses it; empty if it does not.
        error: Why it cannot be read at all; empty if it can.
    """

    found: Found
    sha256: str = ""
    digest: str = ""
    family: str = ""
    dialect: str = ""
    ranks: tuple[int, float, int] = (0, 0.0, 0)
    norms: Mapping[str, float] = field(default_factory=dict)
    description: Description = NOTHING_TOLD
    flags: tuple[str, ...] = ()
    problem: str = ""
    error: str = ""

    @property
    def norm(self) -> float:
        """‖ΔW‖ of all layers together."""
        return math.sqrt(math.fsum(norm**2 for norm in self.norms.values()))


def read_record(found: Found, limits: Limits, known: Callable[[str], Record | None]) -> Record:
    """Read a file; nothing that it holds raises.

    Args:
        found: Where it lies.
        limits: What it may cost.
        known: Returns the record of a file with the same SHA-256, if there is one: what it tells
            is taken over.
    """
    try:
        file = SafetensorsFile(found.target, limits)
        sha256 = _sha256(file)
        if (same := known(sha256)) is not None:
            return dataclasses.replace(same, found=found)
        family, _ = recognize_file(file)
        base = Record(found, sha256, family=family, description=describe(file.metadata))
        if family not in READ_IN_FULL:
            return dataclasses.replace(base, digest=_raw_digest(file))
        bundle = load_lora(found.target, strict=False, limits=limits)
        whole = bundle.report is not None and not bundle.report.unused
        return _of_bundle(base, bundle, bundle.digest() if whole else _raw_digest(file))
    except (LoraFileError, OSError, ValueError, RuntimeError) as error:
        text = str(error) or type(error).__name__
        return Record(found, error=clean(text.replace(str(found.target), found.target.name), _LINE))


def _of_bundle(base: Record, bundle: LoraBundle, digest: str) -> Record:
    norms = bundle.norms()
    ranks = list(bundle.ranks().values()) or [0]
    values = find(bundle)
    report = bundle.report
    kinds = {
        NONFINITE: values.nonfinite or not all(map(math.isfinite, norms.values())),
        ZERO: norms and not any(norms.values()),
        EMPTY: not norms,
        UNMAPPED: report is not None and report.unused,
        TEXT_ENCODER: bundle.text_encoders,
        DORA: report is not None and any(_MAGNITUDE.search(fate.key) for fate in report.used),
    }
    dialects = () if report is None else report.dialects
    return dataclasses.replace(
        base,
        digest=digest,
        family=bundle.family,
        dialect=clean(str(dialects[0]), _LINE) if dialects else "",
        ranks=(min(ranks), sum(ranks) / len(ranks), max(ranks)),
        norms=norms,
        flags=tuple(kind for kind, holds in kinds.items() if holds),
        problem="" if report is None else clean(report.summary(), _LINE),
    )


def _sha256(file: SafetensorsFile) -> str:
    """Return the SHA-256 of a file, and of the configuration that decides its scales."""
    own = file.content_sha256()
    _, config = locate(file.path, None)
    return own if config is None else hashlib.sha256(own.encode() + config.read_bytes()).hexdigest()


def _raw_digest(file: SafetensorsFile) -> str:
    """Return a digest of names, shapes and bytes of tensors."""
    digest = hashlib.sha256(file.tensors_sha256().encode())
    for name, entry in file.tensors.items():
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    return digest.hexdigest()


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


class Filters(NamedTuple):
    """Conditions that all hold; those that are None do not count. Case does not matter.

    Attributes:
        family: Such as ``flux``.
        license: Such as ``CC0-1.0``.
        tag: One of the tags.
    """

    family: str | None = None
    license: str | None = None
    tag: str | None = None

    def sql(self) -> tuple[str, dict[str, Any]]:
        """Return a condition on the row ``a`` of an adapter, and its parameters."""
        parts, values = ["1"], {}
        for column in ("family", "license"):
            if (wanted := getattr(self, column)) is not None:
                parts.append(f"fold(a.{column}) = :{column}")
                values[column] = _folded(wanted)
        if self.tag is not None:
            parts.append("EXISTS (SELECT 1 FROM tag t WHERE t.adapter = a.id AND t.tag = :tag)")
            values["tag"] = _folded(self.tag)
        return " AND ".join(parts), values

    def __str__(self) -> str:
        """Return the conditions in a few words."""
        return " and ".join(
            f"{name} {clean(value, 80)!r}"
            for name, value in self._asdict().items()
            if value is not None
        )


def _folded(text: str) -> str:
    """Return a text for comparisons; characters that cannot be written become marks."""
    return text.encode("utf-8", "replace").decode().strip().casefold()


T = TypeVar("T")


class Match(NamedTuple):
    """An adapter that a search has found.

    Attributes:
        adapter: Which.
        score: What it is ranked by.
        weights: Cosine of prompt and weights; None if its weights were not searched.
        metadata: Fraction of the words of the prompt that its metadata hold, common words aside;
            None if its metadata were not searched.
        duplicates: Paths of other files with the same content.
    """

    adapter: Adapter
    score: float
    weights: float | None
    metadata: float | None
    duplicates: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.adapter.name

    @property
    def path(self) -> str:
        """Path of the adapter below the root of the library."""
        return self.adapter.path


class Neighbor(NamedTuple):
    """An adapter that is like another one.

    Attributes:
        adapter: Which.
        cosine: Of both ΔW, all layers together, in [-1, 1].
        near_duplicate: Whether the cosine is at least .98.
        shared: Layers that both change.
    """

    adapter: Adapter
    cosine: float
    near_duplicate: bool
    shared: int


@dataclass(frozen=True)
class Results(Sequence[T]):
    """The result of a search, the best first.

    Attributes:
        found: Adapters, each with its scores.
        mode: What was searched: ``weights``, ``metadata``, ``hybrid`` or ``similarity``.
        notice: What a reader of the result has to know, such as why weights were not searched;
            empty if there is nothing.
        left_out: Name -> cosine of adapters that would be among them, were it not below ``least``.
        least: Smallest cosine of prompt and weights that is found.
    """

    found: tuple[T, ...]
    mode: str
    notice: str = ""
    left_out: Mapping[str, float] = field(default_factory=dict)
    least: float = -1.0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        """Return an adapter by its rank, from 0."""
        return self.found[index]

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self.found)
