"""The network as an assimilation method, physical fields in and out, and how it is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core_gates.errors import GatesError
from harness.files import replacing
from weather.grid import EARTH_RADIUS_KM, Grid
from weather.models.adas.network import Adas
from weather.observations.gridded import GriddedObservations, confidence, innovation_sd
from weather.state import Normalizer

BackgroundError = Literal["training", "innovation"]

_WITHOUT_EFFECT = ("drop_path", "recompute")  # arguments that do not change what weights mean


class AdasAnalysis(nn.Module):
    """Wrap `Adas` with its units, so that it can replace OI or the LETKF in a cycle.

    With ``network.output == "increment"`` the observation stream is the innovation in units of
    the background error, ``m (y - x_b) / sigma_b``, and the analysis ``x_b + sigma_b net(...)``.
    Otherwise it is the normalised observation, zero where there is none, and the network returns
    the normalised analysis itself (FengWu-Adas, the official form).

    Args:
        network: The assimilation network.
        normalizer: Mean and standard deviation of every channel.
        background_sd: (C,) standard deviation of the background error in the training period.
        confidence_kind: ``"binary"`` (availability) or ``"error"`` (availability and quality).
        confidence_scale: Fraction of the background error by which quality is measured. Where
            observations are far better than the background, a fraction near the observation
            error keeps their confidences distinct, which otherwise are all near 1.
        background_error: ``"training"``, that of the training period, or ``"innovation"``, which
            every analysis estimates from its own innovations: one network then serves dense and
            sparse observations, whose cycles differ in their errors by orders of magnitude.
        guided: The network also sees the increment of an interpolation at every point, in units of
            the background error: it has twice as many surface and upper-air variables, of whose
            output the first half counts. Only for the increment form.

    Raises:
        ValueError: The scale is not positive, the background error is of another kind, or a guided
            network is not of the increment form.
    """

    members = 1

    def __init__(
        self,
        network: Adas,
        normalizer: Normalizer,
        background_sd: Tensor,
        *,
        confidence_kind: str = "error",
        confidence_scale: float = 1.0,
        background_error: BackgroundError = "training",
        guided: bool = False,
    ) -> None:
        super().__init__()
        if not confidence_scale > 0:
            raise ValueError(f"confidence_scale must be positive, got {confidence_scale}")
        if background_error not in ("training", "innovation"):
            raise ValueError(
                f"background_error must be 'training' or 'innovation', got {background_error!r}"
            )
        if guided and network.output != "increment":
            raise ValueError(f"a guided network returns an increment, not {network.output!r}")
        self.network, self.normalizer, self.guided = network, normalizer, guided
        self.confidence_kind, self.confidence_scale = confidence_kind, confidence_scale
        self.background_error: BackgroundError = background_error
        self.register_buffer("background_sd", background_sd.clone())
        self.background_sd: Tensor

    def forward(
        self,
        background: Tensor,
        observations: GriddedObservations,
        background_sd: Tensor | None = None,
        interpolated: Tensor | None = None,
    ) -> Tensor:
        """Return the analysis, computed in the dtype of the background.

        A problem in which nothing is observed keeps its background to the last bit.

        Args:
            background: (B,C,H,W), physical units.
            observations: Fields (B,C,H,W) in the same units.
            background_sd: (B,C) or (C,) expected background error of every problem; that of the
                training period if None. The first guess where the innovations decide.
            interpolated: (B,C,H,W) analysis of interpolation, which a guided network needs.

        Returns:
            (B,C,H,W), physical units.

        Raises:
            ValueError: A guided network is given no interpolation.
        """
        if self.guided and interpolated is None:
            raise ValueError("a guided network needs the analysis of interpolation: give it")
        observations = observations.to(background.device).to(background.dtype)
        sd = self.background_sd if background_sd is None else background_sd
        if self.background_error == "innovation":
            sd = innovation_sd(background, observations, sd)
        sd = sd.to(background)[..., None, None].expand_as(background)
        guide = None if interpolated is None else (interpolated - background) / sd
        analysis = self._analysis(background, observations, sd, guide if self.guided else None)
        seen = observations.mask.flatten(1).any(1)
        return torch.where(seen[:, None, None, None], analysis, background)

    def _analysis(
        self,
        background: Tensor,
        observations: GriddedObservations,
        sd: Tensor,
        guide: Tensor | None = None,
    ) -> Tensor:
        """Return the analysis (B,C,H,W) for background errors and a guide of the same shape."""
        gate = confidence(observations, self.confidence_scale * sd, kind=self.confidence_kind)
        state = self.normalizer.normalize(background)
        if self.network.output == "increment":
            innovation = torch.where(observations.mask, observations.values - background, 0) / sd
            if guide is not None:
                fields = ((state, guide), (innovation, guide), (gate, torch.ones_like(gate)))
                increment = self._own(self.network(*(self._doubled(*pair) for pair in fields)))
            else:
                increment = self.network(state, innovation, gate)
            return background + sd * increment
        values = self.normalizer.normalize(observations.values)
        values = torch.where(observations.mask, values, 0)
        analysis: Tensor = self.network(state, values, gate)
        if self.network.increment_mode:  # a zero increment must not pass through the units
            std = self.normalizer.std.to(background)[:, None, None]
            return background + std * (analysis - state)
        return self.normalizer.denormalize(analysis)

    def _doubled(self, field: Tensor, guide: Tensor) -> Tensor:
        """Return fields (B,2C,H,W), surface variables first, as a guided network takes them."""
        surface = self.network.arguments["num_surface"] // 2
        parts = [part[:, place] for place in (slice(surface), slice(surface, None))
                 for part in (field, guide)]  # fmt: skip
        return torch.cat(parts, 1)

    def _own(self, doubled: Tensor) -> Tensor:
        """Return the first half (B,C,H,W) of surface and of upper-air variables."""
        surface = self.network.arguments["num_surface"] // 2
        upper = doubled.shape[1] // 2 - surface
        return torch.cat((doubled[:, :surface], doubled[:, 2 * surface :][:, :upper]), 1)

    def expecting(self, background_sd: Tensor | None = None, grid: Grid | None = None) -> Expecting:
        """Return this network as a method with another background error (C,), or tapered."""
        return Expecting(self, background_sd, grid)

    def analyze(
        self,
        background: Tensor,
        observations: GriddedObservations,
        background_sd: Tensor | None = None,
        interpolated: Tensor | None = None,
    ) -> Tensor:
        """Assimilator protocol: ``background`` (B,1,C,H,W) to the analysis of the same shape."""
        guess = None if interpolated is None else interpolated.squeeze(1)
        with torch.inference_mode():  # a tenth of the time of thousands of small operations
            analysis = self.forward(background.squeeze(1), observations, background_sd, guess)
        return analysis.unsqueeze(1).clone()  # an ordinary tensor again


class Expecting:
    """A network as a method that expects another background error, and whose increment may end.

    Args:
        network: The network, whose weights and units it uses.
        background_sd: (C,) standard deviation of the background error; its own if None.
        grid: Of the fields; the increment is multiplied by the `nearness` of the reports. The
            whole increment if None.
    """

    members = 1

    def __init__(
        self, network: AdasAnalysis, background_sd: Tensor | None, grid: Grid | None = None
    ) -> None:
        self.network, self.background_sd, self.grid = network, background_sd, grid
        self.normalizer, self.guided = network.normalizer, network.guided

    def analyze(
        self,
        background: Tensor,
        observations: GriddedObservations,
        interpolated: Tensor | None = None,
    ) -> Tensor:
        """Return the analysis (B,1,C,H,W) of a background of that shape."""
        analyzed = self.network.analyze(background, observations, self.background_sd, interpolated)
        if self.grid is None:
            return analyzed
        near = nearness(observations.mask, self.grid).to(background)[:, None, None]
        return torch.where(near < 1, background + near * (analyzed - background), analyzed)


Network = AdasAnalysis | Expecting
REACH_KM = 5000.0


def nearness(mask: Tensor, grid: Grid) -> Tensor:
    """Return how far (B,H,W) reports count: 1 within 2,500 km of one, 0 from 5,000 km on.

    In between it falls as half a wave of the cosine. Farther than reports tell of it, an increment
    is what the network has learned of backgrounds alone.

    Args:
        mask: (B,C,H,W), True where there is a report.
        grid: Of the fields.
    """
    from scipy.spatial import KDTree  # only networks wait for it

    latitude, longitude = grid.latitude.deg2rad()[:, None], grid.longitude.deg2rad()
    around = latitude.cos() * torch.stack([longitude.cos(), longitude.sin()])[:, None]
    points = torch.cat([around, latitude.sin().expand(grid.shape)[None]]).flatten(1).T.numpy()
    near = torch.zeros(len(mask), len(points), dtype=torch.float64)
    for row, seen in enumerate(mask.any(1).flatten(1).numpy()):
        if seen.any():
            chord, _ = KDTree(points[seen]).query(points)
            km = 2 * EARTH_RADIUS_KM * torch.from_numpy(chord / 2).clamp(max=1).asin()
            near[row] = (1 + (torch.pi * (2 * km / REACH_KM - 1).clamp(0, 1)).cos()) / 2
    return near.unflatten(1, grid.shape)


def save_weights(path: str | Path, analysis: AdasAnalysis, **facts: object) -> None:
    """Write the weights as bfloat16 and the units as float32, atomically, with JSON ``facts``.

    What shapes do not tell, such as the form of the network, is written, too.
    """
    path = Path(path)
    tensors = {
        name: (value.bfloat16() if name.startswith("network.") else value.float()).contiguous()
        for name, value in analysis.state_dict().items()
    }
    # One entry gives the same bytes every time: safetensors writes several in random order.
    metadata = {"form": json.dumps(_form(analysis), sort_keys=True)}
    if facts:
        metadata["facts"] = json.dumps(facts, sort_keys=True)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def read_header(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return what a file of `save_weights` records: its ``facts`` and its ``form``.

    Raises:
        GatesError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return {key: dict(json.loads(metadata.get(key, "{}"))) for key in ("facts", "form")}
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise GatesError(
            f"{path}: not readable as safetensors weights ({error}); give a file written by a "
            "training, or train again"
        ) from error


def load_weights(path: str | Path, analysis: AdasAnalysis, **facts: object) -> dict[str, object]:
    """Read weights written by `save_weights` into ``analysis`` and return their facts.

    Args:
        path: The file.
        analysis: Takes the weights.
        **facts: What the file must record, such as ``form`` and ``seed``.

    Raises:
        GatesError: The file is missing or damaged, belongs to another configuration, or
            records another fact.
    """
    header = read_header(path)
    said, form = header["facts"], header["form"]
    tensors = load_file(path)
    for name, value in facts.items():
        if said.get(name, value) != value:
            raise GatesError(
                f"{path}: weights of {name} {said[name]}, expected {value}; give the file of that "
                f"{name}, or train again"
            )
    _require_same_form(path, form, _form(analysis))
    take_weights(path, tensors, analysis)
    return said


def take_weights(path: str | Path, tensors: Mapping[str, object], analysis: AdasAnalysis) -> None:
    """Put the tensors of a file into ``analysis``.

    Raises:
        GatesError: They belong to another configuration or are not finite.
    """
    expected = analysis.state_dict()
    stored = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    wrong = sorted(set(expected) ^ set(stored)) or [
        name for name, value in expected.items() if value.shape != stored[name].shape
    ]
    if wrong:
        raise GatesError(
            f"{path}: weights of another configuration ({len(wrong)} tensors differ, first "
            f"{wrong[0]}); give the configuration that they were trained with"
        )
    damaged = sorted(name for name, value in stored.items() if not value.isfinite().all())
    if damaged:
        raise GatesError(
            f"{path}: {len(damaged)} tensors are not finite, first {damaged[0]}; give the weights "
            "of another training run, or train again"
        )
    analysis.load_state_dict(
        {name: stored[name].to(value.dtype) for name, value in expected.items()}
    )


def _form(analysis: AdasAnalysis) -> dict[str, object]:
    """Return what the analysis depends on besides its weights, as JSON would give it back."""
    form = {
        name: value
        for name, value in analysis.network.arguments.items()
        if name not in _WITHOUT_EFFECT
    }
    form["confidence_kind"] = analysis.confidence_kind
    form["confidence_scale"] = analysis.confidence_scale
    form["background_error"] = analysis.background_error
    form["guided"] = analysis.guided
    return dict(json.loads(json.dumps(form)))


def _require_same_form(
    path: str | Path, stored: dict[str, object], expected: dict[str, object]
) -> None:
    different = [
        name for name in sorted(stored) if stored[name] != expected.get(name, stored[name])
    ]
    if "grid_shape" in different:
        grids = (str(form["grid_shape"]) for form in (stored, expected))
        raise GatesError(
            "{}: weights of another grid ({} points, expected {}); give weights trained on the "
            "grid of this configuration, or the configuration of these weights".format(path, *grids)
        )
    for name in different:
        if name in expected:
            raise GatesError(
                f"{path}: weights of another configuration ({name} is {stored[name]}, expected "
                f"{expected[name]}); give the configuration that they were trained with"
            )


OWN = ("confidence_kind", "confidence_scale", "background_error", "guided")


class AnalysisForm:
    """Keeps an analysis as ``weights.safetensors``, see `.analysis.save_weights`."""

    FILE = "weights.safetensors"

    def save(self, folder: Path, result: AdasAnalysis) -> None:
        """Write the weights as bfloat16, with what the network is."""
        save_weights(folder / self.FILE, result)

    def load(self, folder: Path) -> AdasAnalysis:
        """Return the network in evaluation mode, see `read_analysis`."""
        return read_analysis(folder / self.FILE)


def read_analysis(path: Path) -> AdasAnalysis:
    """Return the network of a file of `save_weights`, in evaluation mode.

    Raises:
        GatesError: The file is missing or damaged.
    """
    arguments = read_header(path)["form"]
    options = {name: arguments.pop(name) for name in OWN if name in arguments}
    try:
        network = Adas(**arguments)
    except (TypeError, ValueError) as error:
        raise GatesError(
            f"{path}: a network that cannot be built ({error}); train again"
        ) from error
    channels = network.num_channels // (2 if options.get("guided") else 1)
    units = Normalizer(torch.zeros(channels), torch.ones(channels))
    analysis = AdasAnalysis(network, units, torch.ones(channels), **options)
    load_weights(path, analysis)
    return analysis.eval()
