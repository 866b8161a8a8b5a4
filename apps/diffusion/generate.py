"""``gates diffusion generate``: from a prompt to images, with the adapters that suit it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.adapter_files import strengths_of
from apps.diffusion.commands import refuse_unless_text
from apps.diffusion.sampling import Sampling, record_of, require_writable, save, save_sheet
from apps.diffusion.studio import Sources, maker, studio
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.runs.terminal import counting, ticking

if TYPE_CHECKING:
    from diffusion.fusion.pipeline import Generated

IMAGES = "images"
K = 3


def generate(
    place: Place,
    sources: Sources,
    sampling: Sampling,
    prompt: list[str] | None = None,
    k: int | None = None,
    adapters: str | None = None,
    mode: str = "gated",
    output: str | None = None,
) -> None:
    """Make images of PROMPT with the adapters that suit it, each weighed by its gates.

    Each image is a PNG with its parameters, next to a JSON file with the adapters, their scores,
    their mean gates by layer and by step, and the hashes of all that took part. The same seed gives
    the same bytes.

    Args:
        place: Filled in by the command line.
        sources: Base, library and gates.
        sampling: Seeds, steps and guidance.
        prompt: Filled in by the command line.
        k: Number of adapters that are found by the prompt; 3 if null.
        adapters: Names of adapters of the library instead of a search, with strengths, such as
            a:0.8,b; none for the base alone.
        mode: How adapters are combined: gated, sum, or a rival such as mean, switch or k_lora.
        output: Folder of the images; that of the run if null.
    """
    from apps.diffusion.embedded_world import World

    words = " ".join(prompt or [])
    named = _named(adapters)
    _check(words, k, named)
    maker(mode)
    refuse_unless_text(sampling.negative_prompt)
    folder = Path(output) if output is not None else place.run_folder.path / IMAGES
    require_writable(folder)
    console = Console()
    world = partial(World, place.run_folder.path.parents[1])
    if sources.base is not None:
        console.print(escape(f"reading the base {sources.base}"), soft_wrap=True)
    with counting("indexing") as progress:
        opening = studio(sources, world, progress)
    with opening as found:
        asked = partial(
            found.make, words, mode=mode, k=k or K, adapters=None if named is None else list(named),
            strengths=named or None, **sampling.options(found),
        )  # fmt: skip
        made = _made(asked, sampling)
        records = [record_of(found, one, mode) for one in made]
        images = [one.images[0] for one in made]
        _show(console, records[0], [*found.notices, found.unread(words), found.finder.notice])
        paths = [save(image, one, folder) for image, one in zip(images, records, strict=True)]
        if sampling.count > 1:
            paths.append(save_sheet(images, records, folder))
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True, highlight=False)


def _made(asked: Callable[..., "Generated"], sampling: Sampling) -> list["Generated"]:
    """Return all images, with what made them."""
    with ticking("denoising steps", sampling.count * sampling.steps) as tick:

        def after(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tick()
            return tensors

        seeds = range(sampling.seed, sampling.seed + sampling.count)
        return [asked(seed=seed, callback_on_step_end=after) for seed in seeds]


def _named(text: str | None) -> dict[str, float] | None:
    """Return the strengths of named adapters; None where adapters are to be found.

    Raises:
        GatesError: A name is empty or occurs twice, or a strength is no finite number.
    """
    if text is None:
        return None
    if text.strip() == "none":
        return {}
    names = [part.partition(":")[0].strip() for part in text.split(",")]
    if not all(names):
        raise GatesError(f"--adapters is {text!r}, expected names such as a:0.8,b, or none")
    return strengths_of(text, names, "--adapters")


def _check(prompt: str, k: int | None, named: dict[str, float] | None) -> None:
    """Refuse options that make no sense, before anything is read."""
    if not prompt.strip():
        raise GatesError("the prompt is empty: describe what the image is to show")
    refuse_unless_text(prompt)
    if k is not None and named is not None:
        raise GatesError("--k and --adapters exclude each other: adapters are found, or named")
    if k is not None and k < 1:
        raise GatesError(f"--k is {k}, expected 1 or more; --adapters none is the base alone")


def _show(console: Console, record: dict[str, Any], notices: list[str]) -> None:
    """Print the adapters, what they were found by, and what was left out."""
    if record["adapters"]:
        table = Table(title=f"adapters, {record['mode']}", title_justify="left")
        table.add_column("adapter", overflow="fold")
        for name in ("score", "strength", "mean gate"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for one in record["adapters"]:
            figures = [one["score"], one["strength"], one["mean_gate"]]
            cells = ["" if value is None else f"{value:.3f}" for value in figures]
            table.add_row(escape(one["name"]), *cells, escape(one["why"]))
        console.print(table)
    else:
        console.print("no adapters: the base alone")
    for name, why in record["skipped"].items():
        console.print(escape(f"left out: {name}: {why}"), soft_wrap=True)
    for notice in filter(None, notices):
        console.print(escape(f"note: {notice}"), soft_wrap=True)
