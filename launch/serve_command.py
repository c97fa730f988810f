"""`rerankvpr serve`: the web page of an index, on this machine alone."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.flags import parse_flags
from configs.plugins import load_plugins

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST = "127.0.0.1"
EXTRA = ("fastapi", "uvicorn", "python_multipart")
GRACE_S = 5


@dataclass(frozen=True)
class ServeCommand:
    """A web page on 127.0.0.1: drop a photograph, see where it was taken, its candidates and their matches.

    The same as JSON: curl -F photo=@query.jpg http://127.0.0.1:8000/api/locate, described in /openapi.json. Nothing is
    kept of what is uploaded, and no other machine reaches it.
    """

    index: Path
    """Folder that `rerankvpr index build` wrote."""
    port: int = 8000
    """Port on 127.0.0.1; 0 takes a free one."""
    top: int = 5
    """Candidates shown for each photograph."""
    max_mb: float = 20.0
    """Most MB of an upload."""
    max_megapixels: float = 64.0
    """Most millions of pixels of an upload."""
    device: str | None = None
    """Where the network computes, such as cuda:1; the GPU where there is one."""
    plugins: tuple[str, ...] = ()
    """Plug-ins to run, files or modules, that the network needs."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"--top {self.top}: expected 1 or more")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port}: expected 0 to 65535")
        if not (self.max_mb > 0 and self.max_megapixels > 0):
            raise ValueError("--max-mb and --max-megapixels: expected more than 0")


def main(argv: list[str]) -> int:
    """Serves until SIGTERM or Ctrl-C; what is being answered then has `GRACE_S` seconds."""
    command = parse_flags(ServeCommand, argv, prog="rerankvpr serve")
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise ValueError(f"serve: {', '.join(missing)} not installed; pip install 'rerankvpr[serve]'")
    load_plugins(command.plugins)
    listener = _listen(command.port)
    with contextlib.closing(listener):
        from eval.index.index import Index
        from launch.serve_app import create_app

        index = Index.open(command.index, device=command.device)
        _ = index.network, index.images  # a damaged index is said now, not to the first client
        app = create_app(index, top=command.top, max_mb=command.max_mb, max_megapixels=command.max_megapixels)
        port = listener.getsockname()[1]
        listener.listen()  # who has read the line may connect
        console = Console(soft_wrap=True)
        console.print(
            f"{command.index}: {len(index):,} photographs at http://{HOST}:{port} (Ctrl-C ends it)", highlight=False
        )
        ended_by = _serve(app, listener)
    console.print(f"rerankvpr: serve: ended by {ended_by}" if ended_by else "rerankvpr: serve: ended", highlight=False)
    return 0


def _listen(port: int) -> socket.socket:
    """A socket on a port of this machine. Raises ValueError where another program has it."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"--port {port}: {error.strerror}; another --port, or 0 for a free one") from error
    return listener


def _serve(app: FastAPI, listener: socket.socket) -> str:
    """Serves in this process until a signal, and returns the signal's name."""
    import uvicorn

    ended_by = ""

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Ends on a signal without raising it again, as uvicorn's own does: to end a server is no error."""

            def note(number: int, frame: Any) -> None:
                nonlocal ended_by
                ended_by = signal.Signals(number).name
                self.handle_exit(number, frame)

            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S
    )
    Server(config).run(sockets=[listener])
    return ended_by
