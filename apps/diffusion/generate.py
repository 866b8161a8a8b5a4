"""``gates diffusion generate``: how images are sampled, and saved with all that decided them."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.adapter_files import roles_in, strengths_of
from apps.diffusion.commands import refuse_unless_text
from apps.diffusion.search import left_out
from apps.diffusion.studio import GATED, RELEVANCE, STRENGTHS, SUM, Sources, Studio, maker, studio
from core_gates.errors import GatesError
from diffusion.data.pictures import contact_sheet, save_picture
from diffusion.experiments.trained_gates import refuse_gates_of_another
from diffusion.experiments.work import refuse_below
from diffusion.fusion import GatedFusion
from diffusion.fusion.baking import MeanGates, bake, depends_on_roles
from diffusion.fusion.gated_fusion import Mode
from diffusion.fusion.pipeline import AutoLoraPipeline, Generated, most_of
from diffusion.lora_file import LoraBundle
from diffusion.models.flow_matching import GUIDANCE
from diffusion.models.pipelines import load_pipeline
from harness.command.verbs import Place
from harness.files import require_free, short_digest
from harness.runs.terminal import counting, ticking

LARGEST_SEED = 2**63 - 1
MOST = 1000  # images of a call


FLUX_GUIDANCE = 3.5  # of FLUX.1 and SD3, as AutoLoRA generates


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        seed: Seed of the noise of the first image; the others follow.
        steps: Number of denoising steps.
        guidance: Scale of the guidance by the prompt; 1.5 for the embedded base and 3.5 for others
            if null.
        count: Number of images.
        negative_prompt: What the images should not show.
        size: Side of images in pixels, for other bases than the embedded one.
    """

    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    count: int = 1
    negative_prompt: str = ""
    size: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        if not 0 <= self.seed <= LARGEST_SEED - self.count:
            raise GatesError(f"--seed is {self.seed}, expected a number from 0 to 2^63")
        refuse_below(1, steps=self.steps)
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise GatesError(f"--guidance is {self.guidance}, expected 0 or more; 1 is without")
        if not 1 <= self.count <= MOST:
            raise GatesError(f"--count is {self.count}, expected 1 to {MOST}")
        refuse_below(1, size=self.size)

    def options(self, studio: Studio) -> dict[str, Any]:
        """Return the options of the pipeline of diffusers.

        Raises:
            GatesError: One would do nothing with this base.
        """
        usual = FLUX_GUIDANCE if studio.base is None else GUIDANCE
        guidance = usual if self.guidance is None else self.guidance
        if studio.guided and guidance < 1:
            raise GatesError(
                f"--guidance is {guidance}, which this base takes for 1, no guidance: give 1,"
                " or more"
            )
        if self.negative_prompt and not (studio.guided and guidance > 1):
            way = "give --guidance above 1" if studio.guided else "this base has none"
            raise GatesError(f"--negative_prompt does nothing without such guidance: {way}")
        found = studio.options(self.steps, guidance, self.size)
        return found | ({"negative_prompt": self.negative_prompt} if self.negative_prompt else {})


ADDED = "named adapters are added; the gate opens those that are found by their weights alone"
LETTERS = 40  # of a prompt, in the name of a file


def record_of(studio: Studio, found: Generated, mode: str | None = None) -> dict[str, Any]:
    """Return all that decided an image, as plain values.

    Args:
        studio: What made it.
        found: The image.
        mode: How adapters were combined, as it was asked for.
    """
    record = found.record()
    gates = record["gates"] or {}
    adapters = [
        {
            **one,
            **studio.finder.described(one["name"], found.prompt),
            "open": gates.get(one["name"], {}).get("mean", one.get("open")),
        }
        for one in record["adapters"]
    ]
    named = {} if found.mode in (*get_args(Mode), "none") else {"mode": mode}
    if studio.dtype is not None:
        named["dtype"] = studio.dtype
    return {
        **record,
        **named,
        "adapters": adapters,
        "left_out": dict(studio.finder.found.left_out),
        "model": studio.model,
        "sampler": "Euler",
        "hashes": studio.hashes,
    }


