"""A bucket behind moto's S3 server, filled from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REASON = "s3 needs the extra s3 and moto's server"


@contextmanager
def bucket_of(folder: Path, name: str = "places") -> Iterator[str]:
    """The URL of a bucket with all files of a folder; the environment leads s3 there while the block lasts."""
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
                    client.upload_file(str(file), name, str(file.relative_to(folder)))
            yield f"s3://{name}"
    finally:
        server.stop()
