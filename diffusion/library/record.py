"""What the index keeps of a file, read once."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffusion.library.describe import NOTHING_TOLD, Description, describe
from diffusion.library.paths import Found
from diffusion.lora_file import Limits, LoraBundle, LoraFileError, SafetensorsFile, load_lora
from diffusion.lora_file.config import locate
from diffusion.lora_file.container import clean
from diffusion.lora_file.findings import find
from diffusion.lora_file.reading import recognize_file

READER = 1
"""Raised when equal files would give other records; all files are then read again."""

READ_IN_FULL = ("flux", "sd3")
"""Families whose factors are read; of others only metadata is."""

NONFINITE, ZERO, EMPTY = "nonfinite", "zero", "no transformer"
REASONS = {
    NONFINITE: "it holds NaN or infinity",
    ZERO: "the change of every layer is zero",
    EMPTY: "it changes no layer of the transformer",
}
"""Flags of adapters that are never found by their weights, and what they mean."""
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
        return Record(found, error=clean(_reason(error, found.target), _LINE))


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
    if config is None:
        return own
    return hashlib.sha256(own.encode() + config.read_bytes()).hexdigest()


def _raw_digest(file: SafetensorsFile) -> str:
    """Return a digest of names, shapes and bytes of tensors."""
    digest = hashlib.sha256(file.tensors_sha256().encode())
    for name, entry in file.tensors.items():
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    return digest.hexdigest()


def _reason(error: Exception, path: Path) -> str:
    """Return the message of an error without the folder of the file."""
    text = str(error) or type(error).__name__
    return text.replace(str(path), path.name)
