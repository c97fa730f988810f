"""The documents: links lead somewhere, tables are complete, quoted messages exist, notebooks run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from configs.files import file_sha256
from configs.load import load_recipe, recipe_text
from configs.schema import Recipe
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CODE = ("configs", "data_pipeline", "model", "memory", "trainer", "eval", "launch")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower() for title in titles)
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and "<!-- " not in target.read_text():
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f'"{page}"' not in navigation] == []


def test_every_key_is_in_the_table(hooks: ModuleType) -> None:
    table = hooks.keys()
    missing = [key for key in Recipe().as_flat() if f"| `{key}` |" not in table]
    assert not missing
    assert "| `memory.decay_lambda` | `0.1` | number ≥ 0 | Larger forgets faster" in table
    assert "| `engine.zero_stage` | `1` | `0`, `1`, `2`, `3` |" in table


def test_what_pages_ask_for_is_there(hooks: ModuleType) -> None:
    from eval.benchmarks.catalogue import CATALOGUE

    asked = {mark for page in PAGES for mark, _ in hooks.MARK.findall(page.read_text())}
    assert asked == set(hooks.PARTS)
    benchmarks, recipes, rooms = hooks.benchmarks(), hooks.recipes(), hooks.rooms()
    assert all(f"| `{name}` |" in benchmarks for name in CATALOGUE)
    assert all(f"| `{file.stem}` | " in recipes for file in (ROOT / "configs").glob("*.yaml"))
    assert all(f">{room}</text>" in rooms for room in CODE)
    assert "--out" in hooks._help_of(importlib.import_module("launch.report_command").main, "report")
    assert "A measurement for a claim" in hooks.filled("# Contributing\n\n<!-- include CONTRIBUTING.md -->\n")


@cache
def texts_of_the_code() -> str:
    """Every text in the code; parts that are put in are left out."""
    texts = []
    for file in [ROOT / "rerankvpr.py", *(file for room in CODE for file in (ROOT / room).rglob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\0".join(texts)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 25
    assert [quote for quote in quoted if quote not in texts_of_the_code()] == []


def test_every_metric_of_a_step_is_explained() -> None:
    page = (DOCS / "metrics.md").read_text()
    tree = ast.parse((ROOT / "memory" / "tiled_loss.py").read_text())
    (figures,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_figures")
    returned = next(node.value for node in ast.walk(figures) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    names = {key.value for key in returned.keys if isinstance(key, ast.Constant)}
    names |= set(re.findall(r'"train/(\w+)"', (ROOT / "trainer" / "metrics.py").read_text()))
    names |= set(re.findall(r'"((?:queue|decay)_\w+)":', (ROOT / "memory" / "strategies.py").read_text()))
    assert len(names) > 15
    assert [
        name for name in names if not {f"`train/{name}`", f"`memory/{name}`"} & set(re.findall("`.*?`", page))
    ] == []


def test_readme_is_one_and_a_half_screens() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 650
    assert len(text.splitlines()) < 65
    for part in ("![", "```python", "make demo", "CITATION.cff", "](docs/index.md"):
        assert part in text


def write_demo(home: Path) -> None:
    """What notebooks need of `make demo`, small and untrained: town, shards, a checkpoint with a queue, metrics."""
    import rerankvpr
    from data_pipeline.shard_options import ShardOptions
    from data_pipeline.shards import write_shards
    from data_pipeline.sources.gsv_cities import read_gsv_cities
    from data_pipeline.town.render import Town, render_town
    from memory.queue import MemoryQueue
    from tests.checkpoints import write_checkpoint
    from trainer.manifest import MANIFEST

    town, run = home / "data" / "town", home / "runs" / "demo"
    render_town(town, Town(places=6, views=4, held_out_places=10), processes=2)
    write_shards(read_gsv_cities(town / "train"), home / "data" / "town_shards", ShardOptions())
    recipe = load_recipe(Path("demo"))
    checkpoint, _ = write_checkpoint(run, recipe)
    photographs = sorted((town / "train" / "Images").rglob("*.jpg"))
    descriptors = rerankvpr.load(run).describe(photographs, out="torch")
    queue = MemoryQueue(40, descriptors.shape[1])
    for step in range(4):
        part = slice(6 * step, 6 * step + 6)
        queue.enqueue(descriptors[part], torch.arange(24)[part] // 4, step)
    file = checkpoint / "queue-00000-of-00001.safetensors"
    file.unlink()
    save_file({name: value.clone() for name, value in queue.state_dict().items()}, file)
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (run / "recipe.yaml").write_text(recipe_text(recipe))
    figures = ["memory/negatives_from_memory", "memory/mined_negative_age"]
    figures += [f"train/{name}" for name in ("loss", "mined_negatives", "hardest_negative", "hardest_positive")]
    lines = [{"step": step, "time_ms": step, **dict.fromkeys(figures, 0.1 * step)} for step in range(5)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
def test_notebooks_run(tmp_path: Path) -> None:
    write_demo(tmp_path)
    done = forked.run(tmp_path, "docs.run_notebooks", "--home", str(tmp_path), "--check")
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = dict(re.findall(r"^(\S+)\.ipynb: (\d+) outputs$", done.stdout, re.MULTILINE))
    assert len(outputs) == 7
    assert all(int(count) >= 2 for count in outputs.values())


def test_notebooks_show_what_they_draw(hooks: ModuleType) -> None:
    for notebook in sorted((DOCS / "notebooks").glob("*.ipynb")):
        page = hooks.notebook(notebook.name)
        assert "```python\n" in page
        assert 'src="data:image/' in page, f"{notebook.name}: `make notebooks` writes its pictures"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr
    keys, commands = ((tmp_path / "site" / f"{page}.html").read_text() for page in ("keys", "commands"))
    assert "memory.decay_lambda" in keys
    assert "--help-all" in commands
    assert "<!-- rooms" not in (tmp_path / "site" / "how_it_works.html").read_text()
