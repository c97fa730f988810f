"""`rerankvpr serve`: the engine's own answers over HTTP, its limits, its end, and the page in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rerankvpr
from eval.index.index import Index
from eval.report.locations import as_json
from launch.serve_command import main as serve
from tests import forked
from tests.indexes import noise_index

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from starlette.testclient import TestClient

from launch.serve_app import create_app

ROOT = forked.ROOT
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def photos(noise_benchmark: Path) -> Path:
    return noise_benchmark / "images" / "test"


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """An index of the database."""
    return noise_index(tmp_path_factory.mktemp("index"), photos, rerank={"top_k": 4, "nn_match_thresh": 0.3})


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return Index.open(folder, device="cpu")


@pytest.fixture
def client(index: Index) -> TestClient:
    return TestClient(create_app(index, top=3, max_mb=0.5, max_megapixels=1), base_url="http://127.0.0.1")


def query(photos: Path) -> Path:
    return sorted((photos / "queries").iterdir())[0]


def test_an_answer_is_the_engines(client: TestClient, index: Index, photos: Path) -> None:
    path = query(photos)
    reply = client.post("/api/locate", files={"photo": ("../../etc/passwd", path.read_bytes())})
    assert reply.status_code == 200
    answer, expected = reply.json(), as_json(index.locate(path, top_k=3)[0])
    for key in ("in_map", "confidence", "threshold", "position", "patches"):
        assert answer[key] == expected[key], key
    assert len(answer["candidates"]) == 3
    for ours, theirs in zip(answer["candidates"], expected["candidates"], strict=True):
        assert all(ours[key] == theirs[key] for key in theirs if key != "root")
        assert ours["image"] == f"/api/photographs/{ours['number']}"
        assert len(ours["lines"]) == ours["matches"]
        assert all(0 < line[key] < 1 for line in ours["lines"] for key in ("query_x", "query_y", "x", "y"))
        picture = client.get(ours["image"])
        assert picture.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(picture.content)).format == "JPEG"
    assert any(candidate["lines"] for candidate in answer["candidates"])
    assert rerankvpr.Index is Index
    points = client.get("/api/map").json()
    assert (points["photographs"], len(points["points"])) == (7, 7)


def test_the_photograph_alone_goes_through_the_network(client: TestClient, index: Index, photos: Path) -> None:
    """Candidates are drawn by the local features that the index holds."""
    batches: list[int] = []
    handle = index.network.register_forward_hook(lambda _m, given, _o: batches.append(len(given[0])))
    try:
        reply = client.post("/api/locate", files={"photo": ("a.jpg", query(photos).read_bytes())})
    finally:
        handle.remove()
    assert any(candidate["lines"] for candidate in reply.json()["candidates"])
    assert batches == [1]


def png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (width, height)).save(data, "PNG")
    return data.getvalue()


def avif_without_its_item() -> bytes:
    """Pillow raises RuntimeError where it reads this one's size."""
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, "AVIF")
    return data.getvalue().replace(b"pitm", b"pitx")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"hello", 422, "not a readable image (its bytes are of no image format that is read"),
        (b"", 422, "empty file"),
        (avif_without_its_item(), 422, "not a readable image"),
        (png(1001, 1000), 413, "1001 x 1000 pixels; at most 1 megapixels here"),
        (os.urandom(600_000), 413, "at most 0.5 MB"),
    ],
)
def test_what_is_no_photograph_or_too_large_is_refused(
    client: TestClient, data: bytes, status: int, words: str
) -> None:
    reply = client.post("/api/locate", files={"photo": ("a.jpg", data)})
    assert reply.status_code == status
    assert words in reply.json()["detail"]


