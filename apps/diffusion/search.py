"""``gates diffusion search``: adapters for a prompt, or like another one."""

from functools import partial
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.index import read_encoder
from apps.diffusion.options import refuse_unless_text
from core_gates.errors import GatesError, check_option
from diffusion.library import (
    Adapter,
    LoraLibrary,
    Match,
    Neighbor,
    Results,
    TextEncoder,
    WeightEncoder,
)
from diffusion.lora_file.recognition import RECOGNIZED
from harness.runs.ticker import counting

SHOWN = 3  # triggers of an adapter
FIGURES = ("score", "weights", "metadata", "cosine", "layers")


def search(
    prompt: list[str] | None = None,
    folder: str = ".",
    k: int = 3,
    mode: Literal["weights", "metadata", "hybrid"] = "weights",
    like: str | None = None,
    encoder: str | None = None,
    text_encoder: str = "minilm",
    weights: float = 1.0,
    metadata: float = 0.0,
    family: str | None = None,
    license: str | None = None,
    tag: str | None = None,
    index: str | None = None,
    lenient: bool = False,
) -> None:
    """Find the adapters of an indexed folder that suit PROMPT, or whose change is like a file's.

    Without an encoder, or for families of models that it does not serve, metadata is searched.

    Args:
        prompt: Filled in by the command line.
        folder: Folder that was indexed.
        k: Number of adapters.
        mode: What is compared with the prompt: weights, metadata or, with hybrid, both.
        like: Adapter of the folder or any other file, with whose change of the weights all others
            are compared, in place of a prompt.
        encoder: Folder or file of the encoder that the folder was indexed with.
        text_encoder: Text encoder that the encoder was trained with.
        weights: Weight of the cosine of prompt and weights in a hybrid search.
        metadata: Weight of BM25 of prompt and metadata in a hybrid search.
        family: Only adapters for this family of models, such as flux.
        license: Only adapters with this license.
        tag: Only adapters with this tag.
        index: Folder of the index; .gates-index in the folder if null.
        lenient: Find files with unknown tensors by their weights, too.
    """
    words = " ".join(prompt or [])
    if bool(words.strip()) == (like is not None):
        raise GatesError("expected a prompt or --like, and not both: describe what you look for")
    refuse_unless_text(words)
    if family is not None:
        check_option("--family", family, RECOGNIZED, GatesError)
    if like is not None:
        with LoraLibrary(folder, index=index, lenient=lenient) as library:
            with counting("comparing") as count:
                neighbors = library.like(like, k, count)
            _show_neighbors(Console(), neighbors)
        return
    found: WeightEncoder | None = None
    text: TextEncoder | None = None
    if encoder is not None and mode != "metadata":
        from diffusion.models.text_encoders import text_encoder as encoder_of_texts

        text = encoder_of_texts(text_encoder)
        found = read_encoder(encoder, text.fingerprint)
    with LoraLibrary(folder, found, text, index=index, lenient=lenient) as library:
        look = partial(library.search, family=family, license=license, tag=tag)
        _show_matches(Console(), look(words, k, mode, weights=weights, metadata=metadata))


def _show_matches(console: Console, matches: Results[Match]) -> None:
    rows = []
    for match in matches:
        parts = {"score": match.score, "weights": match.weights, "metadata": match.metadata}
        figures = {n: "" if part is None else f"{part:.3f}" for n, part in parts.items()}
        if len(set(figures.values()) - {""}) == 1:  # the score is one of its parts
            figures = {"score": figures["score"]}
        rows.append(_row(match.adapter, figures, [f"copy: {path}" for path in match.duplicates]))
    _print(console, f"by {matches.mode}", rows, matches.notice)


def _show_neighbors(console: Console, neighbors: Results[Neighbor]) -> None:
    rows = []
    for one in neighbors:
        figures = {"cosine": f"{one.cosine:.3f}", "layers": str(one.shared)}
        rows.append(_row(one.adapter, figures, ["near-duplicate"] if one.near_duplicate else []))
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
