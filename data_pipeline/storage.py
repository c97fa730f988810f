"""Bytes of shard sets, wherever they lie: local files by `pread`, http, s3 and others through fsspec."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from configs.reading import open_regular, read_regular
from configs.secrets import without_secrets
from data_pipeline.cache import RangeCache

TRY_S, WHOLE_FILE_S = 60.0, 900.0  # after which a server that sends nothing more counts as failed
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_SAID_EVERY_S = 10.0
_OPEN_FILES = 128
_BUSY = (408, 425, 429)


_T = TypeVar("_T")


class StorageError(OSError):
    """Bytes that cannot be read; the text names the file, the fault and how long it was tried."""


@dataclass(frozen=True)
class RemoteFile:
    """A file's length in bytes, and its last change in nanoseconds by the server's clock (0 if it does not say)."""

    size: int
    changed_ns: int


def is_remote(location: str) -> bool:
    """Whether a location is a URL, not a path of this machine."""
    return "://" in location


def join(folder: str, name: str) -> str:
    """The location of a file in a folder or under a URL."""
    return f"{folder.rstrip('/')}/{name}"


class RangeReader:
    """Reads byte ranges, from any number of threads; what fails remotely is tried again for `retry_s` seconds.

    Tries are spaced by a doubling, jittered pause. What no second try can mend (not found, not allowed, a server that
    ignores ranges) is an error at once. `cache` keeps remote ranges; `on_retry` gets a line for each outage.
    """

    def __init__(
        self,
        *,
        retry_s: float = 120.0,
        cache: RangeCache | None = None,
        on_retry: Callable[[str], None] | None = None,
    ) -> None:
        self.retry_s, self.cache = retry_s, cache
        self.on_retry = on_retry or (lambda text: print(f"rerankvpr: {text}", file=sys.stderr))
        self.retries = 0
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._systems: dict[str, Any] = {}
        self._said = -_SAID_EVERY_S
        self._jitter = random.Random()  # its own: nobody's draws depend on a server

    def read(
        self,
        location: str,
        start: int,
        length: int,
        *,
        version: str = "",
        fresh: bool = False,
        stop: threading.Event | None = None,
    ) -> bytes:
        """`length` bytes from byte `start`; fewer only where a local file ends.

        `version` tells contents apart that a location has had (its digest); `fresh` passes over the cache and renews
        it; setting `stop` ends the waiting for a server. Raises FileNotFoundError or StorageError.
        """
        if not is_remote(location):
            return self._local(location).read(start, length)
        if self.cache is None:
            return self._remote(location, start, length, stop)
        key = f"{location}\0{version}\0{start}\0{length}"
        data = None if fresh else self.cache.get(key, length)
        if data is None:
            data = self._remote(location, start, length, stop)
            self.cache.put(key, data)
        return data

    def read_file(self, location: str) -> bytes:
        """A whole file. Raises FileNotFoundError or StorageError."""
        return self._remote(location) if is_remote(location) else read_regular(location)

    def _local(self, path: str) -> _File:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)  # closed by the last thread that still reads it
            self._files.move_to_end(path)
            return file

    def stat(self, url: str) -> RemoteFile:
        """Bytes and last change of a file behind a URL. Raises FileNotFoundError or StorageError."""

        def ask() -> RemoteFile:
            system, path = self._system(url)
            if url.startswith(("http://", "https://")):  # fsspec takes an outage for a missing file
                return _remote_file(sync(system.loop, _http_info, system, path, timeout=TRY_S))
            if isinstance(system, AsyncFileSystem):
                return _remote_file(sync(system.loop, system._info, path, timeout=TRY_S))
            with self._lock:
                return _remote_file(system.info(path))

        return self._tried(url, ask)

    def folder(self, url: str) -> tuple[dict[str, RemoteFile], list[str]]:
        """Files and names of folders that lie directly in a folder. Raises FileNotFoundError or StorageError."""

        def ask() -> tuple[dict[str, RemoteFile], list[str]]:
            system, path = self._system(url)
            if isinstance(system, AsyncFileSystem):
                entries = sync(system.loop, system._ls, path, detail=True, timeout=WHOLE_FILE_S)
            else:
                with self._lock:
                    entries = system.ls(path, detail=True)
            if hasattr(system, "dircache"):
                system.dircache.clear()  # it would hold every folder of a bucket
            files, folders = {}, []
            for entry in entries:
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if entry["type"] == "directory":
                    folders.append(name)
                elif not entry["name"].endswith("/"):
                    files[name] = _remote_file(entry)
            return files, sorted(folders)

        return self._tried(url, ask)

    def _remote(
        self, url: str, start: int | None = None, length: int | None = None, stop: threading.Event | None = None
    ) -> bytes:
        return self._tried(url, lambda: self._try(url, start, length), stop)

    def _tried(self, url: str, attempt: Callable[[], _T], stop: threading.Event | None = None) -> _T:
        failed_at, pause, shown = None, _FIRST_PAUSE_S, without_secrets(url, is_address=True)
        while True:
            try:
                result = attempt()
            except Exception as error:  # every backend has its own errors; what is not mended by time is raised
                if isinstance(error, MemoryError):
                    raise
                now = time.monotonic()
                failed_at = failed_at or now
                reason = without_secrets(str(error).splitlines()[0]) if str(error) else type(error).__name__
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{shown}: not found") from error
                left = failed_at + self.retry_s - now
                if _is_final(error) or left <= 0 or (stop and stop.is_set()):
                    tried = f" (tried for {now - failed_at:.0f} s)" if now - failed_at > 1 else ""
                    raise StorageError(f"{shown}: cannot be read{tried}: {reason}") from error
                self._note(f"{shown}: {reason}; trying again for up to {self.retry_s:g} s")
                wait = min(left, pause * self._jitter.uniform(0.5, 1.0))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                stop.wait(wait) if stop else time.sleep(wait)
            else:
                return result

    def _try(self, url: str, start: int | None, length: int | None) -> bytes:
        end = None if start is None or length is None else start + length
        system, path = self._system(url)
        if isinstance(system, AsyncFileSystem):
            timeout = TRY_S if length is not None else WHOLE_FILE_S
            if url.startswith(("http://", "https://")) and start is not None and length is not None:
                data: bytes = sync(system.loop, _http_range, system, path, start, length, timeout=timeout)
            else:
                data = sync(system.loop, system._cat_file, path, start=start, end=end, timeout=timeout)
        else:
            with self._lock:
                data = system.cat_file(path, start=start, end=end)
        if length is not None and len(data) > length:
            raise _IgnoredRangeError(
                f"asked for {length} bytes, got {len(data)} or more; the server must answer range requests"
            )
        if length is not None and len(data) < length:
            raise EOFError(f"{len(data)} bytes came, not {length}")
        return data

    def _system(self, url: str) -> tuple[Any, str]:
        protocol = url.partition("://")[0]
        with self._lock:
            if protocol not in self._systems:
                try:
                    self._systems[protocol] = fsspec.filesystem(
                        protocol, skip_instance_cache=True, **_one_try(protocol)
                    )
                except (ImportError, ValueError) as error:
                    raise _MissingBackendError(str(error)) from error
            system = self._systems[protocol]
        return system, system._strip_protocol(url)

    def _note(self, text: str) -> None:
        with self._lock:
            self.retries += 1
            now = time.monotonic()
            silent = now - self._said < _SAID_EVERY_S
            if not silent:
                self._said = now
        if not silent:
            self.on_retry(text)


def _one_try(protocol: str) -> dict[str, Any]:
    """Options that leave trying again to `RangeReader`: botocore alone would try for a quarter of a minute first."""
    if protocol not in ("s3", "s3a"):
        return {}
    asked = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **asked}}


def _remote_file(info: Mapping[str, Any]) -> RemoteFile:
    """What a server says of a file, in the words of http, s3 or other backends of fsspec."""
    changed = info.get("Last-Modified") or info.get("LastModified") or info.get("mtime") or info.get("created")
    if isinstance(changed, str):
        with contextlib.suppress(ValueError):
            changed = parsedate_to_datetime(changed)
    seconds = changed.timestamp() if isinstance(changed, datetime.datetime) else changed
    size = info.get("size")
    if size is None:
        raise _NoSizeError("the server does not say how long it is")
    return RemoteFile(int(size), round(seconds * 1e9) if isinstance(seconds, int | float) else 0)


async def _http_range(system: Any, url: str, start: int, length: int) -> bytes:
    """The bytes of a range; a server that sends more is left at the first byte too many."""
    session = await system.set_session()
    asked = {**system.kwargs}
    asked["headers"] = {**asked.get("headers", {}), "Range": f"bytes={start}-{start + length - 1}"}
    data = bytearray()
    async with session.get(system.encode_url(url), **asked) as answer:
        system._raise_not_found_for_status(answer, url)
        async for chunk in answer.content.iter_chunked(1 << 18):
            data += chunk
            if len(data) > length:
                answer.close()
                break
    return bytes(data)


async def _http_info(system: Any, url: str) -> dict[str, Any]:
    """Length and time of a file, by the request that servers answer if they answer ranges at all."""
    session = await system.set_session()
    asked = {**system.kwargs}
    asked["headers"] = {**asked.get("headers", {}), "Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with session.get(system.encode_url(url), **asked) as answer:
        empty = answer.status == 416
        if not empty:
            system._raise_not_found_for_status(answer, url)
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        length = total if total.isdigit() else answer.headers.get("Content-Length") if answer.status == 200 else None
        answer.close()
    return {"size": 0 if empty else length, "Last-Modified": answer.headers.get("Last-Modified")}


class _IgnoredRangeError(Exception):
    pass


class _NoSizeError(Exception):
    pass


def ignored_range(error: StorageError) -> bool:
    """Whether a read failed because the server knows no ranges."""
    return isinstance(error.__cause__, _IgnoredRangeError)


def open_tar(path: str) -> int:
    """A descriptor of a tar of this machine, for reading. Raises OSError."""
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        hint = "the index names it, but it is not there; `rerankvpr verify` lists all that is missing"
        raise FileNotFoundError(f"{path}: {hint}") from error


class _MissingBackendError(Exception):
    pass


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if type(error.__cause__).__module__ == "aiohttp.http_exceptions":  # a garbled answer, given status 400
        return False
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _BUSY
    return refused or isinstance(error, (PermissionError, _IgnoredRangeError, _NoSizeError, _MissingBackendError))


class _File:
    """An open file, closed when nobody holds it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = open_tar(path)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, start)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
