"""What the index keeps of a file, an adapter as the index knows it, and what a search returns."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from diffusion.library.paths import Found, shown
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
        """Return a key of the encoder; two encoders share it only if all their embeddings agree."""

    @property
    def dim(self) -> int:
        """Length of an embedding."""

    def refusal(self, bundle: LoraBundle) -> str | None:
        """Return in a few words why the encoder cannot encode an adapter; None if it can."""

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


def describe(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return an adapter's metadata by column; triggers from kohya's folder names come last."""
    stated_facts = inspection.describe(metadata)
    stated = [tag for tag, count in stated_facts.tags.items() if not count]
    return {
        "title": clean(stated_facts.title, TITLE).strip(),
        "triggers": _phrases(stated_facts.triggers or stated_facts.folders, TRIGGERS),
        "tags": _phrases([*stated, *stated_facts.tags], TAGS),
        "license": clean(stated_facts.license, PHRASE).strip(),
        "text": clean(stated_facts.comment, TEXT).strip(),
    }


def _phrases(texts: Iterable[str], most: int) -> str:
    """Return texts without repetition, whatever their case, as JSON."""
    kept: dict[str, str] = {}
    for text in texts:
        phrase = clean(text, PHRASE).strip()
        kept.setdefault(phrase.casefold(), phrase)
    kept.pop("", None)
    return json.dumps(list(kept.values())[:most], ensure_ascii=False)


READER = 3  # raised when equal files would give other records; all files are then read again

READ_IN_FULL = ("flux", "sd3")  # families whose factors are read; of others only metadata is

NONFINITE, ZERO, EMPTY = "nonfinite", "zero", "no transformer"
REASONS = {
    NONFINITE: "it holds NaN, infinity or a change beyond float32",
    ZERO: "the change of every layer is zero",
    EMPTY: "it changes no layer of the transformer",
}  # flags of adapters that are never found by their weights, and what they mean
TEXT_ENCODER, DORA, UNMAPPED = "text encoder", "DoRA", "unmapped"

_LINE = 300
_MAGNITUDE = re.compile(r"\.(?:dora_scale|lora_magnitude_vector)")


def read_record(
    found: Found, limits: Limits, known: Callable[[str], Mapping[str, Any] | None]
) -> dict[str, Any]:
    """Read a file, and return what the index keeps of it, by column; nothing in it raises.

    Args:
        found: Where it lies.
        limits: What it may cost.
        known: Returns the columns of a file with the same SHA-256, if there is one: what it tells
            is taken over.
    """
    place = {column: value for column, value in found._asdict().items() if column != "target"}
    try:
        file = SafetensorsFile(found.target, limits)
        sha256 = _sha256(file)
        record = known(sha256) or {"sha256": sha256, **_contents(file)}
    except (LoraFileError, OSError, ValueError, RuntimeError) as error:
        text = str(error) or type(error).__name__
        record = {"error": clean(text.replace(str(found.target), found.target.name), _LINE)}
    return {"layers": "[]", **record, **place, "reader": READER}


def _contents(file: SafetensorsFile) -> dict[str, Any]:
    family, _ = recognize_file(file)
    facts = {"family": family, "searchable": True, **describe(file.metadata)}
    if family not in READ_IN_FULL:
        return {**facts, "digest": _raw_digest(file)}
    bundle = load_lora(file.path, strict=False, limits=file.limits)
    values, report = find(bundle), bundle.report
    assert report is not None
    norms = dict(sorted(bundle.norms().items()))
    ranks = list(bundle.ranks().values()) or [0]
    kinds = {
        NONFINITE: values.nonfinite
        or not all(norm <= inspection.LARGEST for norm in norms.values()),
        ZERO: norms and not any(norms.values()),
        EMPTY: not norms,
        UNMAPPED: report.unused,
        TEXT_ENCODER: bundle.text_encoders,
        DORA: any(_MAGNITUDE.search(fate.key) for fate in report.used),
    }
    flags = [kind for kind, holds in kinds.items() if holds]
    return {
        **facts,
        "digest": _raw_digest(file) if report.unused else bundle.digest(),
        "family": bundle.family,
        "dialect": clean(str(report.dialects[0]), _LINE) if report.dialects else "",
        "ranks": json.dumps([min(ranks), sum(ranks) / len(ranks), max(ranks)]),
        "norm": math.hypot(*norms.values()),
        "layers": json.dumps(list(norms)),
        "norms": np.array(list(norms.values()), "<f8").tobytes(),
        "flags": json.dumps(flags),
        "searchable": not set(flags) & set(REASONS),
        "problem": clean(report.summary(), _LINE),
    }


