"""Approximate indices of several kinds, memory-mapped and searched in a process of their own: FAISS may crash."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import forked


def search(file: Path, factory: str) -> None:
    """Writes an index and searches it, mapped and in memory, in batches of several sizes, on two threads."""
    import faiss

    from eval.approximate import set_params, train_index
    from eval.index.approximate_files import _read

    faulthandler.enable()
    faiss.omp_set_num_threads(2)
    rows_ND = np.random.default_rng(0).standard_normal((320, 16), dtype=np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    faiss.write_index(train_index(factory, "nprobe=4", rows_ND, "--factory").filled(rows_ND), str(file))
    for mapped in (True, False):
        index = _read(file, mapped=mapped)
        set_params(index, "nprobe=4", factory)
        for queries in (1, 3, 320):
            _, found_QK = index.search(rows_ND[:queries], 300)
            own = (found_QK[:, :20] == np.arange(queries)[:, None]).any(axis=1)
            assert own.mean() > 0.9, (mapped, queries, own.mean())


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["OPQ8,IVF4,PQ8x4", "PCAR8,IVF4,SQ8", "IVF4,PQ8x4"])
def test_a_mapped_index_is_searched_as_one_in_memory(factory: str, tmp_path: Path) -> None:
    done = forked.run(tmp_path, "tests.test_index_factories", str(tmp_path / "index"), factory, timeout=240)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    search(Path(sys.argv[1]), sys.argv[2])
