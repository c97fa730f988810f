"""Pictures of what a network sees: what they show, and that the command draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.describer import Describer
from eval.report.show import patch_colours, see
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
