"""``gates video export``: a trained network for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from apps.video.serving.model import place_of
from harness.command.verbs import Place, refuse_existing
from harness.runs.ticker import working
from recsys.export.exporting import export_forms
from recsys.export.loading import SUFFIXES
from recsys.model_folder import load_model

Format = Literal["torch", "aoti", "onnx"]


def export(
    place: Place,
    model: str | None = None,
    formats: tuple[Format, ...] = ("torch", "onnx"),
    output: str | None = None,
    int8: bool = False,
    overwrite_output: bool = False,
) -> None:
    """Write a trained network for torch.export, AOTInductor or ONNX, checked against eager.

    Batch normalization is folded into the weights and the batch size is dynamic. Each file is read
    again and compared with the network on 1, 37 and 500 rows. Files that exist are replaced when
    all formats are complete.

    Args:
        place: Filled in by the command line.
        model: Model folder; that which `fit` left in the run if null.
        formats: What is written: ``torch``, ``aoti`` (a compiled package for this machine),
            ``onnx``.
        output: Folder that is written; the folder ``exported`` of the run if null.
        int8: Keep embedding tables as 8-bit integers with a scale per row.
        overwrite_output: Replace files that exist.
    """
    source = place_of(place, model)
    folder = Path(output) if output else place.run_folder.path / "exported"
    ranker = load_model(source).ranker
    paths = {one: folder / f"model{SUFFIXES[one]}" for one in formats}
    for path in paths.values():
        refuse_existing(path, overwrite=overwrite_output)
    with working(f"exporting and checking {', '.join(formats)}"):
        forms = export_forms(ranker, paths, int8=int8)
    for made in forms:
        print(made.path)
