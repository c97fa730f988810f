"""Ten thousand mutations of files of each kind that we read; `make fuzz` prints what they end in."""

from pathlib import Path

import pytest

from tests.fuzz_readers import READERS
from tests.fuzzing import fuzz_in_child

MUTATIONS = 10_000


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    outcome = fuzz_in_child(name, MUTATIONS, seed=0, folder=tmp_path / "fuzz")
    assert not outcome.failures, "\n".join(outcome.failures)
