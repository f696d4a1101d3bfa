"""The page on a port of this machine, until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..errors import OptionError
from .app import app
from .explorer import Explorer

__all__ = ["serve"]


def serve(explorer: Explorer, port: int, tell: Callable[[str], None]) -> None:
    """Answer until Ctrl-C. port: 0 for any that is free. tell: is given the page's address, which
    only who knows it can open. OptionError for a port that cannot be had."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen()  # who is told the address may come at once
        except OSError as error:
            problem = f"{port} cannot be had ({error.strerror})"
            raise OptionError("port", problem, "give another, or none") from error
        taken, token = listening.getsockname()[1], secrets.token_urlsafe(24)
        tell(f"http://127.0.0.1:{taken}/?token={token}")
        config = uvicorn.Config(
            app(explorer, token, taken), log_level="warning", access_log=False, lifespan="off"
        )
        _Server(config, explorer).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ctrl-C also stops what requests wait for, which are answered before the server ends."""

    def __init__(self, config: uvicorn.Config, explorer: Explorer) -> None:
        super().__init__(config)
        self._explorer = explorer

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._explorer.stop()
        super().handle_exit(sig, frame)
