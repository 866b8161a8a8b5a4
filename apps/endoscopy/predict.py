"""``gates endoscopy predict``: sizes of the polyps on frames, videos and DICOM.

One folder a source, complete or absent.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from apps.endoscopy.training_runs import NamedBundle, find_bundle, find_segmenter
from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import SizingBundle, source_scope
from endoscopy.data.frame_table import BOX
from endoscopy.data.readers.tabular import ReadReport
from endoscopy.dicom_report import require_reportable, write_dicom_report
from endoscopy.explain.strips import annotated_frames, strip_figure, tracks_of
from endoscopy.inputs.frame_sources import frames, source_kind
from endoscopy.inputs.image_files import InputReport
from endoscopy.inputs.locations import Locator, annotated_locations
from endoscopy.metrics.size_errors import Level
from endoscopy.prediction import Objects, Prediction, objects_of
from endoscopy.prediction import predict as predict_sizes
from endoscopy.segmenter import AutomaticLocations
from harness.command.verbs import Place, refuse_existing
from harness.files.atomic import remove, write_bytes, write_json, write_text
from harness.runs.terminal import counting

FRAMES, OBJECTS, REPORT, RAW = "predictions", "objects", "report.json", ".raw.parquet"
SHOWN = 20  # polyps in the table on the screen
OF_FRAMES = ("censored", "frame_id", "frame_index", "left", "top", "sharpness", "width", "height")


class Options(NamedTuple):
    """What a prediction depends on besides its files; see the options of the verb."""

    scope: str | None
    objects: Objects
    level: Level
    overlays: int
    strips: int


class Outputs:
    """The folder of one source; it is built next to its destination and moved there when complete.

    Args:
        folder: Where it will be.
        mark: Of `fingerprint`; identifies the command of existing outputs.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.old = folder.with_name(f".{folder.name}.old")
        if self.old.exists() and not folder.exists():  # killed between the two renames of `finish`
            self.old.rename(folder)
        remove(self.old)

    def is_complete(self) -> bool:
        """Return whether the same command has already written the complete folder."""
        return self._mark_in(self.folder) == self.mark

    def kept(self) -> Prediction | None:
        """Return the existing predictions, None if there are none, or ``finish`` was killed."""
        if self._mark_in(self.partial) != self.mark or not (self.partial / RAW).is_file():
            return None
        report = json.loads((self.partial / REPORT).read_text(encoding="utf-8"))
        frames = report["frames"]
        read = InputReport(report["source"], report["kind"], frames["expected"], frames["read"])
        read.unreadable = [(key, reason) for key, reason in frames["unreadable"]]
        read.converted = Counter(frames["converted"])
        locations = ReadReport(report["locations"]["source"], report["locations"]["found"])
        for entry in report["locations"]["findings"]:
            locations.add(entry["action"], entry["reason"], entry["places"])
        return Prediction(pd.read_parquet(self.partial / RAW), report["scope"], read, locations)

    def write_tables(
        self, prediction: Prediction, objects: pd.DataFrame, weights: NamedBundle
    ) -> None:
        """Write the tables of frames and polyps, and last the report, which marks them complete."""
        remove(self.partial)
        scope = weights.bundle.scope
        objects = objects.drop(columns=[name for name in OF_FRAMES if name in objects])
        for name, table in (
            (FRAMES, prediction.frames),
            (OBJECTS, objects.drop(columns=list(BOX))),
        ):
            shown = scope.express(table, prediction.scope)
            write_text(self.partial / f"{name}.csv", shown.to_csv(index=False))
            write_bytes(self.partial / f"{name}.parquet", shown.to_parquet(index=False))
        write_bytes(self.partial / RAW, prediction.frames.to_parquet(index=False))
        write_json(self.partial / REPORT, self._report(prediction, objects, weights))

    def write_overlays(
        self,
        prediction: Prediction,
        source: str,
        locator: Locator,
        bundle: SizingBundle,
        most: int,
    ) -> None:
        """Write the missing frames."""
        folder = self.partial / "overlays"
        done = {path.stem for path in folder.glob("*.png")}
        kept = frozenset(key for key in prediction.frames["frame_id"] if file_name(key) in done)
        drawn = annotated_frames(prediction, source, locator, bundle, most=most, skip=kept)
        total = min(most, prediction.frames["frame_index"].nunique())
        with counting("drawing frames") as count:
            for number, (key, image) in enumerate(drawn, len(done) + 1):
                content = io.BytesIO()
                Image.fromarray(image).save(content, "PNG")
                write_bytes(folder / f"{file_name(key)}.png", content.getvalue())
                count(number, total)

    def write_strips(
        self,
        prediction: Prediction,
        source: str,
        objects: pd.DataFrame,
        bundle: SizingBundle,
        most: int,
    ) -> None:
        """Write the missing strips."""
        with counting("drawing strips") as count:
            tracks = tracks_of(prediction, objects, bundle.scope, source, most=most)
            for number, track in enumerate(tracks, 1):
                path = self.partial / "strips" / f"{file_name(track.name)}.png"
                if not path.is_file():
                    content = io.BytesIO()
                    strip_figure(track).savefig(content, format="png", dpi=150)
                    write_bytes(path, content.getvalue())
                count(number, len(tracks))

    def print_summary(
        self, prediction: Prediction, objects: pd.DataFrame, bundle: SizingBundle
    ) -> None:
        """Print what was read, the sizes, and what abstains and why."""
        console, scope = Console(highlight=False), bundle.scope
        for line in (*prediction.input.lines(), *prediction.locations.lines()):
            console.print(escape(line), soft_wrap=True)
        for line in scope.lines(prediction.scope):
            console.print(f"[bold]{escape(line)}[/]", soft_wrap=True)
        table = Table(Column("polyp", overflow="fold"), "frames", "size", "location", "abstains")
        for _, row in objects.head(SHOWN).iterrows():
            bounds = (float(row.get(name, float("nan"))) for name in ("lower_mm", "upper_mm"))
            size = scope.text(float(row["predicted_mm"]), prediction.scope, *bounds)
            frames, reasons = str(int(row["num_frames"])), str(row["reasons"])
            cells = (str(row["unique_id"]), frames, size, str(row["location"]), reasons)
            table.add_row(*map(escape, cells))
        console.print(table)
        if len(objects) > SHOWN:
            console.print(f"and {len(objects) - SHOWN} more, see {OBJECTS}.csv")
        console.print(escape(abstentions(prediction, objects)), soft_wrap=True)

    def finish(self) -> Path:
        """Move the folder to its destination, replacing an existing one."""
        (self.partial / RAW).unlink(missing_ok=True)
        if self.folder.exists():
            self.folder.rename(self.old)
        self.partial.rename(self.folder)
        remove(self.old)
        return self.folder

    def _mark_in(self, folder: Path) -> str | None:
        try:
            content = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content.get("fingerprint") if isinstance(content, dict) else None

    def _report(
        self, prediction: Prediction, objects: pd.DataFrame, weights: NamedBundle
    ) -> dict[str, Any]:
        read = prediction.input
        locations = prediction.locations.to_dict()
        origin = str(prediction.frames["location"].iloc[0])
        return {
            "source": read.source,
            "kind": read.kind,
            "scope": prediction.scope,
            "weights": weights.name,
            "notes": weights.bundle.scope.lines(prediction.scope),
            "frames": {
                "read": read.read,
                "expected": read.expected,
                "unreadable": read.unreadable,
                "converted": dict(read.converted),
            },
            "locations": locations | {"source": origin},
            "abstentions": {
                "frames": reasons_of(prediction.frames["reasons"]),
                "objects": int(objects["abstained"].sum()),
            },
            "objects": len(objects),
            "fingerprint": self.mark,
        }


