"""What the doctor finds of the machines of a group, and what a rank takes for its device."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.facts import Facts, gather_facts, memory_errors, with_feeding
from launch.findings import Finding, Network, judge_facts, judge_network
from tests import forked
from tests.gpu import GPU
from tests.ranks import ROOT
from trainer.devices import promised_gpu, rank_device
from trainer.process_group import bound_device
from trainer.slurm_step import environment_of_step, first_host

FACTS = Facts(0, "a", 0, "eth0", {"torch": "2.11", "rerankvpr": "12ab"}, {"/runs": 500.0}, [])
NETWORK = Network([0.0, 0.001], 0.2, 900.0)


def judge(facts: list[Facts], network: Network) -> list[Finding]:
    return judge_facts(facts) + judge_network(facts, network)


def test_a_healthy_group_has_no_findings_but_good_ones() -> None:
    assert {one.level for one in judge([FACTS, replace(FACTS, rank=1, host="b", node=1)], NETWORK)} == {"ok"}


@pytest.mark.parametrize(
    ("other", "network", "level", "words"),
    [
        (
            {"versions": {"torch": "2.12", "rerankvpr": "12ab"}},
            {},
            "error",
            "torch is 2.12 on b (rank 1) and 2.11 on a",
        ),
        ({"versions": {"torch": "2.11", "rerankvpr": "99"}}, {}, "error", "rerankvpr is 99 on b"),
        ({"not_seen": ["/runs"]}, {}, "error", "b (rank 1) does not see rank 0's /runs"),
        ({"free_gb": {"/runs": 2.0}}, {}, "warning", "/runs has 2.0 GB free on b"),
        ({}, {"clock_offsets_s": [0.0, -90.0]}, "warning", "the clock of b (rank 1) is -90.0 s off"),
        ({}, {"bandwidth_mb_s": 3.0}, "warning", "3 MB/s a rank"),
        ({"gpu": "H", "gpu_free_gb": 70.0, "gpu_total_gb": 80.0}, {}, "warning", "70.0 of 80.0 GB free"),
        ({"gpu": "H", "gpu_errors": 3}, {}, "error", "3 uncorrected memory errors"),
        ({"gpu": "H"}, {}, "error", "rank 0 on a has no GPU, and rank 1 on b has"),
        ({"gpu": "H", "gpu_note": "nvidia-smi does not answer within 30 s"}, {}, "warning", "does not answer within"),
        (
            {"no_gpu_because": "SLURM_GPUS=8 promises", "no_gpu_remedy": "mend it"},
            {},
            "error",
            "rank 1 on b: SLURM_GPU",
        ),
        ({"cores": [4], "cores_of_host": 64}, {}, "warning", "b: 1 rank(s) use 1 of 64 cores (rank 1: 4)"),
        ({"cores": [0, 1, 2, 7], "cores_of_host": 8}, {}, "ok", "b: 1 rank(s) use 4 of 8 cores (rank 1: 0-2,7)"),
        ({"cores": [0], "cores_of_host": 1}, {}, "ok", "b: 1 rank(s) use 1 of 1 cores"),  # there are no more
        ({"gpu": "H", "shm_free_gb": 0.06}, {}, "warning", "b: /dev/shm has 0.06 GB free"),
        ({"gpu": "H", "infiniband": True, "memlock_gb": 0.01}, {}, "warning", "b: a process may lock 0.01 GB"),
    ],
)
def test_each_fault_is_found_and_has_a_remedy(
    other: dict[str, object], network: dict[str, object], level: str, words: str
) -> None:
    facts = [FACTS, replace(FACTS, **({"rank": 1, "host": "b", "node": 1} | other))]  # type: ignore[arg-type]
    found = [one for one in judge(facts, replace(NETWORK, **network)) if words in one.what]  # type: ignore[arg-type]
    assert [one.level for one in found] == [level]
    assert found[0].remedy or level == "ok"


@pytest.mark.slow
def test_the_doctor_examines_two_real_ranks(tmp_path: Path) -> None:
    command = ["launch", "--nproc-per-node", "2", "--", "doctor", "--shared", str(tmp_path)]
    done = forked.run(ROOT, "rerankvpr", *command, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in ("versions agree", "clocks agree", "2 rank(s) on 1 node(s)", "all-reduce:", f"{tmp_path}: "):
        assert words in done.stdout
    assert "0 errors" in done.stdout
    assert list(tmp_path.iterdir()) == []  # what it left to be seen is gone


def test_ranks_on_one_gpu_are_an_error() -> None:
    """NCCL refuses two ranks on one device; without CUDA_VISIBLE_DEVICES each GPU has one."""
    gpu = replace(FACTS, gpu="H", gpu_uuid="GPU-1", gpu_free_gb=80.0, gpu_total_gb=80.0, shm_free_gb=9.0)
    both = [gpu, replace(gpu, rank=1)]
    (found,) = [one for one in judge_facts(both) if one.level == "error"]
    assert found.what == "2 ranks of a compute on one GPU, GPU-1"
    fine = judge_facts([gpu, replace(gpu, rank=1, gpu_uuid="GPU-2"), replace(gpu, rank=2, node=1, host="b")])
    assert {one.level for one in fine} == {"ok"}


@pytest.mark.slow
def test_machines_are_judged_before_the_network_is_tried() -> None:
    """A GPU that SLURM promises and torch does not find: an error of both ranks, and no all-reduce was begun."""
    if GPU:
        pytest.skip("there is a GPU here")
    command = ["launch", "--nproc-per-node", "2", "--", "doctor"]
    environment = {"SLURM_GPUS_ON_NODE": "1"}
    done = forked.run(ROOT, "rerankvpr", *command, environment=environment, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "SLURM_GPUS_ON_NODE=1 promises a GPU, and torch" in done.stdout
    assert "2 errors" in done.stdout
    assert "all-reduce" not in done.stdout


def test_a_promised_gpu_that_torch_does_not_find_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if GPU:
        pytest.skip("there is a GPU here")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not promised_gpu()
    assert rank_device() == torch.device("cpu")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    with pytest.raises(ValueError, match=r"SLURM_JOB_GPUS=0,1 promises a GPU.* finds none: .*CUDA_VISIBLE_DEVICES"):
        rank_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user's own choice
    assert rank_device() == torch.device("cpu")


def test_a_group_of_one_is_not_bound_to_its_gpu() -> None:
    gpu = torch.device("cuda", 0)
    assert bound_device(gpu, 1) is None
    assert bound_device(gpu, 2) == gpu
    assert bound_device(torch.device("cpu"), 2) is None


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("echo 3", (3, "")),
        ("echo '[N/A]'", (0, "")),
        ("exec sleep 30", (0, "nvidia-smi does not answer within 0.5 s")),
        ("echo No devices were found; exit 6", (0, "nvidia-smi ends with status 6: No devices were found")),
    ],
)
def test_an_nvidia_smi_that_hangs_or_fails_is_a_note(
    body: str, found: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for a UUID, which CUDA_VISIBLE_DEVICES does not number anew."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/bash\n[ "$1" = --id=GPU-7 ] || exit 9\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("launch.facts.NVIDIA_SMI_S", 0.5)
    assert memory_errors("GPU-7") == found


def test_facts_of_this_machine(tmp_path: Path) -> None:
    facts = gather_facts(0, [tmp_path], [], {})
    assert facts.cores == sorted(os.sched_getaffinity(0))
    assert facts.cores_of_host == os.cpu_count()
    assert facts.not_seen == []


def test_tasks_of_plain_srun_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --ntasks 8 without torchrun: eight ranks of one group, not eight groups of one."""
    unset = ("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES")
    for name in unset:
        monkeypatch.delenv(name, raising=False)
    assert environment_of_step() == {}
    step = {"STEP_NUM_TASKS": "8", "PROCID": "5", "LOCALID": "1", "NODEID": "1", "JOB_ID": "12", "STEP_ID": "0"}
    for name, value in {**step, "STEP_NODELIST": "localhost,other[3-4]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = environment_of_step()
    named = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "localhost"}
    assert named.items() <= found.items()
    assert found["MASTER_PORT"] == "20084"
    assert "GLOO_SOCKET_IFNAME" in found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # srun --gpus-per-task 1
    assert environment_of_step()["LOCAL_RANK"] == "0"
    monkeypatch.setenv("SLURM_STEP_NODELIST", "no-such-host[1-2].invalid")
    with pytest.raises(ValueError, match=r"no-such-host1\.invalid, is unknown here; set MASTER_ADDR"):
        environment_of_step()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun rerankvpr launch, one agent a node
    assert environment_of_step() == {}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n1", "n1"), ("n[07-09,12],m3", "n07"), ("a,b", "a"), ("r[1,3]c[05-06]", "r1c05"), ("gpu-[3]", "gpu-3")],
)
def test_the_first_host_of_a_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_cores_that_decode_too_little_for_their_gpus_are_found() -> None:
    of_node = [
        replace(
            FACTS,
            rank=n,
            cores=list(range(16)),
            cores_of_host=16,
            images_per_s=3000,
            core_images_per_s=800,
            image_bytes=3e4,
        )
        for n in range(8)
    ]
    (found,) = [one for one in judge_facts(of_node) if "images/s each need" in one.what]
    assert found.level == "warning"
    assert "8 rank(s) at 3,000 images/s each need 30 cores" in found.what
    assert "0.72 GB/s; it has 16" in found.what
    assert "data.decode nvjpeg" in found.remedy
    (found,) = [one for one in judge_facts(of_node[:4]) if "images/s each need" in one.what]
    assert found.level == "ok"
    assert not [one for one in judge_facts([FACTS]) if "images/s each need" in one.what]


def test_decoding_is_measured_where_a_rate_is_asked_for() -> None:
    assert with_feeding(FACTS, None) == FACTS
    facts = with_feeding(FACTS, 500.0)
    assert facts.images_per_s == 500
    assert facts.core_images_per_s > 10
    assert 15_000 < facts.image_bytes < 60_000
