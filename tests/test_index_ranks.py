"""An index built by several ranks is the index of one, byte for byte; its files can be read as the umask says."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from tests.index_crashes import bytes_of, run, verbs, write_inputs
from tests.photos import jpeg
from tests.training import ForkedRanks, finish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def indices(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Built and grown on 1, 2 and 3 ranks: enough photographs for a verdict, one of them damaged, uneven turns."""
    folder = tmp_path_factory.mktemp("ranks")
    weights, database, more = write_inputs(folder)
    rng = np.random.default_rng(1)
    for i in range(7, 31):
        (database / f"@{500000 + 100 * i}@4000000@33@T@@@{i}@@@@@@@@.jpg").write_bytes(jpeg(rng))
    (database / "@500050@4000000@33@T@@@damaged@@@@@@@@.jpg").write_bytes(jpeg(rng)[:90])
    found = {world: folder / f"of-{world}" for world in (1, 2, 3)}
    for world, out in found.items():
        for verb in verbs(weights, database, more, out):
            allowed = [*verb, "--max-bad", "0.1"] if verb[1] == "build" else verb
            if world == 1:
                run(folder, allowed)
            else:
                finish(ForkedRanks(folder, world, "rerankvpr", *allowed), timeout=120)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_the_bytes_of_one(indices: dict[int, Path], world: int) -> None:
    expected, found = bytes_of(indices[1]), bytes_of(indices[world])
    assert list(found) == list(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    manifest = json.loads(found["index.json"])
    assert (manifest["images"], manifest["parts"]) == (36, ["000000", "000001"])
    assert manifest["verdict"]["sample"] >= 20
    (left_out,) = json.loads(found["parts/000000/part.json"])["left_out"]
    assert "damaged" in left_out[0]


def test_whoever_may_read_the_folder_may_read_its_files(indices: dict[int, Path]) -> None:
    plain = indices[1].parent / "plain"
    plain.touch()
    for file in filter(Path.is_file, indices[1].rglob("[!.]*")):
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode), file
