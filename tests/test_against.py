"""The comparison of a step with an earlier revision: what it unpacks, refuses and prints."""

from pathlib import Path

import pytest

import benchmarks.against as against
from benchmarks.against import Options, Tree, compare, train, unpack

CHECKOUT = (against.ROOT / ".git").exists()

EARLIER = """
import json, sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.mkdir()
if Path("refuses").exists():
    sys.exit("rerankvpr: recipe.yaml: memory.decay_lambda: no such key")
lines = [{"train/step_s": s, "train/data_wait_s": 0.5, "train/loss": s} for s in (9, 9, 9, 1.5, 3.5, 2.5)]
(output / "metrics.jsonl").write_text("\\n".join(map(json.dumps, [{"eval/recall_1": 0.5}, *lines])))
"""


@pytest.mark.skipif(not CHECKOUT, reason="no checkout of git")
def test_a_revision_is_unpacked_beside_the_checkout(tmp_path: Path) -> None:
    commit = unpack("HEAD", tmp_path / "before")
    assert len(commit) >= 7
    assert (tmp_path / "before" / "trainer" / "step.py").exists()
    with pytest.raises(SystemExit, match="has no revision nonsense; expected a commit, branch or tag"):
        unpack("nonsense", tmp_path / "other")
    with pytest.raises(SystemExit, match="has no revision --all"):
        unpack("--all", tmp_path / "other")


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match=f"{tmp_path} is no checkout of git"):
        unpack("HEAD", tmp_path / "before")


def test_a_training_s_steps_are_read_and_a_refusal_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    (folder / "rerankvpr.py").write_text(EARLIER)
    tree = Tree("before (0123456)", folder)
    train(tree, tmp_path / "recipe.yaml", tmp_path / "first", ranks=1)
    assert (tree.seconds, tree.losses) == ([2.0], [2.5])  # without the wait, and without the steps that warm up
    (folder / "refuses").touch()
    with pytest.raises(SystemExit, match=r"before \(0123456\) ended with status 1: rerankvpr: .*decay_lambda: no such"):
        train(tree, tmp_path / "recipe.yaml", tmp_path / "second", ranks=1)


@pytest.mark.parametrize(("loss", "said"), [(1.5, "equal, to the last digit"), (1.25, "differ by up to 0.25")])
def test_ratio_and_losses_are_printed(loss: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Tree("before", Path(), seconds=[1.0, 2.0, 4.0], losses=[1.5] * 3)
    after = Tree("after", Path(), seconds=[0.5, 1.5, 4.0], losses=[1.5, loss, 1.5])
    figures = compare(before, after, Options("HEAD", turns=3))
    assert figures["ratio"] == 0.75
    assert (figures["ratio_least"], figures["ratio_most"]) == (0.5, 1.0)
    assert said in capsys.readouterr().out
