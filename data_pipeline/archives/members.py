"""The members of a tar or zip, and how one becomes a file's bytes again."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from configs.reading import reason, shown
from data_pipeline.archives.files import Archive
from data_pipeline.storage import StorageError

BLOCK = tarfile.BLOCKSIZE
LARGEST = 2**30  # more is no photograph, and would be held in memory
_LARGEST_HEADER = 2**20
_END_LOOKED_AT = 20 * BLOCK  # tars are filled up to this with zeros
_LOCAL_HEADER = struct.Struct("<4s22xHH")
PLAIN, ZIP_STORED, ZIP_DEFLATED = 0, 1, 2
_ZIP_METHODS = {zipfile.ZIP_STORED: ZIP_STORED, zipfile.ZIP_DEFLATED: ZIP_DEFLATED}
NO_CRC = -1


class DamagedArchiveError(ValueError):
    """An archive that cannot be read on from some byte; the text says where and why, and not which archive."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name, its stored bytes [offset, offset + length), and its own size.

    `method` is how it is stored (PLAIN, ZIP_...; a zip's bytes begin at the member's header), `crc32` what the archive
    says of it, `why` says why it cannot be used, `after` is where reading continues behind it.
    """

    name: str
    offset: int
    length: int
    size: int
    after: int
    method: int = PLAIN
    crc32: int = NO_CRC
    why: str = ""


def plain_name(name: str) -> str:
    """A member's name without `./` or `/` before it, and with slashes."""
    name = name.replace("\\", "/")
    while name.startswith(("./", "/")):
        name = name.removeprefix("./").lstrip("/")
    return name


def unpack(stored: bytes, method: int, size: int, crc32: int = NO_CRC) -> bytes:
    """A member's own bytes from its stored ones. Raises ValueError if they are not those that the archive promised."""
    if method == PLAIN:
        data = stored
    else:
        if len(stored) < _LOCAL_HEADER.size:
            raise ValueError("cut off in its archive")
        signature, name, extra = _LOCAL_HEADER.unpack_from(stored)
        if signature != b"PK\3\4":
            raise ValueError("no zip member where the archive's directory says")
        start = _LOCAL_HEADER.size + name + extra
        if method == ZIP_STORED:
            data = stored[start : start + size]
        else:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored[start:], size + 1)
            except zlib.error as error:
                raise ValueError(f"damaged in its archive ({reason(error)})") from error
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes in its archive, not the {size} that it says")
    if crc32 != NO_CRC and zlib.crc32(data) != crc32:
        raise ValueError("its bytes do not match the archive's crc32")
    return data


def members_of(archive: Archive, file: io.RawIOBase, start: int = 0) -> Iterator[Member]:
    """The members of an archive from `start` (an earlier member's `after`), in the order in which they lie.

    Folders are left out. Raises DamagedArchiveError behind the last member that can be told, if the archive is cut off,
    damaged, or continues behind its end.
    """
    if archive.is_zip:
        return _zip_members(file, start)
    return _tar_members(archive, file, start)


def opened(archive: Archive, file: io.RawIOBase) -> io.RawIOBase:
    """The archive's file, or what unpacks it if it is compressed as a whole."""
    name = archive.name.lower()
    if not archive.is_compressed:
        return file
    if name.endswith((".gz", ".tgz")):
        return _Unpacked(gzip.GzipFile(fileobj=file))
    if name.endswith((".xz", ".txz")):
        return _Unpacked(lzma.LZMAFile(cast(IO[bytes], file)))
    return _Unpacked(bz2.BZ2File(cast(IO[bytes], file)))


class _Unpacked(io.RawIOBase):
    """A compressed file's content, whose damage is a DamagedArchiveError."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._guarded(self._file.seek, offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        return bytes(self._guarded(self._file.read, -1 if size is None else size))

    def _guarded(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except StorageError:
            raise
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise DamagedArchiveError(f"its compressed bytes are cut off or damaged ({reason(error)})") from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise DamagedArchiveError(f"its compressed bytes are damaged ({reason(error)})") from error


class _Headers(io.RawIOBase):
    """What tarfile reads headers from: refuses to read what no header is, remembers the last block."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.last: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        at = self._file.tell()
        data = self._file.read(size) or b""
        if size == BLOCK:
            self.last = (at, data)
        return data


