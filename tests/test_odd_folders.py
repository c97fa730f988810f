"""Folders of odd names and formats: every file is used, or counted with its reason."""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.schema import EvalConfig
from data_pipeline.formats import SUFFIXES
from data_pipeline.photographs import list_photographs
from data_pipeline.photos import Photo, read_photo
from data_pipeline.shard_options import ShardOptions
from eval.pixels import load_image

CASES = Path(os.environ.get("RERANKVPR_TEST_CASES", "/nowhere"))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))


def _saved(kind: str) -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, kind)
    return file.getvalue()


PICTURES = {kind: _saved(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "PPM")}
CONTENTS = {**PICTURES, "empty": b"", "text": b"hello", "half": PICTURES["JPEG"][:300], "none": b"\xff\xd8"}
ENDS = (
    *(".jpg", ".JPG", ".Jpeg", ".jpe", ".png", ".PNG", ".webp", ".tif", ".TIFF", ".bmp", ".gif", ".avif", ".pgm"),
    *(".txt", ".db", ".jpg~", ".jpg.part", ".mov", ".HEIC", "", ".", ".jpg ", "#", ".json", ".jpg.jpg"),
)
letters = st.characters(exclude_characters="/\0", exclude_categories=("Cs",))
stems = st.one_of(
    st.text(letters, min_size=1, max_size=8),
    st.sampled_from(["._a", ".hidden", "@48.0@9.1@", "Thumbs", "a b", "-rf", "*", "~x", "ü", "\n", "\udcff", "con"]),
)
parts = st.one_of(stems, st.sampled_from(["@eaDir", "__MACOSX", ".git", "lost+found", "sub"]))
files = st.tuples(
    st.lists(parts, max_size=2), stems, st.sampled_from(ENDS), st.sampled_from([*CONTENTS, "broken link", "loop"])
)


def _make(folder: Path, wanted: list[tuple[list[str], str, str, str]]) -> dict[str, str]:
    """What was made: the kind of content by name."""
    made: dict[str, str] = {}
    for folders, stem, end, kind in wanted:
        path = folder.joinpath(*folders, f"{stem}{end}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink() or path.exists():
                continue
            if kind in CONTENTS:
                path.write_bytes(CONTENTS[kind])
            else:
                path.symlink_to(folder if kind == "loop" else folder / "nothing")
        except OSError:  # a file is where a folder should be, or a name that no file can have (`..`)
            continue
        made[path.relative_to(folder).as_posix()] = kind
    return made


def _is_left_out(part: str) -> bool:
    return part.startswith(".") or part in ("@eaDir", "__MACOSX", "lost+found") or _undecodable(part)


def _undecodable(part: str) -> bool:
    try:
        part.encode()
    except UnicodeEncodeError:
        return True
    return False


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@example([([], "a", ".jpg", "JPEG"), (["sub"], "b", ".PNG", "PNG"), ([], "c", ".txt", "text"), ([], "d", "", "loop")])
@example([([".git"], "a", ".jpg", "JPEG"), ([".git"], "b", ".jpg", "JPEG"), ([], "\udcff", ".jpg", "JPEG")])
@given(st.lists(files, max_size=12))
def test_every_file_is_used_or_counted_with_its_reason(wanted: list[tuple[list[str], str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = _make(folder, wanted)
        listing = list_photographs(folder)
        # Each file that was made is named, or it or the folder that hides it is counted once.
        counted = set()
        for file in made:
            parts_of = PurePosixPath(file).parts
            hidden = next((n for n, part in enumerate(parts_of) if _is_left_out(part)), None)
            counted.add(file if hidden is None else "/".join(parts_of[: hidden + 1]))
        assert set(listing.names) <= counted
        assert len(listing.names) + listing.left_out.total() == len(counted)
        assert (listing.note() == "") == (not listing.left_out)
        for file in sorted(counted - set(listing.names)):
            visible = file in made and not any(map(_is_left_out, PurePosixPath(file).parts))
            if visible and made[file] in CONTENTS:
                assert os.path.splitext(file)[1].lower() not in SUFFIXES  # noqa: PTH122
        # What is named is a photograph, or there is a reason.
        for file in listing.names:
            photo = read_photo(folder / file, ShardOptions(convert=True))
            assert isinstance(photo, Photo) == (made[file] in PICTURES), (file, photo)
            assert isinstance(photo, Photo) or ("\n" not in photo and photo)


@pytest.mark.skipif(not CASES.is_dir(), reason="RERANKVPR_TEST_CASES names no folder")
def test_pictures_of_all_suffixes_show_the_same() -> None:
    """The database of `suffixes/` is that of `plain/`; its queries are of five suffixes."""
    found = list_photographs(CASES / "suffixes/images/test/queries")
    suffixes = Counter(Path(name).suffix for name in found.names)
    assert suffixes.total() == 10
    assert set(suffixes) == {".jpg", ".Jpg", ".webp", ".tif", ".bmp"}
    assert not found.left_out


@pytest.mark.skipif(not CASES.is_dir(), reason="RERANKVPR_TEST_CASES names no folder")
@pytest.mark.parametrize("resize", ["square", "aspect", "native"])
def test_a_picture_of_16_bits_is_its_8_bit_self(resize: str) -> None:
    folder = CASES / "gray16/images/test/queries"
    deep, plain = (
        load_image(next(folder.glob(f"*.{end}")), EvalConfig.model_validate({"resize": resize}), 14)
        for end in ("png", "jpg")
    )
    grey = plain.float().mean(0)
    assert (deep.float().mean(0) - grey).abs().mean() < 12
