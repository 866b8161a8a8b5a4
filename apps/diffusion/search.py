"""``gates diffusion index`` and ``search``: folders of adapters, so that prompts find them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.commands import refuse_unless_text
from core_gates.errors import GatesError, check_option
from diffusion.library import (
    Adapter,
    LoraLibrary,
    Match,
    Neighbor,
    Refused,
    Results,
    ScanReport,
    TextEncoder,
    WeightEncoder,
)
from diffusion.library.index import INDEX
from diffusion.lora_file.container import clean
from diffusion.lora_file.recognition import RECOGNIZED
from harness.command.verbs import Place
from harness.files import require_free, write_json
from harness.runs.terminal import counting

if TYPE_CHECKING:
    from diffusion.retrieval.encoder_folder import TrainedEncoder


SHOWN_FILES = 20  # files of a table
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
        folder: Folder of the adapters; those in folders below it count, too.
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
    reader = None if encoder is None else read_encoder(encoder)
    with LoraLibrary(folder, reader, index=index, lenient=lenient) as library:
        with counting("indexing") as count:
            report = library.scan(count)
        place = library.index
    console = Console()
    most = len(report.refused) if every_file else SHOWN_FILES
    _show(console, report, most, encoding=reader is not None)
    if not report.kept:
        console.print(escape(f"no adapter is found in {folder}"), soft_wrap=True)
    if reader is None and not no_encode:
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


def _show(console: Console, report: ScanReport, most: int, *, encoding: bool) -> None:
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right")
    figures = {
        "adapters": report.kept,
        "  new": report.added,
        "  changed": report.changed,
        "  unchanged": report.unchanged,
        "encoded now": report.encoded,
        "found by metadata alone": len(report.unencoded) if encoding else report.kept,
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


SHOWN = 3  # triggers of an adapter
FIGURES = ("score", "weights", "metadata", "cosine", "layers")


def search(
    place: Place,
    prompt: list[str] | None = None,
    folder: str | None = None,
    k: int = 3,
    mode: Literal["names", "weights", "metadata", "hybrid"] = "names",
    like: str | None = None,
    encoder: str | None = None,
    text_encoder: str = "minilm",
    weights: float = 1.0,
    metadata: float = 0.0,
    least: float | None = None,
    family: str | None = None,
    license: str | None = None,
    tag: str | None = None,
    index: str | None = None,
    lenient: bool = False,
    json: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Find the adapters of an indexed folder that suit PROMPT, or whose change is like a file's.

    Args:
        place: Filled in by the command line.
        prompt: What is looked for, in words; none with --like.
        folder: Folder that was indexed; if null, this one, or else the adapters that ship.
        k: Number of adapters.
        mode: What is compared: weights, metadata, hybrid (both), or names, then weights.
        like: Adapter of the folder or any file that others are compared with, instead of a prompt.
        encoder: Folder or file of the encoder that the folder was indexed with.
        text_encoder: Text encoder that the encoder was trained with.
        weights: Weight of the cosine of prompt and weights in a hybrid search.
        metadata: Weight of the fraction of the words that metadata hold in a hybrid search.
        least: Smallest cosine of adapters that are not named; if null, above unrelated prompts.
        family: Only adapters for this family of models, such as flux.
        license: Only adapters with this license.
        tag: Only adapters with this tag.
        index: Folder of the index; .gates-index in the folder if null.
        lenient: Find files with unknown tensors by their weights, too.
        json: File to which what is found is written as JSON, too.
        overwrite_output: Replace the file of --json if it exists.
    """
    words = " ".join(prompt or [])
    _check(words, like, family)
    if json is not None:
        require_free(Path(json), overwrite=overwrite_output, option="--json")
    only: dict[str, Any] = {"family": family, "license": license, "tag": tag}
    text = text_encoder if mode != "metadata" and like is None else ""
    options = {"index": index, "lenient": lenient, "least": least}
    with _opened(place, folder, encoder, text, options) as library:
        if like is None:
            only |= {"weights": weights, "metadata": metadata}
            matches = library.search(words, k, mode, **only)
            _show_matches(Console(), matches)
            _tell(matches, library.root, json)
            return
        with counting("comparing") as count:
            neighbors = library.like(like, k, count, **only)
        _show_neighbors(Console(), neighbors)
        _tell(neighbors, library.root, json)


def _check(words: str, like: str | None, family: str | None) -> None:
    """Refuse options that make no sense, before anything is read."""
    if bool(words.strip()) == (like is not None):
        raise GatesError("expected a prompt or --like, and not both: describe what you look for")
    refuse_unless_text(words)
    if family is not None:
        check_option("--family", family, RECOGNIZED, GatesError)


def _tell(found: Results[Any], root: Path, json: str | None) -> None:
    """Print the paths of what was found, and write all that is known of it as JSON."""
    rows = [_state(row, root) for row in found]
    for rank, row in enumerate(rows, 1):
        print(f"{rank} {clean(row['path'])}")
    if json is not None:
        told = {"mode": found.mode, "notice": found.notice, "left_out": found.left_out}
        write_json(Path(json), {"adapters": rows, **told})


