"""``gates diffusion index``: a folder of adapters, so that prompts find them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError
from diffusion.library import LoraLibrary, Refused, ScanReport
from harness.runs.ticker import counting

if TYPE_CHECKING:
    from diffusion.retrieval.encoder_folder import TrainedEncoder

SHOWN = 20  # files of a table
NO_ENCODER = "no --encoder is given: adapters are found by their metadata alone"


def index(
    folder: str,
    encoder: str | None = None,
    no_encode: bool = False,
    index: str | None = None,
    lenient: bool = False,
    every_file: bool = False,
) -> None:
    """Index the adapters in FOLDER and below; files that are unchanged are not read again.

    The command may be killed and called again, also while another one runs on the same folder.

    Args:
        folder: Filled in by the command line.
        encoder: Folder of the encoder of adapters, as the training of the retriever leaves it, or a
            file as AutoLoRA and DiffSynth-Studio publish it.
        no_encode: Keep metadata only, without loading an encoder.
        index: Folder of the index; .gates-index in FOLDER if null.
        lenient: Encode files with unknown tensors, too.
        every_file: List all files that are refused or found by their metadata alone, not only the
            first ones.
    """
    if no_encode and encoder is not None:
        raise GatesError("--no_encode and --encoder exclude each other: give one of them")
    found = None if encoder is None else read_encoder(encoder)
    with LoraLibrary(folder, found, index=index, lenient=lenient) as library:
        with counting("indexing") as count:
            report = library.scan(count)
        place = library.index
    console = Console()
    _show(console, report, len(report.refused) if every_file else SHOWN)
    if found is None and not no_encode:
        console.print(NO_ENCODER)
    console.print(escape(str(place)), soft_wrap=True)


def read_encoder(folder: str, text_fingerprint: str | None = None) -> "TrainedEncoder":
    """Return the encoder in a folder, or in a file as AutoLoRA or DiffSynth-Studio publish it.

    Args:
        folder: As the training of the retriever leaves it, or the file.
        text_fingerprint: Of the text encoder that prompts are encoded with; None for no check. A
            published file does not name its own.

    Raises:
        GatesError: There is none, or it belongs to another text encoder.
    """
    from diffusion.retrieval.encoder_folder import load_encoder, load_published

    if Path(folder).is_file():
        return load_published(folder)
    return load_encoder(Path(folder), text_fingerprint=text_fingerprint)


def _show(console: Console, report: ScanReport, most: int) -> None:
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right")
    figures = {
        "adapters": report.kept,
        "  new": report.added,
        "  changed": report.changed,
        "  unchanged": report.unchanged,
        "encoded now": report.encoded,
        "found by metadata alone": len(report.unencoded),
        "copies of another file": len(report.duplicates),
        "removed": report.removed,
        "refused": len(report.refused),
    }
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,}")
    console.print(table)
    _list(console, "refused", report.refused, most)
    _list(console, "found by metadata alone", report.unencoded, most)
    copies = [Refused(path, f"it has the content of {first}") for path, first in report.duplicates]
    _list(console, "copies of another file", copies, most)


def _list(console: Console, title: str, files: Sequence[Refused], most: int) -> None:
    if not files:
        return
    table = Table("file", "why", title=title, title_justify="left")
    for path, reason in files[:most]:
        table.add_row(escape(path), escape(reason))
    console.print(table)
    if len(files) > most:
        console.print(f"and {len(files) - most} more: --every_file lists them")
