"""Any folder as a benchmark: which of its folders are read, with which ground truth, by which path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark_folders import load, positives, write_utm


def test_any_utm_folder_with_its_radius_and_its_list_of_paths(tmp_path: Path) -> None:
    write_utm(tmp_path / "mine/images/test", [(0, 0), (8, 0)], [(0, 0)])
    assert positives(load("folder:mine", tmp_path)) == [[0, 1]]
    assert positives(load("folder:mine:5", tmp_path)) == [[0]]
    only = next((tmp_path / "mine/images/test/database").glob("@8*"))
    (tmp_path / "mine/images/test/database_images_paths.txt").write_text(f"{only.name}\n")
    assert load("folder:mine", tmp_path).database == [only]
    with pytest.raises(FileNotFoundError, match="no images"):
        load("folder:nowhere", tmp_path)
    with pytest.raises(ValueError, match="radius"):
        load("folder:mine:-5", tmp_path)
