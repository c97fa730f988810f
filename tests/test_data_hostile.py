"""Servers that garble or never stop, tars outside their set, pipes named as photographs: a line or a retry, in time."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.images import read_image
from data_pipeline.index import INDEX, digest_line, file_sha256, read_index, read_table, write_table
from data_pipeline.photos import read_photo
from data_pipeline.storage import RangeReader, StorageError

GOOD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nContent-Range: bytes 0-3/8\r\n\r\nabcd"


@contextmanager
def answering(*answers: bytes, then: bytes = b"") -> Iterator[tuple[str, list[int]]]:
    """A server that gives one answer per connection, the last for ever after; `then` is repeated without end."""
    sent, open_ = [0], [True]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def serve() -> None:
            number = 0
            while open_[0]:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.recv(65536)
                    try:
                        connection.sendall(answers[min(number, len(answers) - 1)])
                        while then and open_[0]:
                            sent[0] += connection.send(then)
                    except OSError:
                        pass
                number += 1

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/x", sent
        finally:
            open_[0] = False
            thread.join()


@pytest.mark.parametrize(
    "garbled", [b"\0\1\2 what is this\r\n\r\n", b"HTTP/1.1 2oo OK\r\n\r\n", b"HTTP/1.1 206 OK\r\nx\r\n\r\n"]
)
def test_a_garbled_answer_is_asked_for_again(garbled: bytes) -> None:
    reader = RangeReader(retry_s=30, on_retry=lambda _: None)
    with answering(garbled, garbled, GOOD) as (url, _):
        assert reader.read(url, 0, 4) == b"abcd"
    assert reader.retries == 2


def test_a_refusal_is_final() -> None:
    reader = RangeReader(retry_s=30, on_retry=lambda _: None)
    with (
        answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as (url, _),
        pytest.raises(StorageError, match="cannot be read: 403"),
    ):
        reader.read(url, 0, 4)
    assert reader.retries == 0


@pytest.mark.parametrize("status", [b"200 OK", b"206 Partial Content"])
def test_a_body_without_end_is_left_at_the_length_that_was_asked_for(status: bytes) -> None:
    reader = RangeReader(retry_s=30, on_retry=lambda _: None)
    began = time.monotonic()
    with (
        answering(b"HTTP/1.1 " + status + b"\r\n\r\n", then=b"x" * 65536) as (url, sent),
        pytest.raises(StorageError, match=r"asked for 1000 bytes, got \d+ or more; the server must answer"),
    ):
        reader.read(url, 0, 1000)
    assert time.monotonic() - began < 20
    assert sent[0] < 64 << 20


def rewrite(folder: Path, name: str) -> None:
    """The set's index with its first tar called otherwise, as an index of another's making may."""
    table, said = read_table(folder / INDEX)
    old = said["shards"][0]["name"]
    said["shards"][0]["name"] = name
    shards = [name if one == old else one for one in table["shard"].to_pylist()]
    table = table.set_column(table.column_names.index("shard"), "shard", [shards])
    write_table(folder / INDEX, table, said)
    (folder / f"{INDEX}.sha256").write_bytes(digest_line(file_sha256(folder / INDEX)))


@pytest.mark.parametrize("name", ["../out.tar", "/etc/passwd", "shards/../../out.tar", "shards\\\\x", "a\0b"])
def test_a_tar_outside_the_set_is_refused(name: str, shard_set: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_set, tmp_path / "set")
    rewrite(tmp_path / "set", name)
    with pytest.raises(ValueError, match=rf"{INDEX}: not the metadata of a shard set \(tar .* is outside the set"):
        read_index(tmp_path / "set")


def test_a_link_that_leads_out_is_refused(shard_set: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_set, tmp_path / "set")
    tar = sorted((tmp_path / "set" / "shards").glob("*.tar"))[0]
    tar.rename(tmp_path / "outside.tar")
    tar.symlink_to(tmp_path / "outside.tar")
    with pytest.raises(ValueError, match=r"is a link that leads out of .*, which is refused"):
        read_index(tmp_path / "set")
    tar.unlink()
    shutil.copy(tmp_path / "outside.tar", tmp_path / "set" / "shards" / "inside.bin")
    tar.symlink_to("inside.bin")
    assert read_index(tmp_path / "set").num_places > 0


def test_a_pipe_a_device_and_a_folder_are_no_photographs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        for name in ("pipe", "folder", "device"):
            path = tmp_path / f"{name}.jpg"
            assert read_photo(path) == "unreadable (not a regular file)"
            with pytest.raises(OSError, match="not a regular file"):
                read_image(path, 14)
            with pytest.raises(OSError, match="not a regular file"):
                RangeReader().read(str(path), 0, 10)
        assert str(read_photo(tmp_path / "socket.jpg")).startswith("unreadable")
    assert str(read_photo(tmp_path / "a\0b.jpg")).startswith("unreadable")