def _sha256(file: SafetensorsFile) -> str:
    """Return the SHA-256 of a file, and of the configuration that decides its scales."""
    digest = file.content_sha256()
    _, config = locate(file.path, None)
    return (
        digest
        if config is None
        else hashlib.sha256(digest.encode() + config.read_bytes()).hexdigest()
    )


def _raw_digest(file: SafetensorsFile) -> str:
    """Return a digest of names, shapes and bytes of tensors."""
    digest = hashlib.sha256(file.tensors_sha256().encode())
    for name, entry in file.tensors.items():
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A file of a library. All text is cleaned of control characters, but not escaped for HTML.

    Attributes:
        id: In ascending order of indexing; it decides between equal scores.
        name: Unique in the library, see `diffusion.library.paths.names_of`.
        location: Path below the root of the library, as bytes.
        title: As given by its author, else its name.
        size: Bytes.
        family: Of models, such as ``flux``; empty if the file cannot be read.
        dialect: How most tensors are named; empty if only the metadata is read.
        ranks: Smallest, mean and largest rank.
        norm: ‖ΔW‖ (Frobenius) of all layers; NaN if it is not finite.
        triggers: Words that a prompt should hold.
        tags: The most frequent first.
        license: Such as ``CC0-1.0``; empty if none is stated.
        text: Its description.
        flags: Such as ``nonfinite``, see `diffusion.library.record`.
        problem: Why the strict reader refuses it; empty if it does not.
        error: Why it cannot be read at all; empty if it can.
        sha256: Of the file, with its configuration if it has one.
        digest: Of its content, whatever dialect, metadata and precision, see ``LoraBundle``; of
            the bytes of its tensors if some of them are unknown.
    """

    id: int
    name: str
    location: bytes
    title: str
    size: int
    family: str
    dialect: str
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

    @property
    def path(self) -> str:
        """Path below the root of the library, as text."""
        return shown(self.location)

    @classmethod
    def of(cls, row: Any) -> "Adapter":
        """Return the adapter of a row, given by column."""
        values = {field.name: row[field.name] for field in fields(cls)}
        lists = ("ranks", "triggers", "tags", "flags")
        values |= {name: tuple(json.loads(row[name])) for name in lists}
        norm = math.nan if row["norm"] is None else row["norm"]
        return cls(**values | {"title": row["title"] or row["name"], "norm": norm})


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
        conditions = {
            "family": "fold(a.family) = :family",
            "license": "fold(a.license) = :license",
            "tag": "EXISTS (SELECT 1 FROM tag t WHERE t.adapter = a.id AND t.tag = :tag)",
        }
        values = {
            name: text.encode("utf-8", "replace").decode().strip().casefold()
            for name, text in self._asdict().items()
            if text is not None
        }  # characters that cannot be written become marks
        return " AND ".join(["1", *(conditions[name] for name in values)]), values

    def __str__(self) -> str:
        """Return the conditions in a few words."""
        return " and ".join(
            f"{name} {clean(value, 80)!r}"
            for name, value in self._asdict().items()
            if value is not None
        )


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
        named: Its name, title or trigger that the prompt holds; empty if it holds none, or names
            were not looked for.
    """

    adapter: Adapter
    score: float
    weights: float | None
    metadata: float | None
    duplicates: tuple[str, ...] = ()
    named: str = ""

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
        mode: What was searched: ``names``, ``weights``, ``metadata``, ``hybrid`` or
            ``similarity``.
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

    def __getitem__(self, index: Any) -> Any:
        """Return an adapter by its rank, from 0."""
        return self.found[index]

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self.found)
