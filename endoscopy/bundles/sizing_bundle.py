"""A trained sizing network with all that its numbers need: target, limits, intervals, scope."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import load, save

from core_gates.errors import GatesError, check_positive
from endoscopy.bundles.frame_quality import QualityLimits
from endoscopy.data.frame_table import SYNTHETIC
from endoscopy.data.images import Frame
from endoscopy.data.streams import InputForm, NetworkInput, Outline, network_input
from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.inputs.locations import Origin
from endoscopy.metrics import CONTINUOUS, PROBABILITIES, CutOffs
from endoscopy.models.sizer import MultiStreamSizer, channels_of
from endoscopy.training.targets import Classes, LogSize, Ordinal, ScaledMillimeters, SizeTarget
from harness.files import short_digest, write_bytes, write_text

NO_CALIBRATION = "no millimeter calibration for this scope"
RESEARCH_ONLY = "research only"
MANIFEST = "manifest.json"
OF_MILLIMETERS = ("lower_mm", "upper_mm", "size_class", "interval_crosses", *PROBABILITIES)


@dataclass(frozen=True)
class Scope:
    """For which sources a model gives millimeters.

    On a source of another scope, sizes are given not in millimeters but as a size index: the
    predicted size over ``reference_mm``, 1 for a lesion that the model considers average.

    Args:
        trained_on: Name of the training data, for the model card.
        calibrated_for: Scopes in which millimeters are given; ``synthetic`` is that of rendered
            frames.
        reference_mm: Geometric mean of the training sizes.

    Raises:
        ValueError: The reference is not positive.
    """

    trained_on: str = SYNTHETIC
    calibrated_for: tuple[str, ...] = (SYNTHETIC,)
    reference_mm: float = 6.3

    def __post_init__(self) -> None:
        check_positive(reference_mm=self.reference_mm)

    def is_calibrated(self, source: str | None) -> bool:
        """Return whether sizes on a source of this scope may be given in millimeters."""
        return source is not None and source in self.calibrated_for

    def express(self, table: pd.DataFrame, source: str | None) -> pd.DataFrame:
        """Return predictions as they may be shown for a source.

        Args:
            table: With ``predicted_mm`` and perhaps what follows from it in millimeters.
            source: Scope of the source, None if unknown.

        Returns:
            The table itself if the scope is calibrated, else one in which ``size_index`` stands for
            the size and a column ``note`` gives the reason; intervals, classes and their
            probabilities, which are in terms of millimeters, are left out.
        """
        if self.is_calibrated(source):
            return table
        shown = table.drop(columns=[name for name in OF_MILLIMETERS if name in table])
        shown["predicted_mm"] = table["predicted_mm"] / self.reference_mm
        return shown.rename(columns={"predicted_mm": "size_index"}).assign(note=NO_CALIBRATION)

    def text(
        self, size_mm: float, source: str | None, low: float = math.nan, high: float = math.nan
    ) -> str:
        """Return a size as it may be shown for a source, in millimeters with a finite interval."""
        if not self.is_calibrated(source):
            return f"size index {size_mm / self.reference_mm:.2f}"
        bounded = math.isfinite(low) and math.isfinite(high)
        return f"{size_mm:.1f} mm" + (f" ({low:.3g} to {high:.3g})" if bounded else "")

    def lines(self, source: str | None) -> list[str]:
        """Return the lines that must accompany every number."""
        if self.is_calibrated(source):
            return [f"{RESEARCH_ONLY}; millimeters are calibrated for the scope {source!r}"]
        return [
            f"{RESEARCH_ONLY}; {NO_CALIBRATION}: the size index is relative to an average lesion "
            f"of the training data ({self.trained_on}), and no size in millimeters"
        ]


def source_scope(source: str | Path, stated: str | None = None) -> str | None:
    """Return the scope of a source, None if unknown.

    The manifest of prepared data, in the folder of the source or up to two above it, names it;
    otherwise the user does. Only a manifest can declare frames synthetic.

    Raises:
        GatesError: The statement contradicts the manifest, or claims synthetic frames without one.
    """
    path = Path(source).absolute()
    for folder in [path, *path.parents][: 3 if path.is_dir() else 4]:
        if (named := _named_in(folder / MANIFEST)) is not None:
            if stated not in (None, named):
                raise GatesError(
                    f"{source}: its manifest names the scope {named!r}, not {stated!r}; leave the "
                    "scope out"
                )
            return named
    if stated == SYNTHETIC:
        raise GatesError(
            f"{source}: has no {MANIFEST} that declares its frames synthetic; render or prepare "
            "them, or leave the scope out"
        )
    return stated


def _named_in(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    named = content.get("scope") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None


TEMPLATE = """---
license: apache-2.0
tags: [endoscopy, polyp-sizing, research-only]
---
# Polyp sizing: {trunk}, gates {gates}