def _tar_members(archive: Archive, file: io.RawIOBase, start: int) -> Iterator[Member]:
    headers = _Headers(file)
    file.seek(start)
    at, name = start, ""
    tar: tarfile.TarFile | None = None
    try:
        while True:
            if tar is None:
                # At byte 0 tarfile raises for what is no tar; its members are read by next() alone.
                tar = tarfile.TarFile(fileobj=cast(IO[bytes], headers), errorlevel=0)
            found = tar.next()
            tar.members.clear()  # type: ignore[attr-defined]  # it would hold every member
            if found is None:
                break
            after = int(tar.offset)
            if found.size < 0 or after <= at:
                raise tarfile.ReadError(f"a member of {found.size} bytes")
            at, name = after, found.name
            if not found.isdir():
                yield _tar_member(archive, found, after)
    except StorageError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, IndexError, EOFError) as error:
        if isinstance(error, DamagedArchiveError):
            raise DamagedArchiveError(f"{error}, {_behind(name)}") from error
        raise DamagedArchiveError(f"no tar from byte {at} on ({reason(error)}), {_behind(name)}") from error
    _check_end(file, headers, tar.offset, name)


def _behind(name: str) -> str:
    return f"behind {shown(name)}" if name else "at its first member"


def _check_end(file: io.RawIOBase, headers: _Headers, at: int, name: str) -> None:
    """Raises DamagedArchiveError unless the two blocks of zeros that end a tar are where it ended."""
    block = headers.last[1] if headers.last[0] == at else b""
    if not block:
        file.seek(at)
        block = file.read(BLOCK) or b""
    if len(block) < BLOCK:
        raise DamagedArchiveError(
            f"cut off at byte {at + len(block)}, {_behind(name)}: the mark of a tar's end is missing"
        )
    if block.count(0) != BLOCK:
        raise DamagedArchiveError(f"no tar header at byte {at}, {_behind(name)}")
    rest = file.read(_END_LOOKED_AT) or b""
    if rest.count(0) != len(rest):
        raise DamagedArchiveError(
            f"more bytes behind its end at byte {at} (tars joined into one? unpack them one by one)"
        )


def _tar_member(archive: Archive, found: tarfile.TarInfo, after: int) -> Member:
    why = ""
    if found.issym() or found.islnk():
        why = "a link"
    elif found.issparse():
        why = "sparse"
    elif not found.isreg():
        why = "no regular file"
    elif found.size > LARGEST:
        why = f"larger than {LARGEST} bytes"
    elif not archive.is_compressed and found.offset_data + found.size > archive.size:
        why = "cut off: its archive ends in it"
    return Member(plain_name(found.name), found.offset_data, found.size, found.size, after, why=why)


def _zip_members(file: io.RawIOBase, start: int) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(cast(IO[bytes], file)) as directory:
            entries = sorted(directory.infolist(), key=lambda entry: entry.header_offset)
            end = int(directory.start_dir)
    except StorageError:
        raise
    except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, EOFError, struct.error) as error:
        raise DamagedArchiveError(f"no zip, or cut off ({reason(error)}): its directory is at its end") from error
    ends = [*(entry.header_offset for entry in entries[1:]), end]
    for number, (entry, stop) in enumerate(zip(entries, ends, strict=True)):
        if number >= start and not entry.is_dir():
            yield _zip_member(entry, stop, number + 1)


def _zip_member(entry: zipfile.ZipInfo, stop: int, after: int) -> Member:
    method, length = _ZIP_METHODS.get(entry.compress_type, PLAIN), stop - entry.header_offset
    why = ""
    if stat.S_ISLNK(entry.external_attr >> 16):
        why = "a link"
    elif entry.flag_bits & 1:
        why = "encrypted"
    elif method == PLAIN:
        why = f"compressed by method {entry.compress_type}"
    elif max(entry.file_size, length) > LARGEST:
        why = f"larger than {LARGEST} bytes"
    elif length < _LOCAL_HEADER.size or entry.header_offset < 0:
        why = "overlaps another"
    return Member(
        plain_name(entry.filename), entry.header_offset, length, entry.file_size, after, method, entry.CRC, why
    )
