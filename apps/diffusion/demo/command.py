"""``gates diffusion demo``: a local page that finds adapters and makes images."""

from __future__ import annotations

from functools import partial

from apps.diffusion.generation.sources import Sources
from harness.command.local_page import check_port, private_folder, serve
from harness.command.verbs import Place
from harness.runs.ticker import counting


def demo(
    place: Place,
    sources: Sources,
    steps: int = 20,
    size: int | None = None,
    port: int = 7861,
    browser: bool = False,
) -> None:
    """Serve a page: a prompt, the adapters that suit it with scores, the image, the gates.

    The page is served to this machine only, and nothing is sent anywhere.

    Args:
        place: Filled in by the command line.
        sources: Base, library and gates.
        steps: Number of denoising steps.
        size: Side of images in pixels, for other bases than the embedded one.
        port: Port of the page; 0 takes a free one.
        browser: Open a browser, too.
    """
    check_port(port)
    with private_folder():
        from apps.diffusion.demo.page import STYLE, build_page
        from apps.diffusion.generation.studio import studio
        from apps.diffusion.world import World

        world = partial(World, place.run_folder.path.parents[1])
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
