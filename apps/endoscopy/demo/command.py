"""``gates endoscopy demo``: a local page that sizes the polyps on dropped files."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path
from threading import Event

from apps.endoscopy.weights import find_bundle, find_segmenter
from core_gates.errors import GatesError, MissingExtraError
from harness.command.verbs import Place

LOCAL = "127.0.0.1"
ENDS = (signal.SIGINT, signal.SIGTERM)
PRIVATE = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}
"""No telemetry, no stored files, no network access."""


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
    if not 0 <= port <= 65535:
        raise GatesError(f"--port must lie between 0 and 65535, found {port}")
    found = find_bundle(place, weights)
    network = find_segmenter(segmenter)
    with tempfile.TemporaryDirectory(prefix="gates-demo-") as folder:
        os.environ.update(PRIVATE | {"GRADIO_TEMP_DIR": str(Path(folder) / "uploads")})
        try:
            import gradio
        except ImportError as error:
            raise MissingExtraError("demo", "gradio") from error
        from apps.endoscopy.demo.page import STYLE, build_page, look

        page = build_page(found, network, Path(folder))
        page.launch(
            server_name=LOCAL,
            server_port=free_port(port),
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=look(gradio),
            css=STYLE,
        )
        print(f"weights: {found.name}")
        print(f"http://{LOCAL}:{page.server_port} (Ctrl-C ends it)", flush=True)
        try:
            _wait_for_the_end()
        finally:
            page.close(verbose=False)


def _wait_for_the_end() -> None:
    """Wait for Ctrl-C, which shell jobs ignore without a handler, or for SIGTERM."""
    ended = Event()
    kept = {one: signal.signal(one, lambda *_: ended.set()) for one in ENDS}
    try:
        ended.wait()
    finally:
        for one, handler in kept.items():
            signal.signal(one, handler)


def free_port(port: int) -> int:
    """Return the port, or a free one instead of 0.

    Raises:
        GatesError: It is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOCAL, port))
        except OSError as error:
            raise GatesError(f"port {port} is taken: give another --port, or 0") from error
        return int(probe.getsockname()[1])
