"""Recipe `unified_vitb`: its dry run, ten real steps at small size, and a resume in the middle of a round."""

from pathlib import Path

import pytest
import yaml

from configs.load import RECIPES
from data_pipeline.shards import write_shards
from data_pipeline.sources.gsv_cities import read_gsv_cities
from launch.plan_command import main as plan
from tests.networks import AGGREGATORS
from tests.photos import write_gsv_cities
from tests.test_near_places import with_coordinates
from tests.training import finish, logged, one_rank, same_state, warm_ranks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets of noise, and the shipped recipe with a tiny network and four places of each."""
    folder = tmp_path_factory.mktemp("unified")
    recipe = yaml.safe_load((RECIPES / "unified_vitb.yaml").read_text())
    for number, name in enumerate(recipe["data"]["sets"]):
        write_gsv_cities(folder / name, {"A": dict.fromkeys(range(9 + 4 * number), 4)}, seed=number)
        write_shards(read_gsv_cities(folder / name), folder / f"{name}_shards")
        recipe["data"]["sets"][name] = str(folder / f"{name}_shards")
    recipe["data"] |= {"places_per_batch": 12, "image_size": 28, "decode_threads": 1}
    recipe["model"] |= {"backbone": "tiny14", "weights": "random", "aggregator_args": AGGREGATORS["salad"]}
    recipe["memory"] |= {"size": 90, "start_epoch": 0.5}
    recipe["optim"] |= {"lr": 1e-3, "warmup_steps": 2}
    recipe["engine"] = {"zero_stage": 1}
    recipe["trainer"] = {"epochs": 99, "max_steps": 10, "checkpoint_every_steps": 5, "validate_every_epochs": 0}
    recipe["eval"] = {}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_dry_run_says_what_each_set_takes(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["unified_vitb", "--ranks", "8", "--device-gb", "80", "--tflops", "400"]) == 0
    said = capsys.readouterr().out
    for line in (
        "set msls: 40 places of a batch, loss x 1, queue of 4096",
        "negatives: no two places nearer than 25 m",
        "not here: data/gsv_cities_shards",
    ):
        assert line in said, said
    assert plan([str(small / "recipe.yaml"), "--loss.set-weights", "utm", "0.5", "--tflops", "1"]) == 0
    said = capsys.readouterr().out
    assert "set utm: 4 places of a batch, loss x 0.5, queue of 30; all its places seen in 4 steps" in said
    assert "negatives: no two places nearer than 25 m; 0.0% of 39 places have another one so near" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--ranks 3", "a batch takes gsv_cities 4, msls 4, utm 4 places, which 3 ranks cannot share evenly"),
        ("--data.places-per-batch 30", "data.sets gsv_cities: 9 places are fewer than the 10"),
        ("--data.places-per-batch 10", "places_per_batch 10 is not divisible by 3 sets"),
        ("--loss.set-weights uttm 2", "loss.set_weights names uttm; data.sets has gsv_cities, msls, utm"),
        ("--data.hard-share 0.5", "data.hard_share needs data.composition city or mixed, not sets; or set it to 0"),
        ("--memory.min-negative-m 1e8", "all 39 places are within"),
        ("--memory.min-negative-m nan", "min_negative_m"),
        ("--memory.min-negative-m -2", "min_negative_m"),
        ("--loss.name CircleLoss --loss.miner none", "min_negative_m works in tiles"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(flags: str, words: str, small: Path) -> None:
    with pytest.raises(ValueError, match=words):
        plan([str(small / "recipe.yaml"), *flags.split()])


def test_sets_without_coordinates_are_refused_before_anything_starts(small: Path, tmp_path: Path) -> None:
    without = with_coordinates(small / "utm_shards", tmp_path / "without", [None], [None])
    recipe = yaml.safe_load((small / "recipe.yaml").read_text())
    sets = [word for pair in (recipe["data"]["sets"] | {"utm": str(without)}).items() for word in pair]
    with pytest.raises(ValueError, match=r"memory\.min_negative_m needs coordinates, and 17 of 39 places"):
        plan([str(small / "recipe.yaml"), "--data.sets", *sets])


@pytest.mark.slow
def test_ten_steps_and_a_resume_at_another_world_size(small: Path) -> None:
    """Bitwise at the same number of ranks; at another to 1e-3, float32 added in another order and amplified by Adam."""
    finish(warm_ranks(small, "straight"))
    straight = logged(small / "straight")
    assert sorted(straight) == list(range(1, 11))
    for line in straight.values():
        parts = [line[f"train/{name}/loss"] for name in ("gsv_cities", "msls", "utm")]
        assert line["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert straight[10]["memory/queue_fill"] == 90
    half = small / "straight" / "checkpoints" / "step-00000005"
    assert "resumed" in finish(warm_ranks(small, "again", "--resume", str(half)))
    same_state(*(small / name / "checkpoints" / "step-00000010" for name in ("straight", "again")))
    said = finish(one_rank(small, "alone", "--resume", str(half), "--loss.set-weights", "utm", "1"))
    assert "loss.set_weights {} -> {'utm': 1.0}" in said
    for step, line in logged(small / "alone").items():
        assert line["train/loss"] == pytest.approx(straight[step]["train/loss"], rel=1e-3), step
