"""``gates diffusion demo``: a local page that finds adapters and makes images."""

from __future__ import annotations

from functools import partial
from typing import Literal

from apps.diffusion.generation.sources import Sources, studio
from apps.diffusion.world import World
from harness.command.verbs import Place
from harness.runs.ticker import counting
from harness.service.local_page import check_port, private_folder, serve


def demo(
    place: Place,
    library: str | None = None,
    base: str | None = None,
    gates: str | None = None,
    encoder: str | None = None,
    index: str | None = None,
    components: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    offload: Literal["none", "model", "sequential", "group"] = "none",
    steps: int = 20,
    size: int | None = None,
    port: int = 7861,
    browser: bool = False,
) -> None:
    """Serve a page: a prompt, the adapters that suit it with scores, the image, the gates.

    The page is served to this machine only, and nothing is sent anywhere.

    Args:
        place: Filled in by the command line.
        library: Folder of adapters, which is indexed; those that ship if null.
        base: Folder of a pipeline of diffusers or of an embedded base, or a GGUF file; the embedded
            base that ships if null.
        gates: File of trained gates; those that ship for the embedded base, and none for others, if
            null.
        encoder: Folder of the encoder of adapters; the shipped one for the embedded base if null.
        index: Folder of the index; .gates-index in the library if null.
        components: Folder of a pipeline with all other parts, for a GGUF file.
        dtype: Type of the parameters of other bases than the embedded one.
        offload: What keeps the memory of a device low.
        steps: Number of denoising steps.
        size: Side of images in pixels, for other bases than the embedded one.
        port: Port of the page; 0 takes a free one.
        browser: Open a browser, too.
    """
    check_port(port)
    sources = Sources(base, library, gates, encoder, index, components, dtype, offload)
    world = partial(World, place.run_folder.path.parents[1])
    with private_folder():
        from apps.diffusion.demo.page import STYLE, build_page

        with counting("indexing") as progress:
            opening = studio(sources, world, progress)
        with opening as found:
            serve(
                lambda: build_page(found, steps=steps, size=size),
                port=port,
                browser=browser,
                css=STYLE,
                lines=[f"base: {found.model}", *(f"note: {one}" for one in found.notices)],
            )
