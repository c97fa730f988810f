"""A bucket on moto's server, which speaks S3 over http."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REASON = "s3 needs the extra s3 and moto's server"


@dataclass(frozen=True)
class Bucket:
    """A bucket that is served, and its server's port."""

    url: str
    port: int
    server: Any  # moto ships no types

    def start_again(self) -> None:
        """Starts the server, which was stopped, at the same port."""
        self.server._port = self.port
        self.server.start()


@contextmanager
def served_bucket(folder: Path, name: str = "places", prefix: str = "") -> Iterator[Bucket]:
    """A bucket with all files of a folder, below `prefix`; the environment leads s3 there while the block lasts."""
    boto3 = pytest.importorskip("boto3", reason=REASON)
    moto = pytest.importorskip("moto.server", reason=REASON)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {
                "AWS_ENDPOINT_URL": f"http://{host}:{port}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            }.items():
                patch.setenv(key, value)
            client = boto3.client("s3")
            client.create_bucket(Bucket=name)
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    client.upload_file(str(file), name, str(prefix / file.relative_to(folder)))
            yield Bucket(f"s3://{name}/{prefix}".rstrip("/"), port, server)
    finally:
        server.stop()


@contextmanager
def bucket_of(folder: Path, name: str = "places") -> Iterator[str]:
    """The URL of such a bucket."""
    with served_bucket(folder, name) as bucket:
        yield bucket.url
