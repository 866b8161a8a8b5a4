"""Running a service on a port, until it is told to end."""

import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from core_gates.errors import GatesError
from harness.service.web import Service, build_app


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a port, to a free one for 0.

    Raises:
        GatesError: The port is taken, out of range, or the host is not of this machine.
    """
    if not 0 <= port <= 65535:
        raise GatesError(f"--port must lie between 0 and 65535, found {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of a socket of this protocol does asyncio let small answers leave at once (TCP_NODELAY).
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise GatesError(
            f"cannot serve at {host}, port {port}: {error.strerror or error}; give another --port, "
            "or 0, or another --host"
        ) from error
    return bound


class Server(uvicorn.Server):
    """A server that ends at SIGINT or SIGTERM, after the requests that it has accepted.

    Args:
        app: Application.
        grace_s: Seconds that requests have to end.
    """

    def __init__(self, app: FastAPI, grace_s: float = 30.0) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=int(grace_s),
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at a second SIGINT, at once. The signal is not raised again afterwards."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def serve(service: Service, bound: socket.socket, grace_s: float = 30.0) -> None:
    """Answer requests until a signal ends it; says at which address.

    Args:
        service: What is served; closed at the end.
        bound: Of :func:`bind`.
        grace_s: Seconds that requests have to end.
    """
    host, port = bound.getsockname()[:2]
    bound.listen(2048)  # clients may connect from now on; they are answered in a moment
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    Server(build_app(service), grace_s).run(sockets=[bound])


def log_to_stderr() -> None:
    """Show the log of the service as plain lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("gates.service")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False
