"""``gates endoscopy export``: the folded network for other runtimes, with its model card."""

from pathlib import Path
from typing import Literal

from apps.endoscopy.training_runs import find_bundle
from core_gates.errors import GatesError
from endoscopy.bundles.sizing_bundle import model_card
from endoscopy.runtimes import CHECKED, export_onnx, export_program, exportable, save_program
from harness.command.verbs import Place, refuse_existing
from harness.files.atomic import replacing, write_json, write_text

Format = Literal["onnx", "torch"]
FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}


def export(
    place: Place,
    weights: str | None = None,
    output: str | None = None,
    formats: tuple[Format, ...] = ("onnx", "torch"),
    overwrite_output: bool = False,
) -> None:
    """Write the folded network as ONNX and for torch.export, checked against PyTorch.

    The gates are folded into the neighboring weights, so that they cost nothing. The model
    card and a configuration with target, scope and normalization are written next to the networks.

    Args:
        place: Filled in by the command line.
        weights: Folder of weights; by default those of the run, else the shipped ones.
        output: Folder to write; that of the run by default.
        formats: ``onnx``, checked with onnxruntime, and ``torch``, a program of torch.export.
        overwrite_output: Replace a folder that exists.
    """
    if not formats:
        raise GatesError("--formats is empty: give onnx, torch or both")
    folder = place.run_folder.path / "exported" if output is None else Path(output)
    refuse_existing(folder, overwrite=overwrite_output)
    found = find_bundle(place, weights)
    print(f"weights: {found.name}")
    model, example, metadata = exportable(found.bundle)
    with replacing(folder) as partial:
        partial.mkdir()
        for name in dict.fromkeys(formats):
            path = partial / FILES[name]
            if name == "onnx":
                export_onnx(model, example, path, metadata)
            else:
                save_program(export_program(model, example), path)
            size, counts = path.stat().st_size / 1e6, ", ".join(map(str, CHECKED))
            print(f"{path.name}: {size:.2f} MB, agrees with PyTorch on {counts} frames")
        write_json(partial / "config.json", metadata)
        write_text(partial / "README.md", model_card(found.bundle.config()))
    print(folder)
