"""Archives by themselves: their bytes in windows, their members, rows that name them, what they cost; damage."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.archives.cost import Estimate
from data_pipeline.archives.files import Archive, WindowFile, find_archives
from data_pipeline.archives.members import DamagedArchiveError, members_of, opened, unpack
from data_pipeline.archives.wanted import key_of, wanted_members
from data_pipeline.storage import RangeReader
from tests.archives import gldv2, write_tar
from tests.photos import contents


def test_windows_give_the_bytes_of_the_file(tmp_path):
    rng = np.random.default_rng(3)
    data = rng.bytes(10_000)
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    for window, ahead in ((100, 0), (1000, 2), (20_000, 1)):
        with WindowFile(Archive(str(path), len(data), 0), RangeReader(), window, ahead) as file:
            for at, count in rng.integers(0, 10_500, (200, 2)).tolist():
                file.seek(at)
                assert file.read(count % 700) == data[at : at + count % 700]
            file.seek(0)
            assert file.read() == data
            for start in range(0, 10_000, 64):
                file.seek(start)
                assert file.read(64) == data[start : start + 64]


def test_rows_of_members_are_found_by_whole_name_or_id():
    keys = pa.array([f"{number:04d}" for number in range(500)])
    wanted = wanted_members(keys, True, np.arange(500))
    assert wanted.rows(["a/b/0007.jpg", "0499.jpg", "x/0500.jpg", "0007"]).tolist() == [7, 499, -1, 7]
    whole = wanted_members(pa.array(["a/1.jpg", "b/1.jpg"]), False, np.arange(2))
    assert whole.rows(["b/1.jpg", "1.jpg", "a/1.jpg"]).tolist() == [1, -1, 0]
    assert [key_of(name) for name in ("a/b.c.jpg", ".jpg", "x")] == ["b.c", ".jpg", "x"]


def test_the_estimate_prefers_what_takes_less_time():
    rates = {"photo_bytes": 1e5, "members": 10**6, "total_bytes": 10**11, "list_s": 1e-5, "window": 1}
    quick = Estimate(photographs=10**6, range_s=1e-4, sequence_rate=1e9, spill_rate=5e8, **rates)
    assert quick.ranges_s == pytest.approx(110)
    assert quick.sequence_s == pytest.approx(100 + 400)
    slow = Estimate(photographs=10**6, range_s=1e-2, sequence_rate=1e9, spill_rate=5e8, **rates)
    assert slow.sequence_s < slow.ranges_s
    assert "by ranges 110" not in str(quick)
    assert "by ranges 2 min" in str(quick)


def test_sets_are_named_by_paths_folders_patterns_and_braces(tmp_path):
    for name in ("b.tar", "a.tgz", "c.zip", ".hidden.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    reader = RangeReader()

    def names(*words: str) -> list[str]:
        return [archive.name for archive in find_archives([str(tmp_path / word) for word in words], reader)]

    assert names("") == ["a.tgz", "b.tar", "c.zip"]
    assert names("*.tar", "{a.tgz,c.zip}") == ["b.tar", "a.tgz", "c.zip"]
    with pytest.raises(FileNotFoundError, match="no archives there"):
        names("x*.tar")
    assert contents(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "zip", "tar.gz"])
def test_damage_anywhere_is_told_or_harmless(tmp_path, kind):
    sets = gldv2(tmp_path / "source", images=12, tars=1, landmarks=2)
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name in sets.names:
                file.writestr(name, (sets.loose / name).read_bytes())
    else:
        write_tar(path, sets, sets.names, mode="w:gz" if kind == "tar.gz" else "w")
    whole, rng = path.read_bytes(), np.random.default_rng(7)
    told = 0
    for _ in range(300):
        data = bytearray(whole)
        if rng.random() < 0.3:
            data = data[: int(rng.integers(len(data)))]
        for at in rng.integers(0, len(data), 3).tolist() if data else []:
            data[at] = int(rng.integers(256))
        archive = Archive(f"/x.{kind}", len(data), 0)
        file = opened(archive, io.BytesIO(data))  # type: ignore[arg-type]
        try:
            for member in members_of(archive, file):
                if not member.why:
                    file.seek(member.offset)
                    with contextlib.suppress(ValueError):
                        unpack(file.read(member.length) or b"", member.method, member.size, member.crc32)
        except DamagedArchiveError:
            told += 1
    assert told > 60
