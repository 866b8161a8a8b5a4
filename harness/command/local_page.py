"""A Gradio page for this machine alone: no telemetry, no stored files, no network access."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from core_gates.errors import GatesError

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
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a folder that is deleted at the end, and have Gradio keep its files there.

    Gradio is imported only inside of the block.

    Raises:
        MissingExtraError: Gradio is missing.
    """
    with tempfile.TemporaryDirectory(prefix="gates-demo-") as folder:
        os.environ.update(PRIVATE | {"GRADIO_TEMP_DIR": str(Path(folder) / "uploads")})
        import gradio  # noqa: F401

        yield Path(folder)


def check_port(port: int) -> None:
    """Refuse a number outside of those of ports.

    Raises:
        GatesError: It is none.
    """
    if not 0 <= port <= 65535:
        raise GatesError(f"--port must lie between 0 and 65535, found {port}")


def serve(
    build: Callable[[], Any], *, port: int, browser: bool, css: str, lines: Sequence[str] = ()
) -> None:
    """Serve a page until Ctrl-C or SIGTERM.

    Args:
        build: Returns the page.
        port: 0 takes a free one.
        browser: Open a browser, too.
        css: Of the page.
        lines: Printed before the address.

    Raises:
        GatesError: The port is taken.
    """
    page = build()
    page.launch(
        server_name=LOCAL,
        server_port=free_port(port),
        inbrowser=browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=_look(),
        css=css,
    )
    for line in lines:
        print(line)
    print(f"http://{LOCAL}:{page.server_port} (Ctrl-C ends it)", flush=True)
    try:
        _wait_for_the_end()
    finally:
        page.close(verbose=False)


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


def _look() -> Any:
    """Return a theme without fonts from the network."""
    import gradio

    return gradio.themes.Soft(
        primary_hue="blue", neutral_hue="slate", radius_size="md", font=list(FONTS),
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip


def _wait_for_the_end() -> None:
    """Wait for Ctrl-C, which shell jobs ignore without a handler, or for SIGTERM."""
    ended = Event()
    kept = {number: signal.signal(number, lambda *_: ended.set()) for number in ENDS}
    try:
        ended.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
