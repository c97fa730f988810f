"""The web page of an index, and the same as JSON: photographs in, locations out; no file of a client's choice."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response, UploadFile
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data_pipeline.decoders import size_of
from eval.describer import LocalImage
from eval.index.index import Index
from eval.index.stored_local import stored_local
from eval.report.locations import as_json
from eval.report.thumbnails import small_jpeg

FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MOST_POINTS = 20_000  # on the map
LINES = 60  # matches given of a candidate
THUMBNAIL_SIDE = 640
WAIT_S = 60.0
UPLOADED = "the photograph"  # how errors name it
KEPT_LOCAL = 256  # candidates whose local features stay in memory


class Point(BaseModel):
    """A photograph of the index on the map."""

    number: int
    x: float = Field(description="Longitude in degrees, or metres to the east.")
    y: float = Field(description="Latitude in degrees, or metres to the north.")


class Map(BaseModel):
    """What the index holds, as points."""

    photographs: int
    in_degrees: bool
    points: list[Point] = Field(description=f"Photographs with a position, at most {MOST_POINTS} evenly chosen.")


class Matched(BaseModel):
    """One pair of patches, as shares of the width and height of both photographs."""

    query_x: float
    query_y: float
    x: float
    y: float
    cosine: float


class Candidate(BaseModel):
    """A photograph of the index that may show the place."""

    number: int
    name: str
    similarity: float
    matches: float | None
    lat: float | None
    lon: float | None
    east: float | None
    north: float | None
    zone: int
    apart_m: float | None
    image: str | None = Field(description="Address of its picture; null if its file is not here any more.")
    lines: list[Matched] = Field(description=f"The most alike of the matches that count, at most {LINES}.")


class Position(BaseModel):
    """An estimate; see `rerankvpr locate --json`."""

    lat: float | None
    lon: float | None
    east: float | None
    north: float | None
    zone: int
    spread_m: float
    support: float
    candidates: int


class Answer(BaseModel):
    """Where a photograph was taken."""

    in_map: bool | None = Field(description="Whether to believe it; null where the index is too small to teach it.")
    confidence: float | None
    threshold: float | None
    position: Position | None
    patches: int
    candidates: list[Candidate]


class BodyLimit:
    """Ends a request whose body exceeds a number of bytes with 413, announced or not, before it is kept anywhere."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts what is received."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.most:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self.text)
            return message

        await self.app(scope, counted, send)

    @property
    def text(self) -> str:
        return f"a photograph has at most {self.most / 2**20:g} MB here"

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.dumps({"detail": self.text})
        await Response(body, 413, media_type="application/json")(scope, receive, send)


def create_app(index: Index, *, top: int = 5, max_mb: float = 20.0, max_megapixels: float = 64.0) -> FastAPI:
    """The application of an index; one photograph is located at a time, others wait for it up to `WAIT_S` seconds."""
    app = FastAPI(
        title="rerankvpr",
        description="Where a photograph was taken, by an index of photographs.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, most=int(max_mb * 2**20))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])  # no other name leads here
    one_at_a_time = threading.Lock()

    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    for path, (name, kind) in FILES.items():
        app.get(path, include_in_schema=False)(functools.partial(_file, name, kind))

    @functools.lru_cache(KEPT_LOCAL)
    def local_of(number: int) -> LocalImage | None:
        path = index.path_of(number)
        return stored_local(index, index.features, number, path) if path else None

    @app.get("/api/map")
    def map_of_the_index() -> Map:
        """Where the photographs of the index were taken."""
        return _map(index)

    @app.post("/api/locate", responses={code: {"description": text} for code, text in REFUSALS.items()})
    def locate(photo: UploadFile) -> Answer:
        """Where an uploaded photograph was taken: candidates, matches, a position, whether to believe it."""
        data = photo.file.read()
        _check_pixels(data, max_megapixels)
        if not one_at_a_time.acquire(timeout=WAIT_S):
            raise HTTPException(503, "too many photographs wait; try again")
        try:
            features, _, errors = index.encode([data], [UPLOADED])
            if errors:
                raise HTTPException(422, errors[0].removeprefix(f"{UPLOADED}: "))
            told = as_json(index.location(UPLOADED, index.find(features, top), 0, top))
            query = stored_local(index, features, 0, data) if index.config.rerank.enabled else None
            for candidate in told["candidates"]:
                del candidate["root"]
                number = candidate["number"]
                there = index.path_of(number) is not None
                candidate["image"] = f"/api/photographs/{number}" if there else None
                candidate["lines"] = _lines(index, query, local_of(number)) if query is not None and there else []
            return Answer.model_validate(told)
        finally:
            one_at_a_time.release()

    @app.get("/api/photographs/{number}", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    def photograph(number: int) -> Response:
        """A photograph of the index, by its number, made small."""
        path = index.path_of(number) if 0 <= number < len(index) else None
        if path is None:
            raise HTTPException(404, f"photograph {number} is not here")
        try:
            picture = small_jpeg(path, THUMBNAIL_SIDE)
        except (OSError, ValueError) as error:
            raise HTTPException(404, f"photograph {number} cannot be read") from error
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    return app


REFUSALS = {
    413: "More bytes or pixels than are taken.",
    422: "No photograph.",
    503: "Too many photographs wait.",
}


def _file(name: str, kind: str) -> Response:
    return Response((resources.files("launch") / "serve_page" / name).read_bytes(), media_type=kind)


def _check_pixels(data: bytes, max_megapixels: float) -> None:
    """Raises HTTPException for a header that claims too many pixels; what is no photograph the decoder names."""
    try:
        width, height = size_of(data)
    except ValueError:
        return
    if width * height > max_megapixels * 1e6:
        raise HTTPException(413, f"{width} x {height} pixels; at most {max_megapixels:g} megapixels here")


def _map(index: Index) -> Map:
    positions = index.images.positions
    degrees = np.isfinite(positions.lat)
    in_degrees = bool(degrees.any())
    x, y = (positions.lon, positions.lat) if in_degrees else (positions.east, positions.north)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(known) > MOST_POINTS:
        known = known[np.linspace(0, len(known) - 1, MOST_POINTS).astype(int)]
    points = [Point(number=int(i), x=float(x[i]), y=float(y[i])) for i in known]
    return Map(photographs=len(index), in_degrees=in_degrees, points=points)


def _lines(index: Index, query: LocalImage, candidate: LocalImage | None) -> list[dict[str, Any]]:
    """The matches of a pair that count, the most alike first, in shares of both photographs."""
    if candidate is None:
        return []
    match = index.describer.match(query, candidate)
    counts = match.agrees_M & np.isfinite(match.points_a_M2).all(axis=1) & np.isfinite(match.points_b_M2).all(axis=1)
    own_M2 = match.points_a_M2[counts] / np.array(query.size[::-1])
    other_M2 = match.points_b_M2[counts] / np.array(candidate.size[::-1])
    rows = zip(own_M2[:LINES].tolist(), other_M2[:LINES].tolist(), match.cosine_M[counts][:LINES].tolist(), strict=True)
    return [{"query_x": a[0], "query_y": a[1], "x": b[0], "y": b[1], "cosine": cosine} for a, b, cosine in rows]
