"""A file server with ranges that can be killed: `python -m tests.http_ranges FOLDER PORT [ignore-ranges] [latency=MS]`.

It prints its port, and a line for each request that it answers.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent


class Handler(SimpleHTTPRequestHandler):
    """Answers GET with 206 and the bytes asked for."""

    protocol_version = "HTTP/1.1"
    ranges = True
    latency_s = 0.0

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            self.wfile.write(file.read(stop - start))

    def log_message(self, *args: Any) -> None:
        pass


def wait_for_port(port: int) -> None:
    """Returns when somebody listens there; RuntimeError after ten seconds."""
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nobody listens on port {port}")


class KillableServer:
    """The server in a process of its own, always on the same port."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.folder, self.options = folder, options
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.http_ranges", str(self.folder), str(self.port), *self.options], cwd=ROOT
        )
        wait_for_port(self.port)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def main() -> None:
    folder, port = sys.argv[1], int(sys.argv[2])
    Handler.ranges = "ignore-ranges" not in sys.argv
    Handler.latency_s = sum(float(word[8:]) / 1000 for word in sys.argv if word.startswith("latency="))
    ThreadingHTTPServer(("127.0.0.1", port), lambda *args: Handler(*args, directory=folder)).serve_forever()


if __name__ == "__main__":
    main()
