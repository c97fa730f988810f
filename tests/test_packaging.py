"""The wheel, installed where nothing of this checkout is in reach; the lock; the page of licences."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.test_layout import BELOW

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).parent / "uv"


def run(argv: list[str | Path], cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built in a copy of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "rerankvpr.py"):
        shutil.copy2(ROOT / name, source)
    for room in (*BELOW, "tests", "benchmarks"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run([sys.executable, "-c", build], source)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_every_room_and_nothing_else(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {"rerankvpr.py"}
    for room in BELOW:
        wanted |= {
            str(file.relative_to(ROOT))
            for file in (ROOT / room).rglob("*")
            if file.suffix in (".py", ".yaml", ".typed", ".md", ".html", ".css", ".js")
            and "__pycache__" not in file.parts
        }
        assert f"{room}/py.typed" in files
    assert files == wanted


def test_the_wheel_runs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies that are installed here, and none of this checkout."""
    home = tmp_path / "env"
    run([UV, "venv", "--quiet", "--offline", "--python", sys.executable, home], tmp_path)
    run([UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", home / "bin/python", wheel], tmp_path)
    (packages,) = home.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert "shard" in run([home / "bin/rerankvpr", "--help"], home)
    recipes = [file.stem for file in (ROOT / "configs").rglob("*.yaml")]
    assert recipes
    load = "import sys, configs.load as c; print(c.__file__, *(c.load_recipe(c.Path(n)).name for n in sys.argv[1:]))"
    place, *names = run([home / "bin/python", "-c", load, *recipes], home).split()
    assert place == str(packages / "configs/load.py")
    assert names == recipes


def locked() -> dict[str, list[tuple[str, str]]]:
    """(version, what follows) of each package in the lock."""
    text = (ROOT / "requirements.lock").read_text()
    found: dict[str, list[tuple[str, str]]] = {}
    for name, version, rest in re.findall(r"^([a-z0-9-]+)==([^\s;]+)((?:.*\\\n)*.*)", text, re.MULTILINE):
        found.setdefault(name, []).append((version, rest))
    return found


def test_the_lock_serves_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.10,<3.15"
    asked = project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]
    have = locked()
    for requirement in map(Requirement, asked):
        versions = [version for version, _ in have[re.sub(r"[-_.]+", "-", requirement.name).lower()]]
        fitting = [version for version in versions if requirement.specifier.contains(version)]
        assert fitting == versions if requirement.marker is None else fitting, requirement


def test_every_file_of_the_lock_has_a_hash_and_no_address() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
    for name, versions in locked().items():
        assert all("--hash=sha256:" in rest for _, rest in versions), name


def test_the_licences_are_the_dependencies() -> None:
    run([sys.executable, "docs/licences.py", "--check"], ROOT)
