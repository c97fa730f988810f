"""Some mutations of files of each kind that we read: a value, a counted skip, or an error of one line; see fuzzing.py.

`make test-faults` makes 10,000 of each.
"""

from pathlib import Path

import pytest

from tests.fuzz_readers import READERS
from tests.fuzzing import fuzz_in_child

pytestmark = pytest.mark.slow

MUTATIONS = 150


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    outcome = fuzz_in_child(name, MUTATIONS, seed=1, folder=tmp_path / "fuzz")
    assert not outcome.failures, "\n".join(outcome.failures)
    damaged = outcome.counts["errors"] + outcome.counts["skips"]
    assert damaged >= outcome.counts["mutations"] // 20  # mutations that damage nothing would show nothing
