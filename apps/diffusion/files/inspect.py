"""``gates diffusion inspect``: what is in a file of adapters, and why it may do nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from apps.diffusion.files.answer import Answer, answer
from apps.diffusion.files.base import base_of
from apps.diffusion.files.showing import plain_console, show_contents, show_summary
from apps.diffusion.files.sources import find_files
from core_gates.errors import GatesError
from diffusion.lora_file.inspection import Contents, examine
from diffusion.lora_file.reading import Base
from harness.files import require_apart, require_free, write_json
from harness.runs.ticker import counting

Found = tuple[Contents, Answer] | str
"""What a file holds and what becomes of it, or why it is refused."""


def inspect(
    paths: list[str],
    base: str | None = None,
    layers: bool = False,
    hashes: bool = True,
    json: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Say what PATHS hold, files of adapters or folders of them, and why they may do nothing.

    One file is shown with its blocks; of several, each gets a row.

    Args:
        paths: Filled in by the command line.
        base: What the files are for: flux, sd3 or a folder of diffusers, whose layers they must
            fit; by default each file decides.
        layers: List every layer, with its size, rank, scale and the norm of its change.
        hashes: Compute the hashes AutoV2 and AutoV3, for which each file is read twice more.
        json: File to which everything is written as JSON, too.
        overwrite_output: Replace the file of --json if it exists.
    """
    files = find_files(paths)
    if json is not None:
        require_free(Path(json), overwrite=overwrite_output)
        require_apart(Path(json), files, "--json")
    model = base_of(base)
    found: dict[Path, Found] = {}
    with counting("inspecting") if len(files) > 1 else nullcontext() as count:
        for path in files:
            found[path] = _examine(path, model, hashes=hashes)
            if count is not None:
                count(len(found), len(files))
    reasons = [one for one in found.values() if isinstance(one, str)]
    if len(reasons) == len(found):
        others = f", and {len(reasons) - 1} more files are refused" if len(reasons) > 1 else ""
        raise GatesError(reasons[0] + others)
    if json is not None:
        write_json(Path(json), {"files": [_state(path, one) for path, one in found.items()]})
    console = plain_console()
    (first, *_) = found.values()
    if len(found) == 1 and not isinstance(first, str):
        show_contents(console, *first, layers=layers)
    else:
        show_summary(console, found, hashes=hashes)


def _examine(path: Path, base: Base | None, *, hashes: bool) -> Found:
    """Examine a file; what is wrong with one is no reason not to show the others."""
    try:
        contents = examine(path, base, hashes=hashes)
        return contents, answer(path, contents)
    except GatesError as error:
        return str(error)


def _state(path: Path, found: Found) -> dict[str, Any]:
    if isinstance(found, str):
        return {"path": str(path), "refused": found}
    contents, said = found
    return {"path": str(path), "refused": None, **contents.state(), "answer": said._asdict()}