def test_a_body_of_no_announced_length_is_bounded_too(client: TestClient) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'
    pieces = (head if i == 0 else b"0" * 65536 for i in range(20))
    reply = client.post("/api/locate", content=pieces, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert reply.status_code == 413


def test_only_the_indexs_own_photographs_are_given(client: TestClient) -> None:
    for path in ("7", "-1", "99999999999999999999", "..%2f..%2fetc%2fpasswd", "a"):
        assert client.get(f"/api/photographs/{path}").status_code in (404, 422), path
    for path in ("/page.py", "/serve_page/page.html", "/../pyproject.toml", "/docs", "/redoc"):
        assert client.get(path).status_code == 404, path


def test_headers_keep_the_page_to_itself(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    texts = [page.text, client.get("/page.js").text, client.get("/page.css").text]
    assert not [found for text in texts for found in re.findall(r"https?://[^\s\"]+", text) if "w3.org" not in found]
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_the_api_describes_itself(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/api/locate", "/api/map", "/api/photographs/{number}"}
    assert "multipart/form-data" in paths["/api/locate"]["post"]["requestBody"]["content"]


def test_what_cannot_be_served_is_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match="another --port, or 0 for a free one"):
            serve(["--index", str(folder), "--port", port])
    with pytest.raises(ValueError, match="no such folder"):
        serve(["--index", str(tmp_path / "nothing"), "--port", "0"])
    with pytest.raises(ValueError, match="--port 70000"):
        serve(["--index", str(folder), "--port", "70000"])


class Server:
    """`rerankvpr serve` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.process = forked.Command(ROOT, "rerankvpr", "serve", "--index", str(folder), "--port", "0", apart=True)
        forked.wait_until(lambda: self.process.poll() is not None or "\n" in self.process.output()[0], 60)
        found = re.search(r"http://127\.0\.0\.1:\d+", self.process.output()[0])
        assert found, self.process.output()
        self.address = found[0]


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder)
    try:
        yield made
    finally:
        made.process.kill()


def ask(address: str, data: bytes) -> Any:
    head = b'--x\r\nContent-Disposition: form-data; name="photo"; filename="a.jpg"\r\n\r\n'
    request = urllib.request.Request(f"{address}/api/locate", head + data + b"\r\n--x--\r\n")
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_over_loopback_and_ends_when_asked(server: Server, photos: Path, number: signal.Signals) -> None:
    assert len(ask(server.address, query(photos).read_bytes())["candidates"]) == 5
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server.address, b"hello")
    assert caught.value.code == 422
    server.process.send_signal(number)
    out, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, err) == (0, "")
    assert out.splitlines()[1:] == [f"rerankvpr: serve: ended by {number.name}"]


@pytest.mark.slow
def test_the_page_in_a_browser(server: Server, photos: Path, tmp_path: Path) -> None:
    """A photograph by the keyboard's own road, candidates and matches, no error, no sideways scrolling at 360 px."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"no browser at {CHROMIUM}")
    shots = Path(os.environ.get("RERANKVPR_TEST_SHOTS") or tmp_path)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740})
        errors: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.address)
        page.get_by_text("An index of 7 photographs").wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.set_input_files("#file", query(photos))
        page.locator("#candidates button").nth(4).wait_for()
        page.locator("#matches image").nth(1).wait_for(state="attached")
        assert page.locator("#matches image").count() == 2
        assert page.locator("#candidates img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.locator("#candidates button[aria-pressed=true]").inner_text().startswith("2.")
        assert page.locator("#map circle").count() >= 7
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.screenshot(path=shots / "serve_360.png", full_page=True)
        page.set_viewport_size({"width": 1100, "height": 900})
        page.screenshot(path=shots / "serve_1100.png", full_page=True)
        bad = tmp_path / "notes.jpg"
        bad.write_text("hello")
        page.set_input_files("#file", bad)
        page.locator("#said.bad").wait_for()
        assert "not a readable image" in page.locator("#said").inner_text()
        assert [text for text in errors if "422" not in text] == []  # the browser's own line on the refusal
        assert all(url.startswith((server.address, "blob:", "data:")) for url in asked), asked
        browser.close()


def test_many_photographs_are_thinned_on_the_map(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import serve_app

    monkeypatch.setattr(serve_app, "MOST_POINTS", 3)
    app = TestClient(create_app(index), base_url="http://127.0.0.1")
    numbers = [point["number"] for point in app.get("/api/map").json()["points"]]
    assert numbers == np.linspace(0, 6, 3).astype(int).tolist()
