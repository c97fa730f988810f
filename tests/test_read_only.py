"""Outputs that an ordinary user may not write to: one line that names what was asked for, and nothing is left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from configs.schema import Recipe
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from tests import forked
from tests.checkpoints import write_checkpoint
from tests.photos import write_gsv_cities, write_noise_benchmark

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user"),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that all may read: a checkpoint, shards, a benchmark, a recipe; and one that root alone may write to."""
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))
    folder.chmod(0o755)
    model = {"backbone": "tiny14", "weights": "random"}
    write_checkpoint(folder / "run", Recipe.model_validate({"model": model}))
    write_gsv_cities(folder / "native", {"Aachen": dict.fromkeys(range(4), 4)})
    write_shards(read_gsv_cities(folder / "native"), folder / "set")
    write_noise_benchmark(folder / "town")
    data = {"shards": "set", "places_per_batch": 2, "images_per_place": 2, "image_size": 28}
    recipe = {"data": data, "model": model, "memory": {"size": 0}, "eval": {"benchmarks": []}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "tracking": {"enabled": False}}))
    (folder / "locked").mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


COMMANDS = {
    "train": "train recipe.yaml --output locked/run",
    "plan": "plan recipe.yaml --json locked/plan.json",
    "shard": "shard gsv-cities native locked/set",
    "inspect": "inspect set --out locked/seen",
    "inspect a plan": "inspect set --places-per-batch 2 --plan locked/plan.parquet",
    "eval": "eval --checkpoint run --benchmarks folder:town --recall-at 1 --image-size 28 --out locked/out",
    "features": "eval --checkpoint run --recall-at 1 --benchmarks folder:town --image-size 28 --features locked/f",
    "index": "index build town/images/test/database --checkpoint run --out locked/index",
    "export": "export run locked/net.safetensors",
    "export a folder": "export run locked/net",
    "show": "show pca town/images/test/database --model run --out locked/seen.png",
}


@pytest.mark.parametrize("what", COMMANDS)
def test_an_output_that_is_read_only_is_one_line(what: str, place: Path) -> None:
    command = COMMANDS[what].split()
    named = next(word for word in command if word.startswith("locked/"))
    done = forked.run(place, "tests.as_nobody", *command, environment={"HOME": "/nonexistent"})
    lines = [line for line in done.stderr.splitlines() if line.startswith("rerankvpr: ")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    assert named in lines[0]
    assert "Permission denied" in lines[0]
    assert ".partial" not in lines[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert list((place / "locked").iterdir()) == []
