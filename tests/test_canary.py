"""A password and a key that only addresses hold: verbs are run against servers that fail in every way, and then all
that was printed or written is searched for them. `make test-faults` tries more kinds of failure.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import forked
from tests.ports import free_port

pytestmark = pytest.mark.slow

PASSWORD, KEY = "c4naryPa55word", "c4naryQu3ry"
LIMIT_S = 240


class Failing(BaseHTTPRequestHandler):
    """Fails as the first part of the path says, and quotes the whole request, as proxies do."""

    def do_GET(self) -> None:
        how = self.path.split("/")[1].partition("?")[0]
        body = f"cannot serve {self.path} {self.headers.get('Authorization')} {PASSWORD}".encode()
        if how == "garbled":
            self.wfile.write(b"\x00garbled " + body)
        elif how == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + body)
        elif how == "moved":
            self.send_response(302)
            self.send_header("Location", f"http://bob:{PASSWORD}@127.0.0.1:1/x?key={KEY}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif how in ("403", "404", "500"):
            self.send_response(int(how), f"no {self.path}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        self.close_connection = True

    do_POST = do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def holding_it(folder: Path) -> list[str]:
    """Files, by name or by content, that hold the password or the key."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if any(word.encode() in content or word in path.name for word in (PASSWORD, KEY)):
            found.append(str(path.relative_to(folder)))
    return found


def run(folder: Path, *argv: str) -> str:
    """What a verb prints; it must print and write neither the password nor the key."""
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    environment |= {"HOME": str(folder), "RERANKVPR_TRACEBACK": "0"}
    done = forked.run(folder, "rerankvpr", *argv, environment=environment, timeout=LIMIT_S)
    printed = done.stdout + done.stderr
    assert PASSWORD not in printed, f"{argv[0]} printed the password:\n{printed}"
    assert KEY not in printed, f"{argv[0]} printed the key:\n{printed}"
    assert printed, f"{argv[0]} said nothing"
    assert not holding_it(folder), f"{argv[0]} wrote it to {holding_it(folder)}"
    return printed


@pytest.mark.parametrize("how", ["refused", "garbled", "moved"])
def test_shards_behind_a_failing_server(how: str, port: int, tmp_path: Path) -> None:
    run_verbs_on_shards(how, port, tmp_path)


@pytest.mark.parametrize("how", ["500"])
def test_a_training_whose_tracking_fails(how: str, port: int, workplace: Path, tmp_path: Path) -> None:
    run_verbs_with_tracking(how, port, workplace, tmp_path)


def run_verbs_on_shards(how: str, port: int, tmp_path: Path) -> None:
    """Verbs on shards behind a server that fails in one way."""
    at = free_port() if how == "refused" else port
    address = f"http://ann:{PASSWORD}@127.0.0.1:{at}/{how}/set?key={KEY}"
    flags = ["--data.shards", address, "--data.remote-retry-s", "0.2", "--output", "out", "--tracking.enabled", "False"]
    inspect = ["inspect", address, "--remote-retry-s", "2"]
    for command in (["train", "demo", *flags], ["plan", "demo", *flags], inspect):
        run(tmp_path, *command)


def run_verbs_with_tracking(how: str, port: int, workplace: Path, tmp_path: Path) -> None:
    """A training whose MLflow server fails in one way, and the verbs that use its output."""
    at = free_port() if how == "refused" else port
    address = f"http://ann:{PASSWORD}@127.0.0.1:{at}/{how}?key={KEY}"
    recipe = yaml.safe_load((workplace / "recipe.yaml").read_text())
    recipe["trainer"] |= {"max_steps": 1, "validate_every_epochs": 0}
    recipe["eval"] = {"benchmarks": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    uri = ["--tracking.uri", address]
    said = run(tmp_path, "train", "recipe.yaml", "--output", "out", *uri)
    assert f"http://127.0.0.1:{at}" in said
    run(tmp_path, "sync", "out", "--uri", address)
    run(tmp_path, "submit", "--dry-run", "--", "train", "recipe.yaml", "--output", "out", *uri)
    run(tmp_path, "launch", "--dry-run", "--nproc-per-node", "2", "--", "train", "recipe.yaml", *uri)
    evaluated = ["--benchmarks", f"folder:{workplace / 'town'}", "--image-size", "28"]
    run(tmp_path, "eval", "--checkpoint", "out", *evaluated, "--track", "--out", "results")
    retries = ["--remote-retry-s", "2"]
    run(tmp_path, "index", "build", address, "--checkpoint", "out", "--out", "an.index", *retries)
    run(tmp_path, "export", "out", f"{address}.safetensors")
    assert list((tmp_path / "out").iterdir())