def fingerprint(
    bundle: SizingBundle, source: str, locations: tuple[str | None, ...], options: Options
) -> str:
    """Return a hash of what determines the outputs: weights, files and options."""
    digest = hashlib.sha256(json.dumps(bundle.config(), sort_keys=True).encode())
    for name, value in bundle.model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    for path in (source, *locations):
        digest.update(json.dumps(_stamps(path)).encode())
    digest.update(json.dumps(options).encode())
    return digest.hexdigest()


def abstentions(prediction: Prediction, objects: pd.DataFrame) -> str:
    """Return one line: how many frames and polyps abstain, and why."""
    reasons = prediction.frames["reasons"]
    flagged, polyps = int((reasons != "").sum()), int(objects["abstained"].sum())
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons_of(reasons).items())
    line = f"abstained: {flagged} of {len(reasons)} frames, {polyps} of {len(objects)} polyps"
    return f"{line} ({counts})" if counts else line


def reasons_of(reasons: pd.Series) -> dict[str, int]:
    """Count the reasons, the most frequent first."""
    single = Counter(reason for text in reasons if text for reason in text.split("; "))
    return dict(single.most_common())


def file_name(key: str) -> str:
    """Return a key as a name of a file, another one for every key of a source."""
    return key.replace("%", "%25").replace("/", "%2F")


