"""What a job script does with values that a shell or sbatch could read as code, run by bash with an srun that notes."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch.slurm import Job, Resources, array_job, torchrun_job
from launch.submit import stage_jobs

CODE = [
    "$(touch PWNED)",
    "; touch PWNED\n",
    "' touch PWNED '",
    '"; touch PWNED; "',
    ") touch PWNED ;;",
    "<(touch PWNED)",
]
DIRECTIVES = ["\n#SBATCH --wrap=touch", " --exclusive", " -N9", "--", "=", "%j", "esac", "-c"]
CHARACTERS = [*"\n'\"`\\ #$&|\r\t*~!", "\x85", "\u2028", "\x1b", "é", "\udcff"]
PIECES = st.sampled_from([*CODE, *DIRECTIVES, *CHARACTERS])
STRINGS = st.one_of(st.text(max_size=20), st.lists(PIECES, max_size=5).map("".join))
PLACES = STRINGS.filter(lambda text: "\0" not in text)

STUBS = {
    "srun": 'printf "%s\\0" "$@" >"$NOTED/srun"',
    "scontrol": "[ $2 = node ] && echo NodeAddr=127.0.0.1; true",
    "touch": 'echo "$@" >"$NOTED/touched"',
    "head": "exec /usr/bin/head $@",
    "sed": 'exec /usr/bin/sed "$@"',
}


@pytest.fixture(scope="module")
def stubs() -> Iterator[Path]:
    """A folder with the only commands that the scripts find."""
    with tempfile.TemporaryDirectory() as name:
        for command, body in STUBS.items():
            (Path(name) / command).write_text(f"#!/usr/bin/bash\n{body}\n")
            (Path(name) / command).chmod(0o755)
        yield Path(name)


def run_script(job: Job, stubs: Path, task: int = 0) -> list[str]:
    """The words that srun got, from a run of the script by bash in which nothing else is said or started."""
    with tempfile.TemporaryDirectory() as name:
        script, work = Path(name) / "script", Path(name) / "work"
        script.write_bytes(job.text.encode(errors="surrogateescape"))
        work.mkdir()
        env = {"PATH": str(stubs), "NOTED": name, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
        env |= {"SLURM_NNODES": "2", "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(["/usr/bin/bash", str(script)], cwd=work, env=env, capture_output=True, check=False)
        said = [line for line in done.stdout.splitlines() if not line.startswith(b"job 7, start 0")]
        assert (done.returncode, done.stderr, said) == (0, b"", []), job.text
        assert list(work.iterdir()) == []
        assert not (Path(name) / "touched").exists()
        return [os.fsdecode(word) for word in (Path(name) / "srun").read_bytes().split(b"\0")[:-1]]


def directives(job: Job) -> list[str]:
    """The options that sbatch reads: words of the comments before the first command, by its rules of quotes and `#`."""
    words = []
    for line in job.text.split("\n"):
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words += shlex.split(line[len("#SBATCH") :], comments=True)
    return words


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLACES, st.lists(STRINGS, min_size=1, max_size=3), STRINGS, STRINGS, PLACES)
@example("/runs/a\ntouch PWNED", ["demo"], "python", "", "/home")
@example("/runs/a", ["demo"], "python", "", "/home/me\ntouch PWNED\n")
@example("/runs/a --exclusive", ["demo", "it's"], "my python", "a b.sqsh", "/home/x #y")
@pytest.mark.slow
def test_no_value_of_a_training_is_read_as_code(
    stubs: Path, folder: str, verb: list[str], python: str, image: str, cwd: str
) -> None:
    try:
        want = Resources(nodes="2", python=python, container_image=image)
        job = torchrun_job("t", Path(folder), ["train", *verb], want, python="/env/python", cwd=Path(cwd))
    except ValueError:
        return
    got = run_script(job, stubs)
    srun = ["--kill-on-bad-exit=0", "--wait=60", "--ntasks-per-node=1", "--cpu-bind=none"]
    srun += [f"--container-image={image}"] if image else []
    launch = [python or "/env/python", *shlex.split("-m rerankvpr launch --nnodes 2 --nproc-per-node 1 --rdzv")]
    launch += [*shlex.split("127.0.0.1:20007 --rdzv-id 7.0 --max-restarts 3 --"), "train", *verb]
    assert got == [*srun, "bash", "-c", 'trap "" USR1; exec -- "$@"', "_", *launch]
    log = f"{Path(folder)}".replace("%", "%%") + "/t-%j.log"
    options = [f"--output={Path(log)}", "--open-mode=append", f"--chdir={Path(cwd)}", "--nodes=2"]
    assert directives(job) == ["--job-name=t", *options, "--signal=USR1@120", "--requeue"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(STRINGS, min_size=1, max_size=3), min_size=1, max_size=3), STRINGS, STRINGS)
@example([["a\nesac\ntouch PWNED"], [") touch PWNED ;;"]], "exclusive --nodes=9", "")
@example([["a"]], "comment=a --nodes=9 #b", "")
def test_no_value_of_an_array_is_read_as_code(stubs: Path, verbs: list[list[str]], option: str, mounts: str) -> None:
    try:
        want = Resources(sbatch=(option,) if option else (), container_mounts=mounts)
        job = array_job(
            "e", Path("/job"), [["eval", *v] for v in verbs], want, python="p", cwd=Path("/w"), launched=True
        )
    except ValueError:
        return
    for task, verb in enumerate(verbs):
        launch = shlex.split("p -m rerankvpr launch --nproc-per-node 1 -- eval")
        flags = ["--cpu-bind=none", *([f"--container-mounts={mounts}"] if mounts else [])]
        assert run_script(job, stubs, task) == [*flags, *launch, *verb]
    assert directives(job)[-2:] == [*([f"--{option}"] if option else ["--ntasks-per-node=1"]), "--requeue"]
    assert len(directives(job)) == 7 + (len(verbs) > 1) + bool(option)


@pytest.mark.parametrize(
    "option", ["exclusive --nodes=9", "", "wrap", "comment='x'", 'comment="x" --nodes="9"', "-x", "a\nb"]
)
def test_an_option_of_sbatch_is_one_option(option: str) -> None:
    if option == "wrap":
        Resources(sbatch=(option,))
        return
    with pytest.raises(ValueError, match=r"^--sbatch: ") as error:
        Resources(sbatch=(option,))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a\ntouch PWNED", 'a"b', "a'b", "a\x1bb", "a\\b"])
def test_folders_that_would_end_a_comment_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a recipe's output, eval's --out, shard's OUT and the working folder: one line that says which."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output": str(tmp_path / name), "tracking": {"enabled": False}}))
    for verb in (
        ["train", str(recipe)],
        ["shard", "utm", "SRC", str(tmp_path / name)],
        ["eval", "--weights", "w.pth", "--benchmarks", "town", "--out", str(tmp_path / name)],
    ):
        with pytest.raises(ValueError, match=r"^the output folder: ") as error:
            stage_jobs(verb, Resources())
        assert "\n" not in str(error.value)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ValueError, match=r"^the (working|output) folder: "):
        stage_jobs(["train", "demo"], replace(Resources(), nodes="1"))