def save_sheet(images: list[Image.Image], records: list[dict[str, Any]], folder: Path) -> Path:
    """Write many images on one sheet, with the names of their files."""
    record = {
        **records[0],
        "seeds": [one["seed"] for one in records],
        "files": [f"{name_of(one)}.png" for one in records],
    }
    return save_picture(contact_sheet(images), folder / f"{name_of(record)}-sheet.png", record)


def name_of(record: dict[str, Any]) -> str:
    """Return the stem of the files of an image: equal records have equal names.

    What other fields decide, and rounding may change, does not count.
    """
    words = re.sub(r"[\W_]+", "-", record["prompt"].lower()).strip("-")[:LETTERS].strip("-")
    results = ("weights", "metadata", "open", "score", "why")
    adapters = [{n: v for n, v in one.items() if n not in results} for one in record["adapters"]]
    settled = {n: v for n, v in record.items() if n not in ("gates", "skipped", "left_out")}
    digest = short_digest({**settled, "adapters": adapters}, 8)
    return f"{words or 'image'}-s{record['seed']}-{digest}"


TRUE = "true drawing"


def in_bytes(image: np.ndarray) -> np.ndarray:
    """Return images from 0 to 1 as uint8."""
    return np.round(image * 255).clip(0, 255).astype(np.uint8)


def baked(
    adapters: Mapping[str, LoraBundle],
    base: Path,
    gates: Path,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int,
    strengths: Mapping[str, float],
    roles: Mapping[str, str],
) -> LoraBundle:
    """Return one adapter with the mean gates of runs of the base in the rows of B.

    Args:
        adapters: Name -> adapter.
        base: Folder of the base: an embedded one, or a pipeline of diffusers.
        gates: File of trained gates.
        prompts: What is generated while gates are observed.
        steps: Denoising steps of each image.
        seed: Of the noise of the first image; the others follow.
        strengths: Name -> strength.
        roles: Name -> role.

    Raises:
        GatesError: The base cannot be read, or gates or adapters do not fit it.
    """
    refuse_gates_of_another(base, gates)
    pipe, embedded = load_pipeline(base)
    options: dict[str, Any] = {"num_inference_steps": steps}
    if embedded is not None:
        size = embedded.size
        options |= {"text": embedded.encoder(), "height": size, "width": size}
    make = AutoLoraPipeline(pipe, **options)
    fusion = GatedFusion(pipe.transformer, adapters, gates=gates)
    fusion.set_strengths(strengths)
    fusion.describe(roles=roles)
    with fusion, MeanGates(fusion) as observed:
        for number, prompt in enumerate(prompts):
            make(prompt, adapters={}, seed=seed + number, output_type="latent")
    return bake(fusion, observed.means)


def generate(
    place: Place,
    sources: Sources,
    sampling: Sampling,
    prompt: list[str] | None = None,
    k: int | None = None,
    fill: bool = False,
    adapters: str | None = None,
    mode: str | None = None,
    roles: str | None = None,
    output: str | None = None,
) -> None:
    """Make images of PROMPT with the adapters that suit it, each as far as the prompt needs it.

    Each is a PNG next to a JSON file with all that decided it; equal seeds give equal bytes.

    Args:
        place: Filled in by the command line.
        sources: Base, library and gates.
        sampling: Seeds, steps and guidance.
        prompt: What the images are to show, in words.
        k: Most adapters that are found by the prompt; 6 for relevance, otherwise 3, if null.
        fill: Where the prompt names adapters, take others that suit it, too, up to --k.
        adapters: Names of adapters of the library instead of a search, with strengths, such as
            a:0.8,b; none for the base alone.
        mode: How adapters are combined: relevance, gated, strengths, sum, or a rival such as mean
            or k_lora; if null, as the gates are for, and the sum without any.
        roles: Roles of adapters, such as a:subject,b:style, for gates; those of tags if null.
        output: Folder of the images; that of the run if null.
    """
    from apps.diffusion.embedded_world import World, root_of

    words = " ".join(prompt or [])
    named, told = _named(adapters), roles_in(roles)
    _check((words, sampling.negative_prompt), k, named, mode, told, fill=fill)
    folder = Path(output) if output is not None else place.run_folder.path / "images"
    require_free(folder / "image.png", overwrite=True)
    console = Console()
    if sources.base is not None:
        console.print(escape(f"reading the base {sources.base}"), soft_wrap=True)
    with counting("indexing") as progress:
        opening = studio(sources, partial(World, root_of(place)), progress, mode, sampling.options)
    with opening as found:
        _note_idle(told, found)
        asked = partial(
            found.make, words, mode=mode, k=k or most_of(mode or found.mode), fill=fill, roles=told,
            strengths=named if ":" in (adapters or "") else None,
            adapters=None if named is None else list(named), **sampling.options(found),
        )  # fmt: skip
        images, records, paths = list[Image.Image](), list[dict[str, Any]](), list[Path]()
        try:
            for made in _made(asked, sampling):
                images.append(made.images[0])
                records.append(record_of(found, made, mode))
                path = folder / f"{name_of(records[-1])}.png"
                paths.append(save_picture(images[-1], path, records[-1]))
            if sampling.count > 1:
                paths.append(save_sheet(images, records, folder))
        finally:  # also where someone interrupts: what was made is kept
            _show(console, found, records, paths)


