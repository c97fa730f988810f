"""What `make gpu` runs, at reduced size on the CPU: measurements, the runner's limits, and the wheels that it needs."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.giant import write_noise
from benchmarks.gpu import PARTS, Options, Part, run_part
from benchmarks.wheelhouse import locked, names_in, needed, project_roots, version_of
from tests import forked

ROOT = Path(__file__).resolve().parent.parent


def measure(part: str, tmp_path: Path, *more: str) -> tuple[dict[str, float], str]:
    """Runs a measurement at reduced size; its figures, and what it printed."""
    figures = tmp_path / "figures.json"
    done = forked.run(tmp_path, PARTS[part].module, *PARTS[part].small.split(), "--json", str(figures), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(figures.read_text()) if figures.exists() else {}, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", ["throughput", "compiled", "inference"])
def test_measurements_run_at_reduced_size(part: str, tmp_path: Path) -> None:
    figures, _ = measure(part, tmp_path)
    assert figures
    assert all(value > 0 for value in figures.values())


@pytest.mark.slow
def test_the_split_of_a_step_runs_at_reduced_size(tmp_path: Path) -> None:
    write_noise(tmp_path, places=6, size=(40, 30))
    _, printed = measure("loader", tmp_path, "--worker", str(tmp_path))  # as one of its ranks
    assert json.loads(printed.splitlines()[-1])["step"] > 0


@pytest.mark.slow
def test_parts_keep_what_they_wrote_and_are_stopped_at_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_part.py").write_text(
        "import sys, time\nopen(sys.argv[-1], 'w').write('{\"done\": 1.0}')\nprint('begun', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = run_part("slow", Part("slow_part", "", "", 60), Options(out=tmp_path), limit_s=5)
    assert outcome.status == "stopped after 5 s"
    assert outcome.figures == {"slow/done": 1.0}
    assert "begun" in outcome.output


@pytest.mark.slow
def test_one_command_writes_figures_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--small", "--parts", "loss"])
    gpu.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loss/32x256x16/seconds"] > 0
    assert "REDUCED SIZES" in (tmp_path / "table.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--parts", "lost"])
    with pytest.raises(SystemExit, match="no part 'lost'; parts: tests, "):
        gpu.main()


def test_wheels_are_those_of_the_lock_that_the_machine_lacks() -> None:
    lock = locked(
        "Tyro==1.0 \\\n    --hash=sha256:00\nnumpy==2.2 ; python_full_version < '3.11'\n"
        "numpy==2.5 ; python_full_version >= '3.12' \\\n    --hash=sha256:00\n"
    )
    assert version_of("tyro", lock, "3.12") == "1.0"
    assert version_of("numpy", lock, "3.12") == "2.5"
    with pytest.raises(SystemExit, match="torch is not in"):
        version_of("torch", lock, "3.12")
    have = names_in("# there\nTyping_Extensions==4.1\nPyYAML\n")
    assert have == {"typing-extensions", "pyyaml"}
    assert {"torchcodec", "deepspeed", "torchvision"} <= set(project_roots())
    assert not {"torch", "mlflow", "faiss-gpu"} & set(project_roots())
    found = needed(("pydantic",), have, "3.12")
    assert "pydantic-core" in found
    assert "typing-extensions" not in found
