"""What a file of adapters holds: layers, norms, hashes, and what its metadata tell."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.lora_file.bundle import LoraBundle
from diffusion.lora_file.container import LIMITS, Limits, SafetensorsFile, clean
from diffusion.lora_file.factors import Factors
from diffusion.lora_file.family import FAMILIES
from diffusion.lora_file.mapping_report import Dialect, Verdict, verdicts
from diffusion.lora_file.reading import Base, load_lora, recognize_file
from diffusion.lora_file.scales import locate

OUTSIDE = "outside of the blocks"
LARGEST = 3.4028234663852886e38  # of float32, which the ‖ΔW‖ of a layer must not exceed


_BLOCK = re.compile(r"mid_block|.*?(?:blocks|layers|block)[._]\d+(?=[._])")


def block_of(name: str) -> str:
    """Return the block that a layer belongs to, such as ``transformer_blocks.3``."""
    match = _BLOCK.match(name)
    return match[0] if match else OUTSIDE


def blocks_of(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the layers of each block, in the order of the model; those outside come last."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(block_of(name), []).append(name)
    return dict(sorted(blocks.items(), key=lambda item: _place(item[0])))


def sums_of_squares(values: Mapping[str, float]) -> dict[str, float]:
    """Return the root of the sum of squares of each block.

    Args:
        values: Norm of each layer, by diffusers name.
    """
    return {
        block: math.hypot(*(values[name] for name in names))
        for block, names in blocks_of(values).items()
    }


def relative_errors(errors: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW‖ of each block.

    Args:
        errors: Relative error of each layer, by diffusers name.
        norms: ‖ΔW‖ of each layer.
    """
    lost = sums_of_squares({name: errors[name] * norms[name] for name in errors})
    total = sums_of_squares({name: norms[name] for name in errors})
    return {block: lost[block] / norm if norm else 0.0 for block, norm in total.items()}


def _place(block: str) -> tuple[int, int]:
    """Sort by the order of the model; what lies outside comes last."""
    kind, number = block.partition(".")[0], re.search(r"\d+$", block)
    return _LATER.get(kind, 0), int(number[0]) if number else 0


_LATER = {"single_transformer_blocks": 1, "mid_block": 1, "up_blocks": 2, OUTSIDE: 3}


_TITLES = ("modelspec.title", "ss_output_name", "name")
_TRIGGERS = (
    "modelspec.trigger_phrase",
    "modelspec.trigger_word",
    "ss_trigger_words",
    "trigger_phrase",
    "trigger_words",
    "trigger_word",
)
_LICENSES = ("modelspec.license", "license")
_BASES = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_COMMENTS = ("modelspec.description", "ss_training_comment", "description")
_AUTHORS = ("modelspec.author", "author")
_REPEATS = re.compile(r"\d+_(.+)", re.DOTALL)
_FREQUENCIES, _TAGS = "ss_tag_frequency", "modelspec.tags"
_NOTHING = {"", "none", "null", "undefined"}
MAX_TEXT, MAX_COMMENT, MAX_TAGS = 400, 2_000, 1_000


class Description(NamedTuple):
    """What the metadata of a file tell about it, without control characters.

    Attributes:
        title: Its name.
        triggers: Words that belong into a prompt: as stated, or else the most frequent tag of the
            captions of kohya's trainers.
        tags: Tag to the number of training images with it, the most frequent first; 0 for a tag
            that is given without a number.
        folders: Names of folders of training images, such as ``sks dog`` of ``10_sks dog``; kohya's
            trainers take them as captions where there are no others.
        license: As stated.
        base: What it was trained on, as stated.
        comment: What the author and the trainer say about it.
        author: Who made it.
    """

    title: str = ""
    triggers: tuple[str, ...] = ()
    tags: Mapping[str, int] = {}
    folders: tuple[str, ...] = ()
    license: str = ""
    base: str = ""
    comment: str = ""
    author: str = ""