def _note_idle(roles: Mapping[str, str], studio: Studio) -> None:
    """Let a user know of roles that gates do not depend on."""
    if roles and studio.gates is not None and not depends_on_roles(studio.gates):
        studio.notices.append(f"--roles changes nothing: {studio.gates} does not depend on them")


def _made(asked: Callable[..., Generated], sampling: Sampling) -> Iterator[Generated]:
    """Yield each image when it is made, with what made it."""
    with ticking("denoising steps", sampling.count * sampling.steps) as tick:

        def after(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tick()
            return tensors

        for seed in range(sampling.seed, sampling.seed + sampling.count):
            yield asked(seed=seed, callback_on_step_end=after)


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


def _check(
    prompts: Sequence[str],
    k: int | None,
    named: Mapping[str, float] | None,
    mode: str | None,
    roles: Mapping[str, str],
    *,
    fill: bool,
) -> None:
    """Refuse options that make no sense, before anything is read."""
    if not prompts[0].strip():
        raise GatesError("the prompt is empty: describe what the image is to show")
    for prompt in prompts:
        refuse_unless_text(prompt)
    maker(mode or SUM)
    if roles and mode not in (None, GATED, STRENGTHS):
        raise GatesError(f"--roles has no meaning for --mode {mode}: leave it out")
    if (k is not None or fill) and named is not None:
        word = "--fill" if k is None else "--k"
        raise GatesError(f"{word} and --adapters exclude each other: adapters are found, or named")
    if k is not None and k < 1:
        raise GatesError(f"--k is {k}, expected 1 or more; --adapters none is the base alone")


def _show(
    console: Console, studio: Studio, records: Sequence[dict[str, Any]], paths: Sequence[Path]
) -> None:
    """Print the adapters, what they were found by, what was left out, and where images lie."""
    if not records:
        return
    record, found = records[0], studio.finder.found
    if record["adapters"]:
        table = Table(title=f"adapters, {record['mode']}", title_justify="left")
        table.add_column("adapter", overflow="fold")
        for name in ("score", "strength", "open"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for one in record["adapters"]:
            figures = [one["score"], one["strength"], one["open"]]
            cells = ["" if value is None else f"{value:.3f}" for value in figures]
            table.add_row(escape(one["name"]), *cells, escape(one["why"]))
        console.print(table)
    else:
        console.print("no adapters: the base alone")
    prompt, scores = record["prompt"], {one["name"]: one["score"] for one in record["adapters"]}
    limits = (studio.unread(prompt), studio.unknown(prompt, scores))
    added = ADDED if (studio.mode, record["mode"]) == (RELEVANCE, SUM) else ""
    notes = (*studio.notices, added, *limits, found.notice)
    for line in [
        *left_out(found),
        *(f"left out: {name}: {why}" for name, why in record["skipped"].items()),
        *(f"note: {note}" for note in notes if note),
    ]:
        console.print(escape(line), soft_wrap=True)
    for path in paths:
        console.print(escape(str(path)), soft_wrap=True, highlight=False)
