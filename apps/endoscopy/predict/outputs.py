"""What ``gates endoscopy predict`` writes for a source: one folder, complete or absent."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from apps.endoscopy.weights import NamedBundle
from endoscopy.bundles.contents import SizingBundle
from endoscopy.data.readers.report import ReadReport
from endoscopy.explain.annotated import annotated_frames
from endoscopy.explain.strip import strip_figure
from endoscopy.explain.tracks import tracks_of
from endoscopy.inference.prediction import Objects, Prediction
from endoscopy.inputs.frame import InputReport
from endoscopy.inputs.locations import Locator
from endoscopy.metrics.aggregation import Level
from harness.files.atomic import write_bytes, write_json, write_text
from harness.runs.ticker import counting

FRAMES, OBJECTS, REPORT, RAW = "predictions", "objects", "report.json", ".raw.parquet"
SHOWN = 20  # polyps in the table on the screen
OF_FRAMES = ("censored", "frame_id", "frame_index", "left", "top", "sharpness", "width", "height")
CORNERS = ("bbox_xmin", "bbox_xmax", "bbox_ymin", "bbox_ymax")


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
        mark: Of :func:`fingerprint`; identifies the command of existing outputs.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.mark = folder, mark
        self.partial = folder.with_name(f".{folder.name}.partial")

    def is_complete(self) -> bool:
        """Return whether the same command has already written the complete folder."""
        return self._mark_in(self.folder) == self.mark

    def kept(self) -> Prediction | None:
        """Return the existing predictions, None if there are none."""
        if self._mark_in(self.partial) != self.mark:
            return None
        report = json.loads((self.partial / REPORT).read_text(encoding="utf-8"))
        found = report["frames"]
        read = InputReport(report["source"], report["kind"], found["expected"], found["read"])
        read.unreadable = [(key, reason) for key, reason in found["unreadable"]]
        read.converted = Counter(found["converted"])
        locations = ReadReport(report["locations"]["source"], report["locations"]["found"])
        for entry in report["locations"]["findings"]:
            locations.add(entry["action"], entry["reason"], entry["places"])
        return Prediction(pd.read_parquet(self.partial / RAW), report["scope"], read, locations)

    def write_tables(
        self, prediction: Prediction, objects: pd.DataFrame, weights: NamedBundle
    ) -> None:
        """Write the tables of frames and polyps, and last the report, which marks them complete."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        scope = weights.bundle.scope
        objects = objects.drop(columns=[name for name in OF_FRAMES if name in objects])
        for name, table in (
            (FRAMES, prediction.frames),
            (OBJECTS, objects.drop(columns=list(CORNERS))),
        ):
            shown = scope.express(table, prediction.scope)
            write_text(self.partial / f"{name}.csv", shown.to_csv(index=False))
            write_parquet(self.partial / f"{name}.parquet", shown)
        write_parquet(self.partial / RAW, prediction.frames)
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
        keys = {key for key in prediction.frames["frame_id"] if file_name(key) in done}
        drawn = annotated_frames(
            prediction, source, locator, bundle, most=most, skip=frozenset(keys)
        )
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

    def tell(self, prediction: Prediction, objects: pd.DataFrame, bundle: SizingBundle) -> None:
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
            old = self.folder.with_name(f".{self.folder.name}.old")
            self.folder.rename(old)
            self.partial.rename(self.folder)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.folder)
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
    single = (reason for text in reasons if text for reason in text.split("; "))
    return dict(Counter(single).most_common())


def file_name(key: str) -> str:
    """Return a key as a name of a file."""
    return key.replace("/", "__").replace("#", "_")


def write_parquet(path: Path, table: pd.DataFrame) -> Path:
    """Write a table as Parquet, atomically."""
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    return write_bytes(path, content.getvalue())


def _stamps(path: str | None) -> list[tuple[str, int, int]]:
    """Return names, sizes and modification times of a file, or of the files of a folder."""
    if path is None:
        return []
    place = Path(path)
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    stats = ((file, file.stat()) for file in files)
    return [(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
