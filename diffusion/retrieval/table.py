"""The table of adapters, images and captions that the published retriever is trained from."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion.data.table import TableRow, held_out_rows, inside, read_rows
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.retrieval.captions import Example

Load = Callable[[Path], LoraBundle]


def split_table(
    path: str | Path,
    held_out: float,
    *,
    root: str | Path | None = None,
    load: Load = load_lora,
) -> tuple[list[Example], list[Example]]:
    """Return the adapters of a table with the captions of training, and with those held out.

    The table is a CSV with a row per image; its rows are grouped by adapter. A caption is drawn by
    image first, then from its long, short and medium form; half of the time it is the description
    of the adapter with the short form, if there is one.

    Args:
        path: See :func:`diffusion.data.table.read_rows`. An adapter without concept is its own.
        held_out: Fraction of the rows of each adapter that is held out.
        root: Folder that ``model_file`` is relative to; that of the table if None. No file outside
            of it is read.
        load: Reads an adapter, each once.

    Raises:
        LoraFileError: The table cannot be read, lacks a column or a caption, or names a file
            outside of the folder.
    """
    path = Path(path)
    folder = (Path(root) if root is not None else path.parent).resolve()
    rows = read_rows(path)
    bundles: dict[str, LoraBundle] = {}
    for row in rows:
        if row.model_file not in bundles:
            bundles[row.model_file] = load(inside(folder, row.model_file))
    parts = held_out_rows(rows, held_out)
    return _examples(parts[0], bundles), _examples(parts[1], bundles)


def _examples(rows: Sequence[TableRow], bundles: dict[str, LoraBundle]) -> list[Example]:
    """Return adapters, with what describes them."""
    captions: dict[str, list[dict[str, float]]] = {}
    concepts: dict[str, str] = {}
    for row in rows:
        captions.setdefault(row.model_file, []).append(row.captions)
        concepts.setdefault(row.model_file, row.concept)
    return [
        Example(bundles[name], *_joined(images, concepts[name]))
        for name, images in captions.items()
    ]


def _joined(images: list[dict[str, float]], concept: str) -> tuple[list[str], str, list[float]]:
    """Return the captions of an adapter, its concept, and how often each caption is drawn."""
    total: dict[str, float] = {}
    for weighted in images:
        for text, weight in weighted.items():
            total[text] = total.get(text, 0.0) + weight / len(images)
    return list(total), concept, list(total.values())
