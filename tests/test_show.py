"""Pictures of what a network sees: what they show, and that the command draws them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import recipe_text
from configs.schema import Recipe
from eval.describer import Describer
from eval.report.drift import read_drift
from eval.report.show import patch_colours, see
from eval.sweep import SweptRecall, read_swept
from launch.show_command import main
from tests.checkpoints import gem_recipe, write_run
from tests.photos import write_jpegs
from trainer.pretrained import load

RECIPE = gem_recipe(84)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("show"), RECIPE)


@pytest.fixture(scope="module")
def describer(run: Path) -> Describer:
    return load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_jpegs(folder, 3, seed=0)
    (folder / "notes.txt").write_text("not a photograph")
    return folder


def test_attention_is_the_share_of_each_head(describer: Describer, photos: Path) -> None:
    (one,) = see(describer, [photos / "0.jpg"], layer=-1)
    heads = describer.model.backbone.spec.heads
    assert one.grid == (6, 6)
    assert one.attention_HN.shape == (heads, 36)
    assert (one.attention_HN > 0).all()
    assert (one.attention_HN.sum(dim=1) < 1).all()  # the class token keeps a part
    with pytest.raises(ValueError, match="layer 99: the backbone has"):
        see(describer, [photos / "0.jpg"], layer=99)


def test_facets_are_those_of_the_re_ranking(describer: Describer, photos: Path) -> None:
    (seen,) = see(describer, [photos / "1.jpg"], layer=-2)
    (local,) = describer.local(photos / "1.jpg")
    rows = local.cell_N2[:, 0] * seen.grid[1] + local.cell_N2[:, 1]
    assert np.allclose(seen.facet_NC[rows].numpy(), local.codes_NC, atol=1e-3)  # stored as fp16


def test_colours_are_one_scale_over_images() -> None:
    a_NC, b_NC = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).split(10)
    together = patch_colours([a_NC, b_NC, a_NC])
    assert [c.shape for c in together] == [(10, 3)] * 3
    assert np.array_equal(together[0], together[2])
    assert not np.allclose(together[0], together[1])
    assert min(c.min() for c in together) >= 0
    assert max(c.max() for c in together) <= 1
    assert patch_colours([torch.ones(4, 8)])[0].shape == (4, 3)  # patches that are all alike


@pytest.mark.parametrize("kind", ["attention", "pca", "matches", "similarity"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_command_draws(kind: str, suffix: str, photos: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / f"seen.{suffix}"
    assert main([kind, str(photos), "--model", str(run), "--out", str(out)]) == 0
    assert list(out.parent.iterdir()) == [out]
    if suffix == "png":
        picture = np.asarray(Image.open(out).convert("L"))
        assert picture.std() > 10
    else:
        assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pca", "{photos}"], "show needs --model"),
        (["pca", "{photos}", "--model", "{run}", "--out", "a.jpg"], "expected a name that ends with one of"),
        (["matches", "{photos}/0.jpg", "--model", "{run}"], "needs two images or more"),
        (["pca", "{photos}/none", "--model", "{run}"], "none"),
        (["similarity", "{photos}", "--model", "{run}", "--point", "2", "0"], "point 2 0: expected shares"),
        (["pca", "{photos}/notes.txt", "--model", "{run}"], "notes.txt"),
        (["pca", "{empty}", "--model", "{run}"], "no photographs there"),
        (["pca", "{photos}", "--model", "{run}", "--most", "0"], "--most 0: expected 1 or more"),
        (["negatives", "{photos}", "{run}"], "show negatives takes the folder of one training"),
        (["negatives", "{run}"], "holds no negatives.csv; train with --trainer.log-negatives-every"),
        (["drift", "{run}"], "metrics.jsonl"),
        (["sweep", "{run}"], "no sweep there; `rerankvpr eval ... --sweep"),
        (["sweep"], "show sweep takes one folder"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    photos: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        main([word.format(photos=photos, run=run, empty=tmp_path / "empty") for word in words])
    assert not [file for file in tmp_path.iterdir() if file.name != "empty"]


def picture_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))


SWEPT = SweptRecall(
    benchmark="town",
    k=1,
    retrieved=91.5,
    saliency=[0.0, 0.2],
    match=[0.4, 0.65, 0.8],
    recall=[[97.0, 97.0, 90.0], [95.5, 96.0, 96.0]],
    own=[0.2, 0.65],
    rule="top 30, value of block -2, saliency > 0.2 (logits, block -1), match > 0.65",
)


def test_a_sweep_is_read_back_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out/sweeps").mkdir(parents=True)
    (tmp_path / "walk/sweeps/gardens_point/day").mkdir(parents=True)  # a benchmark's name may have slashes
    SWEPT.write(tmp_path / "walk/sweeps/gardens_point/day/night.json")
    SWEPT.write(tmp_path / "out/sweeps/town.json")
    assert read_swept(tmp_path / "out/sweeps/town.json") == SWEPT
    for given in ("out", "out/sweeps", "out/sweeps/town.json", "walk"):
        assert main(["sweep", str(tmp_path / given), "--out", str(tmp_path / "swept.png")]) == 0
    assert "R@1 91.5 retrieved, at most 97.0 re-ranked" in capsys.readouterr().out
    assert picture_of(tmp_path / "swept.png").std() > 10
    replace(SWEPT, own=[0.3, 0.65]).write(tmp_path / "out/sweeps/other.json")
    with pytest.raises(ValueError, match="2 sweeps; name one of them"):
        main(["sweep", str(tmp_path / "out")])
    for text in ("{", "[]", '{"benchmark": "town"}', json.dumps({**vars(SWEPT), "recall": [[1.0]]})):
        (tmp_path / "out/sweeps/town.json").write_text(text)
        with pytest.raises(ValueError, match=r"town\.json: not a sweep of rerankvpr eval --sweep"):
            main(["sweep", str(tmp_path / "out/sweeps/town.json")])


def test_drift_is_drawn_beside_the_decay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 7, "memory/queue_fill": 3}]
    lines += [
        {"step": step, **{f"memory/drift_age_{age:06d}": 1 - age / (10 * step) for age in (2, 4, 60)}}
        for step in range(10, 50, 10)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + '{"step": 50, "memory/drift_age_000002": NaN}\n{"step": 60, "mem')
    drift = read_drift(run / "metrics.jsonl")
    assert sorted(drift.cosine) == [10, 20, 30, 40]
    assert drift.ages() == [2, 4, 60]
    np.testing.assert_allclose(drift.curve(20), [[2, 0.99], [4, 0.98], [60, 0.7]])
    for decay in ("exponential", "measured"):
        memory = {"decay": decay, "drift_every": 10}
        (run / "recipe.yaml").write_text(recipe_text(Recipe.model_validate({"memory": memory})))
        assert main(["drift", str(run), "--out", str(tmp_path / f"{decay}.svg")]) == 0
        assert ("cosine squared" if decay == "measured" else "exp(-0.1 age)") in (tmp_path / f"{decay}.svg").read_text()
    assert "4 measurements, ages to 60" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match=r"holds no drift; train with --memory\.drift-every 50"):
        main(["drift", str(run)])
