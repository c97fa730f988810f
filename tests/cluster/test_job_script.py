"""A training's job script in a real SLURM, with a stand-in for torchrun's agent: which signal ends in which state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.slurm import Resources, torchrun_job
from tests.cluster.slurm import Slurm

STAND_IN = Path(__file__).resolve().parent / "stand_in_agent.py"
NODES = {"n1", "n2"}


@dataclass
class Submitted:
    """A job of two nodes, and what its agents noted."""

    slurm: Slurm
    number: str
    out: Path

    def lines(self, name: str) -> list[str]:
        """Lines of `starts` or `signals`."""
        path = self.out / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_start(self, times: int) -> None:
        """Until both agents have started that often."""
        self.slurm.wait_for(self.number, lambda: len(self.lines("starts")) >= 2 * times, 90)

    def signalled(self, name: str, start: int) -> bool:
        """Whether both agents got just this signal in their start of that number, from 1, each start ending so."""
        return set(self.lines("signals")[2 * start - 2 : 2 * start]) == {f"{name} {node}" for node in NODES}

    def restarts(self) -> int:
        """SLURM's count."""
        return int(self.slurm.job(self.number)["Restarts"])


def submit(slurm: Slurm, out: Path, want: Resources) -> Submitted:
    """Hands the script of a training to sbatch."""
    job = torchrun_job("job", out, ["train", "demo"], want, python=str(STAND_IN), cwd=out)
    job.script.write_text(job.text)
    number = slurm.run("env", f"OUT={out}", "sbatch", "--parsable", str(job.script)).strip()
    return Submitted(slurm, number, out)


def test_preempted_requeued_by_slurm_and_a_node_lost(two_nodes: Slurm, tmp_path: Path) -> None:
    """After each of the three the job starts again on both nodes, and in the end it is COMPLETED."""
    job = submit(two_nodes, tmp_path, Resources(nodes="2", time="20", sbatch=("exclusive",)))
    job.wait_for_start(1)
    urgent = ("--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    two_nodes.wait(two_nodes.run("sbatch", "--parsable", *urgent).strip(), "COMPLETED", 60)
    job.wait_for_start(2)
    assert job.signalled("SIGUSR1", 1)
    assert "saved; requeued (1 of at most 20)" in two_nodes.log(job.number)

    two_nodes.run("scontrol", "requeue", job.number)
    job.wait_for_start(3)
    assert job.signalled("SIGTERM", 2)
    assert "requeued (2 of" not in two_nodes.log(job.number)  # Slurm did

    two_nodes.lose_node("n2")
    two_nodes.wait_for(job.number, lambda: job.restarts() == 3, 60)
    two_nodes.return_node("n2")
    job.wait_for_start(4)
    (tmp_path / "finish").touch()
    two_nodes.wait(job.number, "COMPLETED", 60)
    assert job.restarts() == 3


def test_a_cancelled_job_stays_cancelled(two_nodes: Slurm, tmp_path: Path) -> None:
    """Its agents are told to stop; the script does not put it back."""
    job = submit(two_nodes, tmp_path, Resources(nodes="2", time="20"))
    job.wait_for_start(1)
    two_nodes.run("scancel", job.number)
    two_nodes.wait_until_idle(60)
    assert two_nodes.states(job.number) == ["CANCELLED"]
    assert job.signalled("SIGTERM", 1)
    assert job.restarts() == 0


def test_a_time_limit_requeues_as_often_as_was_allowed(two_nodes: Slurm, tmp_path: Path) -> None:
    """USR1 comes before the limit; after the last requeue the job ends with status 75."""
    job = submit(two_nodes, tmp_path, Resources(nodes="2", time="1", signal_s=55, max_requeues=1))
    job.wait_for_start(2)
    assert job.signalled("SIGUSR1", 1)
    two_nodes.wait(job.number, "FAILED", 90)
    assert job.signalled("SIGUSR1", 2)
    assert two_nodes.job(job.number)["ExitCode"] == "75:0"
    assert "requeued 1 times already: submit again to resume" in two_nodes.log(job.number)
