"""``gates endoscopy demo``: a local page that sizes the polyps on dropped files."""

from __future__ import annotations

from apps.endoscopy.weights import find_bundle, find_segmenter
from harness.command.local_page import check_port, private_folder, serve
from harness.command.verbs import Place


def demo(
    place: Place,
    weights: str | None = None,
    segmenter: str | None = None,
    port: int = 7860,
    browser: bool = False,
) -> None:
    """Serve a page: drop a frame or a clip, draw or accept the box, get the size and an overlay.

    The page is served to this machine only. Nothing is sent anywhere, and what was dropped is
    deleted when the command ends. Research only.

    Args:
        place: Filled in by the command line.
        weights: Folder of weights; by default those of the run, else the shipped ones.
        segmenter: Weights of another segmenter than the shipped one, which proposes the box.
        port: Port of the page; 0 takes a free one.
        browser: Open a browser, too.
    """
    check_port(port)
    found = find_bundle(place, weights)
    network = find_segmenter(segmenter)
    with private_folder() as folder:
        from apps.endoscopy.demo.page import STYLE, build_page

        serve(
            lambda: build_page(found, network, folder),
            port=port,
            browser=browser,
            css=STYLE,
            lines=[f"weights: {found.name}"],
        )