**Intended use: research only.** Not a medical device; not for diagnosis, treatment or any decision
about a patient.

## Scope

- Trained on: {trained_on}.
- Millimeters are calibrated for: {calibrated_for}.
- On any other source sizes are given as a size index, relative to a lesion of
  {reference_mm:.3g} mm, with the note "{note}".

## Input and output

- Streams: {streams}; frames of {image_size} x {image_size} pixels, the aspect not kept; normalized
  by the mean and standard deviation of the training data of arXiv 2407.04400.
- Location of the lesion: {location}.
- Target: {target}.
- Abstention: {quality}.
- Intervals: {intervals}.
{facts}"""


LOCATIONS = {
    "mask": "mask, or the ellipse inscribed into its box",
    "box": "box",
    "either": "mask, or its box",
}
"""What a network needs of a lesion, by the outline that it was trained with."""


def model_card(config: Mapping[str, Any]) -> str:
    """Return a model card in Markdown.

    Args:
        config: Of `SizingBundle.config`.
    """
    scope, model, fitted = config["scope"], config["model"], config["intervals"]
    intervals = "none"
    if fitted:
        counts = ", ".join(
            f"{name} {len(interval['residuals'])}" for name, interval in fitted.items()
        )
        coverage = next(iter(fitted.values()))["coverage"]
        intervals = (
            f"split conformal, {coverage:.0%} nominal, of whole objects and of few frames, fitted"
            f" to each way of locating lesions (objects: {counts}); they hold for exchangeable"
            " objects located in the same way only"
        )
    facts = [f"- {name}: {value}" for name, value in config["facts"].items()]
    return TEMPLATE.format(
        trunk=model["trunk"],
        gates=model["gates"],
        trained_on=scope["trained_on"],
        calibrated_for=", ".join(scope["calibrated_for"]) or "nothing",
        reference_mm=scope["reference_mm"],
        note=NO_CALIBRATION,
        streams=", ".join(channels_of(model["streams"])),
        image_size=config["image_size"],
        location=LOCATIONS[config["outline"]],
        target=config["target"]["name"],
        quality="none" if config["quality"] is None else "limits fitted to the training frames",
        intervals=intervals,
        facts="\n".join(["", "## Facts", "", *facts, ""]) if facts else "",
    )


FORMAT = 3  # 3: intervals by location, and the outline
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class Provenance(NamedTuple):
    """What decided a training, and which objects it saw.

    Attributes:
        settings: Everything that decides the weights, by name; plain values for JSON.
        objects: Keys of the training objects, of `endoscopy.data.frame_table.object_key`.
    """

    settings: Mapping[str, Any]
    objects: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings."""
        return short_digest(dict(self.settings))

    def state(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "objects": list(self.objects),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Provenance:
        """Restore what `state` returned."""
        return cls(dict(state["settings"]), tuple(state["objects"]))


@dataclass
class SizingBundle:
    """What is needed to predict, and to state how good the prediction is.

    Attributes:
        model: The network, for evaluation.
        target: What it returns.
        image_size: Side length in pixels of the frames that it takes.
        scope: Where its millimeters mean something.
        outline: Where the outline of lesions came from in training.
        aperture: Of `endoscopy.data.streams.build_streams`.
        quality: Limits on the frames from which a size is read.
        intervals: Of sizes of objects, by how lesions are located; none where the error of such
            sizes is unknown.
        cut_offs: Sizes that separate the predicted classes.
        facts: Anything that the model card should show, by name; plain values for JSON.
        training: What the network was trained with; None if unknown.
    """

    model: MultiStreamSizer
    target: SizeTarget
    image_size: int
    scope: Scope = field(default_factory=Scope)
    outline: Outline = "mask"
    aperture: float | None = None
    quality: QualityLimits | None = None
    intervals: dict[Origin, SplitConformal] = field(default_factory=dict)
    cut_offs: CutOffs = CONTINUOUS
    facts: dict[str, Any] = field(default_factory=dict)
    training: Provenance | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that the network reads."""
        return tuple(self.model.branches)

    @property
    def conformal(self) -> SplitConformal | None:
        """Intervals of lesions that are located as in training; None without any."""
        return self.intervals.get("boxes" if self.outline == "box" else "masks")

    @property
    def form(self) -> InputForm:
        """What the network is fed."""
        return InputForm(self.streams, self.image_size, self.aperture, self.outline)

    def inputs(self, frames: Sequence[Frame]) -> NetworkInput:
        """Resize frames of any size to the network's input, on its device."""
        device = next(self.model.parameters()).device
        streams, geometry = network_input(frames, self.form)
        streams = {name: value.to(device) for name, value in streams.items()}
        return NetworkInput(streams, geometry.to(device))

    @torch.no_grad()
    def raw(self, frames: Sequence[Frame]) -> torch.Tensor:
        """Return the raw outputs (B, outputs) for frames of any size, on the CPU."""
        return self.model(*self.inputs(frames)).cpu()

    def config(self) -> dict[str, Any]:
        """Return everything but the weights as plain values for JSON."""
        return {
            "format": FORMAT,
            "model": self.model.arguments,
            "target": describe_target(self.target),
            "image_size": self.image_size,
            "outline": self.outline,
            "aperture": self.aperture,
            "scope": {
                "trained_on": self.scope.trained_on,
                "calibrated_for": list(self.scope.calibrated_for),
                "reference_mm": self.scope.reference_mm,
            },
            "quality": None if self.quality is None else self.quality.state(),
            "intervals": {name: interval.state() for name, interval in self.intervals.items()},
            "cut_offs_mm": [self.cut_offs.small, self.cut_offs.large],
            "facts": self.facts,
            "training": None if self.training is None else self.training.state(),
        }

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write weights, configuration and model card into a folder; each is complete or absent.

        Args:
            folder: Is made if absent.
            dtype: Of floating weights on disk; they are float32 again when loaded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: _stored(value, dtype) for name, value in self.model.state_dict().items()}
        config = self.config()
        write_bytes(folder / WEIGHTS, save(state))
        write_text(folder / CARD, model_card(config))
        write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        return folder


