"""``gates endoscopy predict``: sizes of the polyps on frames, videos and DICOM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from apps.endoscopy.predict.outputs import Options, Outputs, fingerprint
from apps.endoscopy.weights import NamedBundle, find_bundle, find_segmenter
from core_gates.errors import GatesError
from endoscopy.bundles.contents import SizingBundle
from endoscopy.bundles.scope import source_scope
from endoscopy.export.dicom_report import require_reportable, write_dicom_report
from endoscopy.inference.prediction import Objects, Prediction, objects_of
from endoscopy.inference.prediction import predict as predict_sizes
from endoscopy.inputs.annotations import annotated_locations
from endoscopy.inputs.frame import InputReport
from endoscopy.inputs.kind import frames, source_kind
from endoscopy.inputs.locations import Locator
from endoscopy.metrics.aggregation import Level
from endoscopy.segmentation.segmenter import AutomaticLocations
from harness.command.verbs import Place, refuse_existing
from harness.runs.ticker import counting

Device = Literal["auto", "cpu", "cuda"]


def predict(
    place: Place,
    sources: list[str],
    boxes: str | None = None,
    masks: str | None = None,
    weights: str | None = None,
    segmenter: str | None = None,
    scope: str | None = None,
    objects: Objects = "auto",
    level: Level = "median",
    output: str | None = None,
    overlays: int = 0,
    strips: int = 0,
    dicom_report: str | None = None,
    batch_size: int = 32,
    max_unreadable: float = 0.01,
    device: Device = "auto",
    resume: bool = False,
    overwrite_output: bool = False,
) -> None:
    """Size the polyps on SOURCES: folders or zip archives of images, images, videos, DICOM.

    Without boxes and masks a small segmenter finds the polyps, and all that it finds is marked
    automatic. Sizes are in millimeters only for a scope that the model card names, otherwise a
    size index. Research only.

    Args:
        place: Filled in by the command line.
        sources: Filled in by the command line.
        boxes: Boxes of polyps: CSV file (frame, xmin, xmax, ymin, ymax) or Pascal VOC folder.
        masks: Folder of PNG masks, or of Pascal VOC files, with the outlines of the polyps.
        weights: Folder of weights; by default those of the run, else the shipped ones.
        segmenter: Weights of another segmenter than the shipped one.
        scope: What the sources are, if their millimeters are calibrated, such as ``real_colon``.
        objects: Whether an unnamed polyp is another one on each ``frame``, the same on all frames
            of a ``source``, or ``auto``: the same in videos and DICOM only.
        level: How the sizes of frames give that of a polyp.
        output: Folder with a subfolder for each source; that of the run by default.
        overlays: Maximum number of frames drawn with boxes, sizes and a saliency map.
        strips: Maximum number of polyps whose frames and sizes are drawn.
        dicom_report: DICOM structured report to write; the only output with patient tags.
        batch_size: Polyps that the network sizes at a time.
        max_unreadable: Fraction of frames that may be unreadable.
        device: Where the network computes.
        resume: Keep what is complete and continue with the rest.
        overwrite_output: Replace outputs that exist.
    """
    _check_counts(batch_size, overlays, strips)
    found = find_bundle(place, weights)
    found.bundle.model.to(_device(device))
    locate, named = _locations(boxes, masks, segmenter), _names(sources, max_unreadable)
    _check_report(dicom_report, sources, scope, found.bundle, overwrite_output or resume)
    options = Options(scope, objects, level, overlays, strips)
    job = Job(found, locate, options, batch_size, max_unreadable, dicom_report, resume)
    root = Path(output or place.run_folder.path / "predictions")
    planned = job.outputs(root, named, (boxes, masks, segmenter))
    wanted = _missing(planned, resume=resume, overwrite=overwrite_output)
    print(f"weights: {found.name}")
    for source, outputs in wanted.items():
        job.run(source, outputs)


class Job(NamedTuple):
    """The work on each source; see the options of :func:`predict`."""

    found: NamedBundle
    locate: Callable[[], Locator]
    options: Options
    batch_size: int
    max_unreadable: float
    dicom_report: str | None
    resume: bool

    def outputs(
        self, root: Path, named: dict[str, str], locations: tuple[str | None, ...]
    ) -> dict[str, Outputs]:
        """Return the outputs of each source.

        Args:
            root: Their folder.
            named: Names of outputs and their sources.
            locations: Files that locate the polyps, and the segmenter.
        """
        bundle, options = self.found.bundle, self.options
        return {
            source: Outputs(root / name, fingerprint(bundle, source, locations, options))
            for name, source in named.items()
        }

    def run(self, source: str, outputs: Outputs) -> None:
        """Predict one source and write everything that was asked for."""
        bundle, options = self.found.bundle, self.options
        prediction = outputs.kept() if self.resume else None
        new = prediction is None
        if prediction is None:
            prediction = self._predicted(source)
        table = objects_of(prediction, bundle, options.level)
        if new:
            outputs.write_tables(prediction, table, self.found)
        outputs.tell(prediction, table, bundle)
        if options.overlays:
            outputs.write_overlays(prediction, source, self.locate(), bundle, options.overlays)
        if options.strips:
            outputs.write_strips(prediction, source, table, bundle, options.strips)
        if self.dicom_report is not None:
            path = Path(self.dicom_report)
            print(write_dicom_report(path, source, prediction, table, bundle.scope))
        print(outputs.finish())

    def _predicted(self, source: str) -> Prediction:
        with counting("sizing frames") as count:
            return predict_sizes(
                source,
                self.locate(),
                self.found.bundle,
                scope=self.options.scope,
                objects=self.options.objects,
                batch_size=self.batch_size,
                max_unreadable=self.max_unreadable,
                progress=count,
            )


def _missing(wanted: dict[str, Outputs], *, resume: bool, overwrite: bool) -> dict[str, Outputs]:
    """Return the outputs that are still to be made.

    Raises:
        GatesError: One exists and may be neither kept nor replaced.
    """
    if resume and overwrite:
        raise GatesError("--resume and --overwrite_output exclude each other: give one of them")
    missing = {}
    for source, outputs in wanted.items():
        if resume and outputs.is_complete():
            print(f"{outputs.folder}: complete already")
            continue
        refuse_existing(outputs.folder, overwrite=overwrite)
        missing[source] = outputs
    return missing


def _check_counts(batch_size: int, overlays: int, strips: int) -> None:
    numbers = (("batch_size", batch_size, 1), ("overlays", overlays, 0), ("strips", strips, 0))
    for name, number, least in numbers:
        if number < least:
            raise GatesError(f"--{name} must be at least {least}, found {number}")


def _locations(
    boxes: str | None, masks: str | None, segmenter: str | None
) -> Callable[[], Locator]:
    """Return a factory of locators, after checking that they are readable."""
    if annotated_locations(boxes, masks) is None:
        network = find_segmenter(segmenter)
        return lambda: AutomaticLocations(network)
    if segmenter is not None:
        raise GatesError("--segmenter is not used with --boxes or --masks: drop one of them")

    def locate() -> Locator:
        locator = annotated_locations(boxes, masks)
        assert locator is not None
        return locator

    return locate


def _names(sources: list[str], max_unreadable: float) -> dict[str, str]:
    """Return the names of the sources, UIDs for DICOM.

    Raises:
        GatesError: A source cannot be read, or two share a name.
    """
    named: dict[str, str] = {}
    for source in sources:
        report = InputReport()
        next(iter(frames(source, report, max_unreadable=max_unreadable)), None)
        if report.source in named:
            raise GatesError(
                f"{named[report.source]} and {source} have the same name {report.source}: predict "
                "them into different folders with --output"
            )
        named[report.source] = source
    return named


def _check_report(
    path: str | None, sources: list[str], scope: str | None, bundle: SizingBundle, replace: bool
) -> None:
    if path is None:
        return
    if len(sources) != 1:
        raise GatesError(f"--dicom_report needs exactly one source, found {len(sources)}: give one")
    source = sources[0]
    require_reportable(source, source_kind(source), source_scope(source, scope), bundle.scope)
    if Path(path).exists() and not replace:
        raise GatesError(f"{path} exists: choose another --dicom_report or add --overwrite_output")


def _device(name: Device) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise GatesError("--device cuda: PyTorch finds no GPU here: take auto or cpu")
    return torch.device(name)