def _state(one: Match | Neighbor, root: Path) -> dict[str, Any]:
    """Return what was found as plain values."""
    adapter, found = one.adapter, one._asdict()
    told = {
        n: getattr(adapter, n) for n in ("name", "title", "triggers", "tags", "family", "license")
    }
    del found["adapter"]
    return {**told, "path": str(root / adapter.path), **found}


def _opened(
    place: Place,
    folder: str | None,
    encoder: str | None,
    text_encoder: str,
    options: Mapping[str, Any],
) -> LoraLibrary:
    """Return the library that options name; weights are searched where a text encoder is named."""
    ships = folder is None and options["index"] is None and not Path(INDEX).is_dir()
    if ships:
        folder, own, index = _shipped(place)
        encoder, options = encoder or own, {**options, "index": index}
    reader: WeightEncoder | None = None
    text: TextEncoder | None = None
    if encoder is not None and text_encoder:
        from diffusion.models.text_encoders import text_encoder as encoder_of_texts

        text = encoder_of_texts(text_encoder)
        reader = read_encoder(encoder, text.fingerprint)
    library = LoraLibrary(folder or ".", reader, text, **options)
    if ships:
        with counting("indexing") as count:
            library.scan(count)
    return library


def _shipped(place: Place) -> tuple[str, str | None, str]:
    """Return the folder of the adapters that ship, that of their encoder, and that of their index.

    Raises:
        GatesError: The adapters are missing.
    """
    from apps.diffusion.embedded_world import LIBRARY, World, root_of
    from apps.diffusion.studies.base_study import encoder_of

    world = World(root_of(place))
    files = world.zoo_files(0)
    if not files:
        raise GatesError("this folder is not indexed, and no adapters ship: give --folder")
    encoder, folder = encoder_of(world), next(iter(files.values())).parent
    return str(folder), None if encoder is None else str(encoder), str(world.run.folder / LIBRARY)


UNNAMED = "not in the prompt: `generate` needs --fill to take it"


def _show_matches(console: Console, matches: Results[Match]) -> None:
    rows, named = [], any(match.named for match in matches)
    for match in matches:
        parts = {"score": match.score, "weights": match.weights, "metadata": match.metadata}
        figures = {n: "" if part is None else f"{part:.3f}" for n, part in parts.items()}
        if len(set(figures.values()) - {""}) == 1:  # the score is one of its parts
            figures = {"score": figures["score"]}
        notes = [f"named: {match.named}" if match.named else UNNAMED] * named
        notes += [f"copy: {path}" for path in match.duplicates]
        rows.append(_row(match.adapter, figures, notes))
    by = "names, then weights" if matches.mode == "names" else matches.mode
    _print(console, f"by {by}", rows, matches.notice)
    for line in left_out(matches):
        console.print(line, soft_wrap=True, highlight=False)


def left_out(matches: Results[Match]) -> list[str]:
    """Return a line on each adapter whose cosine was too low."""
    least, *scores = (
        f"{score:.3f}".replace("0.", ".", 1)
        for score in (matches.least, *matches.left_out.values())
    )
    pairs = zip(matches.left_out, scores, strict=True)
    return [f"left out: {name} {score}, below {least}" for name, score in pairs]


def _show_neighbors(console: Console, neighbors: Results[Neighbor]) -> None:
    rows = []
    for neighbor in neighbors:
        figures = {"cosine": f"{neighbor.cosine:.3f}", "layers": str(neighbor.shared)}
        rows.append(
            _row(neighbor.adapter, figures, ["near-duplicate"] if neighbor.near_duplicate else [])
        )
    _print(console, "by the change of the weights", rows, neighbors.notice)


def _row(adapter: Adapter, figures: dict[str, str], notes: list[str]) -> dict[str, str]:
    return {
        "adapter": adapter.name,
        **figures,
        "title": "" if adapter.title == adapter.name else adapter.title,
        "triggers": ", ".join(adapter.triggers[:SHOWN]),
        "for": adapter.family,
        "license": adapter.license,
        "note": "; ".join([*adapter.flags, *notes]),
    }


def _print(console: Console, title: str, rows: list[dict[str, str]], notice: str) -> None:
    """Print the columns in which a row has something, and what the reader has to know."""
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    used = list(dict.fromkeys(n for row in rows for n, text in row.items() if text))
    for name in used:
        figure = name in FIGURES
        table.add_column(
            name, justify="right" if figure else "left", no_wrap=figure, overflow="fold"
        )
    for rank, row in enumerate(rows, 1):
        table.add_row(str(rank), *(escape(row.get(name, "")) for name in used))
    if rows:
        console.print(table)
    else:
        console.print("no adapter is found")
    if notice:
        console.print(f"[yellow]note[/]: {escape(notice)}", soft_wrap=True)
