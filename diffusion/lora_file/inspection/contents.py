"""A file of adapters, looked at from all sides and never refused for what its values are."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.config import locate
from diffusion.lora_file.container import LIMITS, Limits, SafetensorsFile
from diffusion.lora_file.errors import FamilyError
from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.inspection.blocks import blocks_of, sums_of_squares
from diffusion.lora_file.inspection.description import Description, describe
from diffusion.lora_file.loaders import Verdict, verdicts
from diffusion.lora_file.reading import Base, load_lora, recognize_file
from diffusion.lora_file.report import Dialect

AUTO_V2, AUTO_V3 = 10, 12
"""Digits of the hashes by which sites of models find a file."""


class Layer(NamedTuple):
    """What an adapter does to one layer.

    Attributes:
        rank: Components.
        in_features: Inputs.
        out_features: Outputs.
        scale: α/r, or α/√r for rank-stabilized adapters.
        norm: ‖ΔW‖ (Frobenius); for DoRA that of the change of the direction.
        dora: Whether it has a magnitude.
    """

    rank: int
    in_features: int
    out_features: int
    scale: float
    norm: float
    dora: bool

    @classmethod
    def of(cls, factors: Factors) -> "Layer":
        """Measure a layer."""
        sizes = (factors.rank, factors.in_features, factors.out_features)
        return cls(*sizes, factors.scale, factors.norm(), factors.magnitude is not None)


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        path: The file of weights.
        size: Its bytes.
        tensors: Their number.
        sha256: Of the whole file; empty if it was not asked for.
        tensors_sha256: Of what follows the header; empty if it was not asked for.
        family: Of models.
        evidence: What the family was concluded from.
        storage: Dtype of most factors.
        dialects: Of the tensors of the transformer, the most frequent first.
        layers: diffusers name to what is done to it; empty if the family cannot be read.
        text_encoders: Such as ``text_encoder`` to its layers.
        description: What the metadata tell.
        odd: What is unusual, one short sentence each.
        left_out: Tensor to the reason why it cannot be used.
        verdicts: What other programs make of the file.
    """

    path: Path
    size: int
    tensors: int
    sha256: str
    tensors_sha256: str
    family: str
    evidence: str
    storage: str
    description: Description
    dialects: tuple[Dialect, ...] = ()
    layers: Mapping[str, Layer] = {}
    text_encoders: Mapping[str, Mapping[str, Layer]] = {}
    odd: tuple[str, ...] = ()
    left_out: Mapping[str, str] = {}
    verdicts: tuple[Verdict, ...] = ()

    @property
    def auto_v2(self) -> str:
        """The first 10 digits of the SHA-256 of the file."""
        return self.sha256[:AUTO_V2]

    @property
    def auto_v3(self) -> str:
        """The first 12 digits of the SHA-256 of the tensors."""
        return self.tensors_sha256[:AUTO_V3]

    @property
    def norm(self) -> float:
        """‖ΔW‖ of all layers of the transformer together."""
        return math.sqrt(sum(layer.norm**2 for layer in self.layers.values()))

    def norms(self) -> dict[str, float]:
        """Return ‖ΔW‖ of each block."""
        return sums_of_squares({name: layer.norm for name, layer in self.layers.items()})

    def blocks(self) -> dict[str, list[str]]:
        """Return the layers of each block."""
        return blocks_of(self.layers)

    def state(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "file": self.path.name,
            "size": self.size,
            "tensors": self.tensors,
            "sha256": self.sha256 or None,
            "auto_v2": self.auto_v2 or None,
            "auto_v3": self.auto_v3 or None,
            "family": self.family,
            "evidence": self.evidence,
            "storage": self.storage,
            **self.description._asdict(),
            "dialects": [str(dialect) for dialect in self.dialects],
            "norm": self.norm,
            "norms": self.norms(),
            "layers": {name: layer._asdict() for name, layer in self.layers.items()},
            "text_encoders": {
                component: {name: layer._asdict() for name, layer in own.items()}
                for component, own in self.text_encoders.items()
            },
            "odd": list(self.odd),
            "left_out": dict(self.left_out),
            "loaders": [verdict._asdict() for verdict in self.verdicts],
        }


def examine(
    path: str | Path, base: Base | None = None, *, hashes: bool = True, limits: Limits = LIMITS
) -> Contents:
    """Examine a file. It may be of a family that cannot be read: then its layers are unknown.

    Args:
        path: A ``.safetensors`` file, or a folder as PEFT writes it.
        base: What it is for; without it, the file decides.
        hashes: Whether to compute the hashes, for which all of it is read once more.
        limits: What it may cost.

    Raises:
        ContainerError: The file is unsafe or damaged.
        FamilyError: A base is given, and the file is for other models.
    """
    place, _ = locate(Path(path), None)
    file = SafetensorsFile(place, limits)
    family, evidence = recognize_file(file)
    tensors_sha256 = file.tensors_sha256() if hashes else ""
    found = Contents(
        place,
        file.size,
        len(file.tensors),
        file.content_sha256() if hashes else "",
        tensors_sha256,
        family,
        evidence,
        "",
        describe(file.metadata),
        odd=_altered(file.metadata, tensors_sha256),
    )
    try:
        bundle = load_lora(path, base, strict=False, limits=limits)
    except FamilyError:
        if base is not None:
            raise
        return found
    return _read(found, bundle)


def _read(found: Contents, bundle: LoraBundle) -> Contents:
    report = bundle.report
    assert report is not None
    layers = {name: Layer.of(bundle.modules[name]) for name in bundle.modules}
    encoders = {
        component: {name: Layer.of(modules[name]) for name in modules}
        for component, modules in bundle.text_encoders.items()
    }
    odd = [*report.problems, *report.notes, *found.odd]
    if report.zero and len(report.zero) < len(layers):
        odd.append(f"the change of {len(report.zero)} of {len(layers)} layers is zero")
    return found._replace(
        family=bundle.family,
        evidence=report.evidence,
        storage=str(bundle.storage).removeprefix("torch."),
        dialects=report.dialects,
        layers=layers,
        text_encoders=encoders,
        odd=tuple(odd),
        left_out={fate.key: fate.reason for fate in report.unused},
        verdicts=tuple(verdicts(report)),
    )


def _altered(metadata: Mapping[str, str], tensors_sha256: str) -> tuple[str, ...]:
    """Return whether the tensors are others than those that the trainer has written."""
    stated = metadata.get("sshs_model_hash", "").lower()
    if not tensors_sha256 or not stated or tensors_sha256.startswith(stated):
        return ()
    return ("the header states another hash of the tensors: they were changed after training",)