def describe(metadata: Mapping[str, str]) -> Description:
    """Read title, triggers and tags from metadata; damaged entries are skipped.

    Args:
        metadata: Of the header, see ``SafetensorsFile.metadata``.
    """
    frequencies = _json(metadata.get(_FREQUENCIES, ""))
    tags: Counter[str] = Counter()
    folders = []
    for folder, counts in frequencies.items() if isinstance(frequencies, dict) else ():
        if kohya := _REPEATS.match(folder):
            folders.append(clean(kohya[1], MAX_TEXT).strip())
        if isinstance(counts, dict):
            tags.update(_counted(counts))
    stated = dict.fromkeys(_words(metadata.get(_TAGS, "")), 0)
    called = dict.fromkeys([word for key in _TRIGGERS for word in _words(metadata.get(key, ""))])
    frequent = (tag for tag, count in tags.most_common(1) if count > 1)
    return Description(
        _first(metadata, _TITLES),
        tuple(called or frequent),
        dict(tags.most_common(MAX_TAGS)) | {t: n for t, n in stated.items() if t not in tags},
        tuple(dict.fromkeys(folder for folder in folders if folder)),
        _first(metadata, _LICENSES),
        _first(metadata, _BASES),
        " ".join(_stated(metadata, _COMMENTS))[:MAX_COMMENT],
        _first(metadata, _AUTHORS),
    )


def _counted(counts: Mapping[str, Any]) -> Counter[str]:
    """Return tags with their numbers; kohya's trainers keep the blanks around them."""
    counted: Counter[str] = Counter()
    for tag, count in counts.items():
        word = clean(str(tag), MAX_TEXT).strip()
        if word and type(count) is int and 0 < count < 2**53:
            counted[word] += count
    return counted


def _words(text: str) -> list[str]:
    """Return the words of a list in JSON, or of a text with commas."""
    parsed = _json(text) if text.lstrip().startswith("[") else None
    words = parsed if isinstance(parsed, list) else text.split(",")
    cleaned = [clean(word, MAX_TEXT).strip() for word in words if isinstance(word, str)]
    return [word for word in cleaned if word.lower() not in _NOTHING]


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str:
    return next(iter(_stated(metadata, keys)), "")[:MAX_TEXT].strip()


def _stated(metadata: Mapping[str, str], keys: tuple[str, ...]) -> list[str]:
    texts = (clean(metadata.get(key, "")).strip() for key in keys)
    return list(dict.fromkeys(text for text in texts if text.lower() not in _NOTHING))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


AUTO_V2, AUTO_V3 = 10, 12  # digits of the hashes by which sites of models find a file


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
        layers: diffusers name, or that in the file, to what is done to it.
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
        return math.hypot(*(layer.norm for layer in self.layers.values()))

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
                component: {name: layer._asdict() for name, layer in layers.items()}
                for component, layers in self.text_encoders.items()
            },
            "odd": list(self.odd),
            "left_out": dict(self.left_out),
            "loaders": [verdict._asdict() for verdict in self.verdicts],
        }


def examine(
    path: str | Path, base: Base | None = None, *, hashes: bool = True, limits: Limits = LIMITS
) -> Contents:
    """Examine a file of any family.

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
    contents = Contents(
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
    bundle = load_lora(path, base, strict=False, limits=limits, any_family=True)
    return _read(contents, bundle)


def _read(contents: Contents, bundle: LoraBundle) -> Contents:
    report = bundle.report
    assert report is not None
    layers = {name: Layer.of(bundle.modules[name]) for name in bundle.modules}
    encoders = {
        component: {name: Layer.of(modules[name]) for name in modules}
        for component, modules in bundle.text_encoders.items()
    }
    odd = [*report.problems, *report.notes, *contents.odd]
    if report.zero and len(report.zero) < len(layers):
        odd.append(f"the change of {len(report.zero)} of {len(layers)} layers is zero")
    return contents._replace(
        family=bundle.family,
        evidence=report.evidence,
        storage=str(bundle.storage).removeprefix("torch."),
        dialects=report.dialects,
        layers=layers,
        text_encoders=encoders,
        odd=tuple(odd),
        left_out={fate.key: fate.reason for fate in report.unused},
        verdicts=tuple(verdicts(report)) if bundle.family in FAMILIES else (),
    )


def _altered(metadata: Mapping[str, str], tensors_sha256: str) -> tuple[str, ...]:
    """Return whether the tensors are others than those that the trainer has written."""
    stated = metadata.get("sshs_model_hash", "").lower()
    if not tensors_sha256 or not stated or tensors_sha256.startswith(stated):
        return ()
    return ("the header states another hash of the tensors: they were changed after training",)
