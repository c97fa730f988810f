"""A folder's photographs: all of them, and every other file counted."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.photographs import SUFFIXES, Listing, list_photographs


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_suffixes_in_any_case_and_everything_else_counted(tmp_path: Path) -> None:
    _touch(tmp_path, "b.JPG", "a.Jpeg", "sub/c.webp", "sub/deep/d.TIFF", "e.tif", "f.png", "g.bmp")
    _touch(tmp_path, "Thumbs.db", ".DS_Store", "._a.jpg", "x.jpg~", "notes.txt", "README", "h@48.5@note")
    _touch(tmp_path, ".thumbnails/t.jpg", "sub/@eaDir/SYNOPHOTO_THUMB.jpg", "__MACOSX/sub/._c.webp")
    os.mkfifo(tmp_path / "pipe.jpg")
    listing = list_photographs(tmp_path)
    assert listing.names == ["a.Jpeg", "b.JPG", "e.tif", "f.png", "g.bmp", "sub/c.webp", "sub/deep/d.TIFF"]
    assert listing.left_out == Counter(
        {
            **{"hidden": 3, "folders of file managers": 2, "no suffix": 2},
            **{".db": 1, ".jpg~": 1, ".txt": 1, "pipes, sockets and devices": 1},
        }
    )


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    _touch(tmp_path / "store", "a.jpg", "in/b.jpg")
    folder = tmp_path / "set"
    _touch(folder, "own/c.jpg")
    (folder / "link").symlink_to(tmp_path / "store")
    (folder / "again").symlink_to(tmp_path / "store")
    (folder / "own" / "up").symlink_to(folder)
    (folder / "file.jpg").symlink_to(tmp_path / "store" / "a.jpg")
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    listing = list_photographs(folder)
    assert listing.names == ["again/a.jpg", "again/in/b.jpg", "file.jpg", "own/c.jpg"]
    assert listing.left_out == Counter({"folders reached twice": 2, "broken links": 2})


def test_a_flat_listing_counts_what_lies_below(tmp_path: Path) -> None:
    _touch(tmp_path, "a.jpg", "sub/b.jpg", "sub/c.txt")
    listing = list_photographs(tmp_path, deep=False)
    assert listing.names == ["a.jpg"]
    assert listing.note() == "left out: .txt 1, in sub-folders 1"


def test_a_note_is_empty_or_names_the_most_first() -> None:
    assert Listing(["a.jpg"]).note() == ""
    assert Listing([], Counter({".txt": 1, ".mov": 3})).note() == "left out: .mov 3, .txt 1"
    many = Listing([], Counter({f".x{n}": 1 for n in range(12)}))
    assert many.note().endswith("other kinds 4")


def test_heic_without_its_extra_names_it() -> None:
    note = Listing([], Counter({".heic": 3, ".txt": 1})).note()
    assert note.startswith("left out: .heic 3, .txt 1 (")
    assert "rerankvpr[heic]" in note


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        list_photographs(tmp_path / "absent")
    _touch(tmp_path, "file.jpg")
    with pytest.raises(NotADirectoryError, match=r"file\.jpg"):
        list_photographs(tmp_path / "file.jpg")


def test_suffixes_are_lower_case() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)
