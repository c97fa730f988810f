"""Plug-ins: run once, only where a user names them, and refused in one line that says where."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs import plugins
from configs.load import load_recipe, load_stored_recipe
from configs.plugins import PluginError, digests, keep, load_plugins, loaded, note_recorded
from configs.recipe_flags import RecipeCommand, parse_over_recipe
from configs.registry import AGGREGATORS, LOSSES, NOT_RUN, REGISTRIES

MEAN = """
from configs.registry import AGGREGATORS
from model.aggregators.aggregator import Aggregator, patches_of


@AGGREGATORS.register("mean")
class Mean(Aggregator):
    def __init__(self, spec):
        super().__init__()
        self.output_size = spec.channels

    def forward(self, tokens_BTC, grid):
        return patches_of(tokens_BTC, grid).mean(dim=1)
"""


@pytest.fixture(autouse=True)
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten; it works in a folder of its own."""
    before = [registry.names() for registry in REGISTRIES]
    monkeypatch.chdir(tmp_path)
    yield
    plugins._forget_all_but(before)
    plugins._loaded.clear()
    NOT_RUN.clear()


def test_a_file_is_run_once_and_anew_when_it_has_changed() -> None:
    file = Path("my_vpr.py")
    file.write_text(MEAN)
    (plugin,) = load_plugins(["my_vpr.py"])
    assert (plugin.name, plugin.adds) == ("my_vpr.py", ("aggregator mean",))
    mean = AGGREGATORS.get("mean")
    assert sys.modules[mean.__module__].__file__ == str(file.absolute())
    assert load_plugins([str(file.absolute())]) == [plugin]
    assert AGGREGATORS.get("mean") is mean
    file.write_text(MEAN.replace('"mean"', '"other"'))
    (changed,) = load_plugins(["my_vpr.py"])
    assert changed.sha256 != plugin.sha256
    assert ("mean" in AGGREGATORS, "other" in AGGREGATORS) == (False, True)
    assert digests(["elsewhere/my_vpr.py", "not_run.py"]) == {"my_vpr.py": changed.sha256}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, r"^plug-in my.py: No such file or directory in /.*$"),
        ("x = (\n", r"^plug-in my.py: /.*/my.py:1: SyntaxError: '\(' was never closed \(RERANKVPR_TRACEBACK=1 .*"),
        ("\nimport not_there\n", r"/my.py:2: ModuleNotFoundError: No module named 'not_there'"),
        ("import os\nos.path.join(1)\n", r"/my.py:2: TypeError: "),
        ("import sys\nsys.exit(3)\n", r"/my.py:2: SystemExit: 3"),
        ("print()\n", r'^plug-in my.py registers nothing; expected a line such as @AGGREGATORS.register\("name"\)'),
        (MEAN.replace('"mean"', '"gem"'), r"/my.py:\d+: aggregator 'gem' exists already \(built in\); choose another"),
        (MEAN + "1 / 0\n", r"/my.py:14: ZeroDivisionError: division by zero"),
        (b"\xff\xfe\x00", r"^plug-in my.py: .*(null bytes|invalid|utf-8).*"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(code: str | bytes | None, message: str) -> None:
    if code is not None:
        Path("my.py").write_bytes(code if isinstance(code, bytes) else code.encode())
    before = [registry.names() for registry in REGISTRIES]
    with pytest.raises(PluginError, match=message) as raised:
        load_plugins(["my.py"])
    assert "\n" not in str(raised.value)
    assert [registry.names() for registry in REGISTRIES] == before
    assert "rerankvpr_plugin_my" not in sys.modules


def test_two_files_of_one_name_are_refused() -> None:
    for folder, name in (("a", "mean"), ("b", "mean_2")):
        Path(folder).mkdir()
        Path(folder, "my_vpr.py").write_text(MEAN.replace('"mean"', f'"{name}"'))
    with pytest.raises(PluginError, match=r"^plug-in b/my_vpr.py: /.*/a/my_vpr.py has the same name and other code"):
        load_plugins(["a/my_vpr.py", "b/my_vpr.py"])


def test_a_module_and_an_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = Path("vpr_more", "heads")
    package.mkdir(parents=True)
    Path("vpr_more", "__init__.py").touch()
    (package / "__init__.py").write_text("from vpr_more.heads import mean\n")
    (package / "mean.py").write_text(MEAN)
    about = Path("vpr_more-1.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vpr-more\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rerankvpr.plugins]\nmore-heads = vpr_more.heads\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        (plugin,) = load_plugins(["more-heads"])
        assert (plugin.module, plugin.root, plugin.adds) == (
            "vpr_more.heads",
            tmp_path / "vpr_more",
            ("aggregator mean",),
        )
        plugins._loaded.clear()  # imported before, by somebody else
        assert load_plugins(["vpr_more.heads"]) == [replace(plugin, name="vpr_more.heads")]
        (copy,) = keep(loaded(["more-heads", "vpr_more.heads"]), Path("kept"))
        assert [str(file.relative_to(copy)) for file in sorted(copy.rglob("*.py"))] == [
            "__init__.py",
            "heads/__init__.py",
            "heads/mean.py",
        ]
    finally:
        for name in [name for name in sys.modules if name.startswith("vpr_more")]:
            del sys.modules[name]
    with pytest.raises(PluginError, match=r"^plug-in more-head: Python finds no module of that name; .*nearest: m"):
        load_plugins(["more-head"])


def test_a_recipe_and_its_flags_run_what_they_name() -> None:
    Path("my_vpr.py").write_text(MEAN)
    Path("recipe.yaml").write_text("plugins: [my_vpr.py]\nmodel: {aggregator: mean}\n")
    assert load_recipe(Path("recipe.yaml")).model.aggregator == "mean"
    Path("your_vpr.py").write_text(MEAN.replace('"mean"', '"yours"'))
    words = ["recipe.yaml", "--model.aggregator", "yours", "--plugins", "your_vpr.py", "my_vpr.py"]
    command, _ = parse_over_recipe(RecipeCommand, words, verb="train")
    assert command.recipe.plugins == ["your_vpr.py", "my_vpr.py"]
    assert command.recipe.model.aggregator == "yours"


def test_help_and_stored_recipes_run_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_vpr.py").write_text(MEAN)
    Path("recipe.yaml").write_text("plugins: [my_vpr.py]\nmodel: {aggregator: mean}\n")
    with pytest.raises(SystemExit):
        parse_over_recipe(RecipeCommand, ["recipe.yaml", "--help-all"], verb="train")
    assert "--plugins" in capsys.readouterr().out
    assert load_stored_recipe(Path("recipe.yaml")).model.aggregator == "mean"
    assert not loaded()


def test_what_a_file_records_is_said_and_explains_unknown_names() -> None:
    Path("my_vpr.py").write_text(MEAN)
    (plugin,) = load_plugins(["my_vpr.py"])
    recorded = {"my_vpr.py": plugin.sha256}
    keep([plugin], Path("plugins"))
    assert note_recorded(recorded, Path("step-3")) == ""
    assert note_recorded({"my_vpr.py": "0" * 64}, Path("step-3")) == (
        f"step-3 was made with another plug-in my_vpr.py 00000000 (here {plugin.sha256[:8]})"
    )
    plugins._forget("my_vpr.py")
    copy = f"plugins/{plugin.sha256[:8]}/my_vpr.py"
    assert note_recorded(recorded, Path("step-3"), Path("plugins")) == (
        f"step-3 was made with plug-in my_vpr.py, which is code and was not run; --plugins {copy} runs it"
    )
    with pytest.raises(ValueError, match=f"'mean'; .*; plug-in my_vpr.py of step-3 was not run; --plugins {copy}"):
        AGGREGATORS.get("mean")
    assert load_plugins([copy])[0].sha256 == plugin.sha256
    assert "mean" in AGGREGATORS


def test_a_loss_for_tiles_needs_a_miner_for_tiles(single_process: None) -> None:
    from configs.schema import LossConfig, MemoryConfig
    from memory.global_loss import GlobalLoss

    LOSSES.register("Mine", LOSSES.get("NCALoss"))
    with pytest.raises(ValueError, match=r"loss.name Mine is a plug-in's, for tiles, and loss.miner PairMarginMiner"):
        GlobalLoss(LossConfig(name="Mine", miner="PairMarginMiner"), MemoryConfig())
