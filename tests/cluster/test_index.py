"""An index that `submit` builds and grows in a real SLURM: by an array of tasks, and by one job on two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import submit
from tests.cluster.workplace import rerankvpr
from tests.index_crashes import bytes_of, verbs, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A network, photographs to build from and photographs to add."""
    return write_inputs(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def expected(inputs: tuple[Path, Path, Path]) -> dict[str, bytes]:
    """The files of an index that one process built and grew."""
    out = inputs[0].parent / "one"
    for verb in verbs(*inputs, out):
        rerankvpr(inputs[0].parent, *verb)
    return bytes_of(out)


@pytest.mark.parametrize("flags", [("--array", "3"), ("--nodes", "2")])
def test_it_has_the_bytes_of_an_index_that_one_process_built(
    two_nodes: Slurm, inputs: tuple[Path, Path, Path], expected: dict[str, bytes], flags: tuple[str, str]
) -> None:
    folder = inputs[0].parent
    out = folder / flags[0].strip("-")
    build, add = verbs(*inputs, out)
    jobs = submit(two_nodes, folder, "--time", "10", *flags, "--", *build, "--then", *add)
    names = ["index-build", "index-add"]
    assert list(jobs) == (
        [f"{name}{part}" for name in names for part in ("-parts", "")] if "array" in flags[0] else names
    )
    for number in jobs.values():
        two_nodes.wait(number, "COMPLETED", 300)
    found = {name: content for name, content in bytes_of(out).items() if not name.startswith("job/")}
    assert list(found) == list(expected)
    assert [name for name in found if found[name] != expected[name]] == []