def load_bundle(folder: str | Path) -> SizingBundle:
    """Read what `SizingBundle.save` wrote, for evaluation.

    Raises:
        GatesError: A file is absent or damaged, or of a later format.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise GatesError(
                f"{folder}: has format {config.get('format')}, expected {FORMAT}; install the "
                "version of this package that wrote it"
            )
        model = MultiStreamSizer(**config["model"])
        like = model.state_dict()
        stored = load((folder / WEIGHTS).read_bytes())
        model.load_state_dict({name: value.to(like[name]) for name, value in stored.items()})
        scope, quality = config["scope"], config["quality"]
        training = config.get("training")  # absent from weights of earlier versions
        return SizingBundle(
            model.eval(),
            build_target(config["target"]),
            config["image_size"],
            Scope(scope["trained_on"], tuple(scope["calibrated_for"]), scope["reference_mm"]),
            config["outline"],
            config["aperture"],
            None if quality is None else QualityLimits.from_state(quality),
            {name: SplitConformal.from_state(state) for name, state in config["intervals"].items()},
            CutOffs(*config["cut_offs_mm"]),
            config["facts"],
            None if training is None else Provenance.from_state(training),
        )
    except GatesError:
        raise
    except OSError as error:
        raise GatesError(
            f"{folder}: has no {Path(error.filename or CONFIG).name}; name a folder of weights"
        ) from error
    except Exception as error:  # JSON, safetensors and PyTorch each raise their own errors
        line = (str(error).splitlines() or [""])[0]
        raise GatesError(
            f"{folder}: cannot be loaded: {type(error).__name__} {line}; copy it again"
        ) from error


def describe_target(target: SizeTarget) -> dict[str, Any]:
    """Return name and arguments of a target, as far as reading millimeters needs them.

    Raises:
        ValueError: The class of the target is unknown.
    """
    match target:
        case LogSize():
            arguments = {"center_mm": target.center_mm, "limits_mm": list(target.limits_mm)}
        case ScaledMillimeters():
            arguments = {"range_mm": list(target.range_mm), "limits_mm": list(target.limits_mm)}
        case Ordinal():
            edges = list(target.edges)
            arguments = {"thresholds_mm": edges[1:-1], "limits_mm": [edges[0], edges[-1]]}
        case Classes():
            arguments = {
                "thresholds_mm": list(target.thresholds_mm),
                "typical_mm": list(target.typical_mm),
            }
        case _:
            raise ValueError(f"no description for a target of class {type(target).__name__}")
    return {"name": type(target).__name__, "arguments": arguments}


def build_target(description: Mapping[str, Any]) -> SizeTarget:
    """Build a target from `describe_target`."""
    targets: dict[str, Any] = {
        kind.__name__: kind for kind in (LogSize, ScaledMillimeters, Ordinal, Classes)
    }
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["arguments"].items()
    }
    return targets[description["name"]](**arguments)


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()
