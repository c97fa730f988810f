"""Photographs out of tars and zips, regrouped by place: the same shards as from loose files, whatever the archives."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards import ShardSummary, write_shards
from data_pipeline.sources.tars import Reading, finish, read_tars
from launch.cli import main
from tests.archive_runs import check_killed_at, peak_mb
from tests.archives import SMALL, Sets, add, gldv2, of_set, osv5m, photo, write_tar

WAYS = ("ranges", "sequence")


def shard(
    sets: Sets, out: Path, by: Any = "auto", *, words: Sequence[str] = (), said: list[str] | None = None, **options: Any
) -> ShardSummary:
    """Shards the archives of a set; what is said goes to `said`."""
    said = said if said is not None else []
    how = Reading(by, spill_bytes=options.pop("spill_bytes", 30_000))
    part, settings = options.pop("part", None), options.pop("settings", SMALL)
    words = words or [str(sets.archives)]
    listing = read_tars(words, sets.table, out, how, part=part, say=said.append, **options)
    said += listing.notes
    summary = write_shards(listing, out, settings, part=part)
    if not part:
        finish(out)
    return summary


def left_out(out: Path) -> dict[str, str]:
    with (out / "left_out.csv").open(newline="") as file:
        return dict(list(csv.reader(file))[1:])


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    return gldv2(tmp_path_factory.mktemp("gldv2"))


@pytest.fixture(scope="module")
def expected(landmarks: Sets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return landmarks.expected(tmp_path_factory.mktemp("expected") / "set")


# Equal to loose files


@pytest.mark.parametrize("by", WAYS)
def test_gldv2_gives_the_shards_of_its_loose_files(landmarks, expected, tmp_path, by):
    said: list[str] = []
    summary = shard(landmarks, tmp_path, by, said=said)
    assert of_set(tmp_path) == expected
    assert len(expected) > 4
    assert summary.images > 80
    assert any(f"{'by ranges' if by == 'ranges' else 'in sequence'}, as asked" in line for line in said)
    assert "120 of 120 rows have a member" in said
    assert not list(tmp_path.rglob("*.spill"))


@pytest.mark.parametrize("webdataset", [False, True])
@pytest.mark.parametrize("by", WAYS)
def test_osv5m_gives_the_shards_of_its_loose_files(tmp_path, by, webdataset):
    sets = osv5m(tmp_path / "source", webdataset=webdataset)
    said: list[str] = []
    shard(sets, tmp_path / "set", by, said=said)
    assert of_set(tmp_path / "set") == sets.expected(tmp_path / "expected")
    assert any("column city is not used" in line for line in said)
    assert any(".json 120" in line for line in said) == webdataset


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz"])
def test_compressed_tars_are_read_in_sequence(landmarks, expected, tmp_path, suffix):
    for number in range(4):
        path = tmp_path / "archives" / f"{number}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        write_tar(path, landmarks, landmarks.names[number::4], mode=f"w:{suffix[4:]}")
    words = [str(tmp_path / "archives")]
    shard(landmarks, tmp_path / "set", words=words)
    assert of_set(tmp_path / "set") == expected
    with pytest.raises(ValueError, match=rf"0\.{suffix}: compressed as a whole"):
        shard(landmarks, tmp_path / "other", "ranges", words=words)


def test_the_command_resumes_and_is_done_at_once_when_it_comes_again(landmarks, expected, tmp_path, capsys):
    argv = ["shard", "tars", f"{landmarks.archives}/images_{{000..003}}.tar", str(tmp_path / "set")]
    argv += ["--table", str(landmarks.table), "--shard-mb", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "4 archives" in out
    assert "by ranges" in out
    assert "120 of 120 rows have a member" in out
    assert "archives, MB: 1/1  120 members" in out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.*") if path.name != "left_out.csv"}
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "4 of 4 archives are listed by an earlier run" in out
    assert "complete already" in out
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.*")}.items()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_progress_is_told_within_an_archive(landmarks, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("data_pipeline.archives.gather._TOLD_EVERY_S", -1.0)
    path = tmp_path / f"all.{suffix}"
    write_tar(path, landmarks, landmarks.names * 10, mode="w:gz" if suffix == "tar.gz" else "w")
    seen: list[tuple[int, int | None, str]] = []

    def told(done: int, total: int | None = None, note: str = "") -> None:
        seen.append((done, total, note))

    shard(landmarks, tmp_path / "set", words=[str(path)], spill_bytes=2**22, on_progress=told)
    total = -(-path.stat().st_size >> 20)
    assert [note for _, _, note in seen[:-1]] == [f"{number:,} members" for number in range(1, 1201)]
    assert {done for done, _, _ in seen} == set(range(total + 1))
    assert seen[-1] == (total, total, "1,200 members")
    assert all(one[0] <= other[0] for one, other in itertools.pairwise(seen))
    assert {one[1] for one in seen} == {total}


def test_parts_share_the_archives_and_a_last_run_writes_the_index(landmarks, expected, tmp_path):
    def run(number: int) -> None:
        shard(landmarks, tmp_path, "sequence", part=(number, 2))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not (tmp_path / "index.parquet").exists()
    assert shard(landmarks, tmp_path, "sequence").shards_reused == len(expected) - 2
    assert of_set(tmp_path) == expected


# Odd archives


def test_pax_and_gnu_names_links_sparse_members_and_folders(tmp_path):
    sets = gldv2(tmp_path / "source", images=24, tars=1, landmarks=3)
    long = {name: f"{'long' * 60}/{'ö' * 20}/{name}" for name in sets.names}
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(
            path, "w", format=kind, pax_headers={"comment": "x"} if kind == tarfile.PAX_FORMAT else None
        ) as tar:
            folder = tarfile.TarInfo("long")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in sets.names:
                add(tar, f"./{long[name]}", (sets.loose / name).read_bytes())
            for type_, name in (
                (tarfile.SYMTYPE, "soft.jpg"),
                (tarfile.LNKTYPE, "hard.jpg"),
                (tarfile.FIFOTYPE, "pipe.jpg"),
            ):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = type_, long[sets.names[0]]
                tar.addfile(link)
            sparse = tarfile.TarInfo("sparse.jpg")
            sparse.size, sparse.pax_headers = 512, {"GNU.sparse.map": "0,512", "GNU.sparse.size": "4096"}
            if kind == tarfile.PAX_FORMAT:
                tar.addfile(sparse, io.BytesIO(bytes(512)))
            add(tar, "notes.txt", b"text")
        for by in WAYS:
            said: list[str] = []
            out = tmp_path / f"{kind}-{by}"
            shard(sets, out, by, words=[str(path)], said=said)
            names = left_out(out)
            expected = {f"{kind}.tar: soft.jpg": "a link", f"{kind}.tar: hard.jpg": "a link"}
            expected[f"{kind}.tar: pipe.jpg"] = "no regular file"
            if kind == tarfile.PAX_FORMAT:
                expected[f"{kind}.tar: sparse.jpg"] = "sparse"
            assert names == expected
            assert any("a link: 2" in line for line in said)
            assert "members that are no photographs: .txt 1" in said
            tars = {name: data for name, data in of_set(out).items() if name.startswith("shards/")}
            assert tars == {
                name: data for name, data in sets.expected(tmp_path / f"{kind}-{by}-loose").items() if name in tars
            }


def test_what_is_not_used_is_counted_and_named(tmp_path):
    sets = gldv2(tmp_path / "source", images=40, tars=2, landmarks=4)
    rows = sets.table.read_text().splitlines()
    sets.table.write_text("\n".join([*rows[:-1], rows[5], "nosuch,http://x,1"]) + "\n")  # the last image has no row
    with tarfile.open(sets.archives / "images_001.tar", "a") as tar:
        add(tar, sets.names[0], photo(1000))
    said: list[str] = []
    summary = shard(sets, tmp_path / "set", said=said)
    assert summary.images == 39
    names = left_out(tmp_path / "set")
    assert names == {
        f"images_000.tar: {sets.names[0]}": "its name comes again, and the last counts",
        f"images_001.tar: {sets.names[39]}": "no row names it",
        "train.csv row 41": "a row before has its image",
        "train.csv row 42: nosuch": "no member",
    }
    assert any("left out: members that no row names: 1" in line or "members that no row names" in line for line in said)
    stored = b"".join(tar.read_bytes() for tar in (tmp_path / "set/shards").glob("*.tar"))
    assert photo(1000) in stored
    assert photo(0) not in stored


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_cut_end_is_named_and_what_is_before_it_used_if_max_bad_allows(tmp_path, by, kind):
    if kind == "tar.gz" and by == "ranges":
        pytest.skip("compressed tars are read in sequence alone")
    sets = gldv2(tmp_path / "source", images=60, tars=3, landmarks=5)
    whole = sets.archives / "images_001.tar"
    members = sets.names[1::3]
    if kind == "tar":
        with tarfile.open(whole) as tar:
            cut = tar.getmembers()[15].offset_data + 100
        whole.write_bytes(whole.read_bytes()[:cut])
        kept = 15
    elif kind == "tar.gz":
        data = gzip.compress(whole.read_bytes(), mtime=0)
        whole.with_suffix(".tar.gz").write_bytes(data[: len(data) * 3 // 4])
        whole.unlink()
        kept = -1
    else:
        with zipfile.ZipFile(whole.with_suffix(".zip"), "w") as file:
            for name in members:
                file.writestr(name, (sets.loose / name).read_bytes())
        zipped = whole.with_suffix(".zip")
        zipped.write_bytes(zipped.read_bytes()[:-30])
        whole.unlink()
        kept = 0
    said: list[str] = []
    with pytest.raises(ValueError, match=r"unreadable photographs of 60, more than max_bad 0\.001"):
        shard(sets, tmp_path / "set", by, said=said)
    assert any("images_001." in line and "rows without a member count as missing" in line for line in said)
    summary = shard(sets, tmp_path / "set", by, settings=replace(SMALL, max_bad=0.5))
    assert {bad.reason for bad in summary.bad} == {"missing"}
    if kept >= 0:
        assert len(summary.bad) == 20 - kept
    else:
        assert 0 < len(summary.bad) < 20


def test_a_damaged_header_and_a_tar_behind_a_tar_are_named(tmp_path):
    sets = gldv2(tmp_path / "source", images=60, tars=3, landmarks=5)
    path = sets.archives / "images_001.tar"
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmembers()[7].offset
    damaged = whole.copy()
    damaged[at + 20] ^= 255
    path.write_bytes(damaged)
    said: list[str] = []
    with pytest.raises(ValueError, match="stopped at 13 unreadable photographs"):
        shard(sets, tmp_path / "set", said=said)
    assert any(f"images_001.tar: no tar header at byte {at}" in line for line in said)
    (sets.archives / "images_002.tar").unlink()
    path.write_bytes(whole + (tmp_path / "source/archives/images_000.tar").read_bytes())
    with pytest.raises(ValueError, match="unreadable photographs"):
        shard(sets, tmp_path / "joined", said=said)
    assert any("images_001.tar: more bytes behind its end" in line for line in said)


def test_flipped_bytes_of_a_zip_member_are_no_photograph(tmp_path):
    sets = osv5m(tmp_path / "source", images=120, archives=2)
    path = sets.archives / "00.zip"
    data = bytearray(path.read_bytes())
    at = data.index(b"photograph 8")
    data[at] ^= 1
    path.write_bytes(data)
    for by, why in (("ranges", "unreadable (its bytes do not match the archive's crc32)"), ("sequence", "")):
        summary = shard(sets, tmp_path / by, by, settings=replace(SMALL, max_bad=0.1))
        if why:
            assert [bad.reason for bad in summary.bad] == [why]
        else:
            assert "its bytes do not match the archive's crc32" in left_out(tmp_path / by).values()


# Mistakes


def test_mistakes_are_one_line(landmarks, tmp_path):
    words = [str(landmarks.archives)]
    with pytest.raises(FileNotFoundError, match=r"nosuch\.tar: no such file"):
        shard(landmarks, tmp_path / "a", words=[str(tmp_path / "nosuch.tar")])
    with pytest.raises(FileNotFoundError, match="no archives there; expected tars"):
        shard(landmarks, tmp_path / "a", words=[str(landmarks.loose)])
    with pytest.raises(ValueError, match="named twice"):
        shard(landmarks, tmp_path / "a", words=[*words, f"{landmarks.archives}/images_000.tar"])
    with pytest.raises(ValueError, match=r"train\.csv: no archive by its name"):
        shard(landmarks, tmp_path / "a", words=[str(landmarks.table)])
    with pytest.raises(ValueError, match=r"train\.csv: no column nosuch; found id, url, landmark_id"):
        shard(landmarks, tmp_path / "a", columns={"place": "nosuch"})
    with pytest.raises(ValueError, match="--columns plaice: expected one of image, place"):
        shard(landmarks, tmp_path / "a", columns={"plaice": "id"})
    with pytest.raises(ValueError, match="none of its 120 rows names a member of 4 archives"):
        shard(landmarks, tmp_path / "a", columns={"image": "url"})
    assert not (tmp_path / "a" / "shards").exists()
    with pytest.raises(ValueError, match="read threads"):
        Reading(threads=0)


def test_an_archive_that_changed_is_listed_again(tmp_path):
    sets = gldv2(tmp_path / "source", images=40, tars=2, landmarks=4)
    shard(sets, tmp_path / "set", "sequence")
    write_tar(sets.archives / "images_000.tar", sets, sets.names[0::2][::-1])
    said: list[str] = []
    assert shard(sets, tmp_path / "set", "sequence", said=said).was_complete
    assert "1 of 2 archives are listed by an earlier run" in said
    write_tar(sets.archives / "images_000.tar", sets, sets.names[0:2:2])
    with pytest.raises(ValueError, match="holds another shard set"):
        shard(sets, tmp_path / "set", "sequence")


@pytest.mark.slow
@pytest.mark.parametrize("by", WAYS)
def test_memory_stays_while_the_set_grows_tenfold(tmp_path, by):
    peaks = []
    for images in (500, 5000):
        sets = gldv2(tmp_path / str(images), images=images, tars=4, landmarks=50, filling=20_000, is_loose=False)
        peaks.append(peak_mb(sets, tmp_path / f"{images}-set", by, 2**20))
    assert peaks[1] - peaks[0] < 45, "the larger set has 95 MB more of photographs"


@pytest.mark.slow
def test_killed_and_finished_the_bytes_are_the_same(landmarks, expected, tmp_path):
    check_killed_at(landmarks, [str(landmarks.archives)], tmp_path, expected, 3, "sequence")
