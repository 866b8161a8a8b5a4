"""A trained sizing network with all that its numbers need: target, limits, intervals, scope."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from core_gates.errors import GatesError
from endoscopy.bundles.model_card import model_card
from endoscopy.bundles.quality import QualityLimits
from endoscopy.bundles.scope import Scope
from endoscopy.data.provenance import Provenance
from endoscopy.evaluation.conformal import SplitConformal
from endoscopy.models.sizer import MultiStreamSizer
from endoscopy.training.targets import Classes, LogSize, Ordinal, ScaledMillimeters, SizeTarget

FORMAT = 2  # 2: statistics of abstention blind to black pixels
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass
class SizingBundle:
    """What is needed to predict, and to say what the prediction is worth.

    Attributes:
        model: The network, for evaluation.
        target: What it returns.
        image_size: Pixels of a side of the frames that it takes.
        scope: Where its millimeters mean something.
        masks: Whether it was trained with masks; else masks are the filled boxes.
        aperture: Of :func:`endoscopy.data.frames.streams.build_streams`.
        quality: Limits on the frames that a size is read from.
        conformal: Intervals of sizes of objects.
        facts: Anything that the model card should show, by name; plain values for JSON.
        training: What the network was trained with; None where nobody knows.
    """

    model: MultiStreamSizer
    target: SizeTarget
    image_size: int
    scope: Scope = field(default_factory=Scope)
    masks: bool = True
    aperture: float | None = None
    quality: QualityLimits | None = None
    conformal: SplitConformal | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    training: Provenance | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that the network reads."""
        return tuple(self.model.branches)

    def config(self) -> dict[str, Any]:
        """Return everything but the weights as plain values for JSON."""
        return {
            "format": FORMAT,
            "model": self.model.arguments,
            "target": describe_target(self.target),
            "image_size": self.image_size,
            "masks": self.masks,
            "aperture": self.aperture,
            "scope": {
                "trained_on": self.scope.trained_on,
                "calibrated_for": list(self.scope.calibrated_for),
                "reference_mm": self.scope.reference_mm,
            },
            "quality": None if self.quality is None else self.quality.state(),
            "conformal": None if self.conformal is None else self.conformal.state(),
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
        _write(folder / WEIGHTS, save(state))
        _write(folder / CARD, model_card(config).encode())
        _write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
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
    except Exception as error:  # JSON, safetensors and PyTorch each raise errors of their own
        line = (str(error).splitlines() or [""])[0]
        raise GatesError(
            f"{folder}: cannot be loaded: {type(error).__name__} {line}; copy it again"
        ) from error


def read_training(folder: str | Path) -> Provenance | None:
    """Return what a stored network was trained with; None if it does not say, or is damaged."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        return _training(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


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
    scope, quality, conformal = (config[name] for name in ("scope", "quality", "conformal"))
    return SizingBundle(
        model,
        build_target(config["target"]),
        config["image_size"],
        Scope(scope["trained_on"], tuple(scope["calibrated_for"]), scope["reference_mm"]),
        config["masks"],
        config["aperture"],
        None if quality is None else QualityLimits.from_state(quality),
        None if conformal is None else SplitConformal.from_state(conformal),
        config["facts"],
        _training(config),
    )


def _training(config: Mapping[str, Any]) -> Provenance | None:
    state = config.get("training")  # absent from weights of earlier versions
    return None if state is None else Provenance.from_state(state)


def _stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
