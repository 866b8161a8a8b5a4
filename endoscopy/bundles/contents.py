"""A trained sizing network with all that its numbers need: target, limits, intervals, scope."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from core_gates.errors import GatesError
from endoscopy.bundles.model_card import model_card
from endoscopy.bundles.quality import QualityLimits
from endoscopy.bundles.scope import Scope
from endoscopy.data.frames.network_input import InputForm, Outline, network_input
from endoscopy.data.frames.transforms import Frame
from endoscopy.data.provenance import Provenance
from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.inputs.locations import Origin
from endoscopy.metrics.size_classes import CONTINUOUS, CutOffs
from endoscopy.models.sizer import MultiStreamSizer
from endoscopy.training.targets import Classes, LogSize, Ordinal, ScaledMillimeters, SizeTarget
from harness.files.atomic import write_bytes, write_text

FORMAT = 3  # 3: intervals by location, and the outline
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass
class SizingBundle:
    """What is needed to predict, and to state how good the prediction is.

    Attributes:
        model: The network, for evaluation.
        target: What it returns.
        image_size: Side length in pixels of the frames that it takes.
        scope: Where its millimeters mean something.
        outline: Where the outline of lesions came from in training.
        aperture: Of :func:`endoscopy.data.frames.streams.build_streams`.
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

    @torch.no_grad()
    def raw(self, frames: Sequence[Frame]) -> torch.Tensor:
        """Return the raw outputs (B, outputs) for frames of any size, on the CPU."""
        device = next(self.model.parameters()).device
        inputs = network_input(frames, self.form)
        streams = {name: value.to(device) for name, value in inputs.streams.items()}
        outputs: torch.Tensor = self.model(streams, inputs.geometry.to(device))
        return outputs.cpu()

    @property
    def form(self) -> InputForm:
        """What the network is fed."""
        return InputForm(self.streams, self.image_size, self.aperture, self.outline)

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
            "intervals": {name: one.state() for name, one in self.intervals.items()},
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
    """Read what :meth:`SizingBundle.save` wrote, for evaluation.

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
        return _assembled(model.eval(), config)
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
            thresholds, typical = list(target.thresholds_mm), list(target.typical_mm)
            arguments = {"thresholds_mm": thresholds, "typical_mm": typical}
        case _:
            raise ValueError(f"no description for a target of class {type(target).__name__}")
    return {"name": type(target).__name__, "arguments": arguments}


def build_target(description: Mapping[str, Any]) -> SizeTarget:
    """Build a target from :func:`describe_target`."""
    known: dict[str, Any] = {
        kind.__name__: kind for kind in (LogSize, ScaledMillimeters, Ordinal, Classes)
    }
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["arguments"].items()
    }
    target: SizeTarget = known[description["name"]](**arguments)
    return target


def _assembled(model: MultiStreamSizer, config: dict[str, Any]) -> SizingBundle:
    scope, quality = config["scope"], config["quality"]
    return SizingBundle(
        model,
        build_target(config["target"]),
        config["image_size"],
        Scope(scope["trained_on"], tuple(scope["calibrated_for"]), scope["reference_mm"]),
        config["outline"],
        config["aperture"],
        None if quality is None else QualityLimits.from_state(quality),
        {name: SplitConformal.from_state(one) for name, one in config["intervals"].items()},
        CutOffs(*config["cut_offs_mm"]),
        config["facts"],
        _training(config),
    )


def _training(config: Mapping[str, Any]) -> Provenance | None:
    state = config.get("training")  # absent from weights of earlier versions
    return None if state is None else Provenance.from_state(state)


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()