def _stamps(path: str | None) -> list[tuple[str, int, int]]:
    """Return names, sizes and modification times of a file, or of the files of a folder."""
    if path is None:
        return []
    place = Path(path)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


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
        sources: Folders, zip archives, images, videos or DICOM files with polyps.
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
    named_bundle = find_bundle(place, weights)
    named_bundle.bundle.model.to(_device(device))
    locate, named = _locations(boxes, masks, segmenter), _names(sources, max_unreadable)
    _check_report(dicom_report, sources, scope, named_bundle.bundle, overwrite_output or resume)
    options = Options(scope, objects, level, overlays, strips)
    job = Job(named_bundle, locate, options, batch_size, max_unreadable, dicom_report, resume)
    root = Path(output or place.run_folder.path / "predictions")
    planned = job.outputs(root, named, (boxes, masks, segmenter))
    wanted = _missing(planned, resume=resume, overwrite=overwrite_output)
    print(f"weights: {named_bundle.name}")
    for source, outputs in wanted.items():
        job.run(source, outputs)


class Job(NamedTuple):
    """The work on each source; see the options of `predict`."""

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
        kept = prediction is not None
        if prediction is None:
            with counting("sizing frames") as count:
                prediction = predict_sizes(
                    source,
                    self.locate(),
                    bundle,
                    scope=options.scope,
                    objects=options.objects,
                    batch_size=self.batch_size,
                    max_unreadable=self.max_unreadable,
                    progress=count,
                )
        table = objects_of(prediction, bundle, options.level)
        if not kept:
            outputs.write_tables(prediction, table, self.found)
        outputs.print_summary(prediction, table, bundle)
        if options.overlays:
            outputs.write_overlays(prediction, source, self.locate(), bundle, options.overlays)
        if options.strips:
            outputs.write_strips(prediction, source, table, bundle, options.strips)
        if self.dicom_report is not None:
            path = Path(self.dicom_report)
            print(write_dicom_report(path, source, prediction, table, bundle.scope))
        print(outputs.finish())


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
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("overlays", overlays, 0),
        ("strips", strips, 0),
    ):
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
    """Return the names of the sources, UIDs for DICOM, with endings where only these differ.

    Raises:
        GatesError: A source cannot be read, or two share a name.
    """
    reports = [InputReport() for _ in sources]
    for source, report in zip(sources, reports, strict=True):
        next(iter(frames(source, report, max_unreadable=max_unreadable)), None)
    count = Counter(report.source for report in reports)
    named: dict[str, str] = {}
    for source, report in zip(sources, reports, strict=True):
        unique = count[report.source] == 1 or report.kind == "dicom"
        if (name := report.source if unique else Path(source).name) in named:
            raise GatesError(
                f"{named[name]} and {source} have the same name {name}: predict them into "
                "different folders with --output"
            )
        named[name] = source
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
