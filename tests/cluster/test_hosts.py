"""Trainings across real separate hosts: network namespaces, each with an interface, a name and an agent of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Agent, Hosts, hosts, until
from tests.cluster.workplace import losses, steps_done_twice

EVERY = 20  # steps between checkpoints


def train(net: Hosts, i: int, workplace: Path, output: str, nnodes: str, steps: int, *flags: str) -> Agent:
    """Starts host i's part of a training."""
    launch = ("--nnodes", nnodes, "--", "train", str(workplace / "recipe.yaml"), "--output", output)
    more = ("--trainer.max-steps", str(steps), "--tracking.enabled", "False", "--eval.benchmarks", *flags)
    return net.launch(i, workplace, workplace / f"{output}.h{i}.log", *launch, *more)


def step(workplace: Path, output: str) -> int:
    """Steps that a training has logged."""
    return max(losses(workplace / output), default=0)


def test_the_doctor_examines_two_hosts(tmp_path: Path) -> None:
    """Hosts whose names nobody resolves meet by address, on the interface that leads there."""
    with hosts(2) as net:
        argv = ("--nnodes", "2", "--", "doctor", "--shared", str(tmp_path / "out"))
        agents = [net.launch(i, tmp_path, tmp_path / f"h{i}.log", *argv) for i in (1, 2)]
        assert [agent.wait(300) for agent in agents] == [0, 0], "\n".join(agent.text() for agent in agents)
    assert "2 rank(s) on 2 node(s); h1: eth0, h2: eth0" in agents[0].text()
    assert "0 errors" in agents[0].text()


@pytest.mark.parametrize("count", [2, 3])
def test_training_across_hosts_equals_one_host(workplace: Path, unbroken: Path, count: int) -> None:
    """Two hosts give the bits of two ranks of one host; three train with two and one that waits, P being 4."""
    steps = 60
    with hosts(count) as net:
        nnodes = str(count) if count == 2 else f"{count}:{count + 1}"
        agents = [train(net, i, workplace, f"across{count}", nnodes, steps) for i in range(1, count + 1)]
        assert [agent.wait(240) for agent in agents] == [0] * count, "\n".join(agent.text() for agent in agents)
    one, ours = losses(unbroken), losses(workplace / f"across{count}")
    assert sorted(ours) == [*range(1, steps + 1)]
    assert [ours[s] for s in sorted(ours)] == [one[s] for s in sorted(ours)]
    assert "GLOO_SOCKET_IFNAME=eth0" in agents[0].text()
    if count == 3:
        assert "2 of 3 ranks train" in "".join(agent.text() for agent in agents)


def test_a_killed_host_leaves_the_rest_to_go_on_and_is_taken_back(workplace: Path, unbroken: Path) -> None:
    """kill -9 of agent and rank of h2; h1 goes on alone from the last checkpoint; h2 comes back; the curve is one."""
    output, steps = "killed", 800
    with hosts(2) as net:
        agents = [train(net, i, workplace, output, "1:2", steps) for i in (1, 2)]
        until(lambda: step(workplace, output) > 3 * EVERY, 120, agents)
        agents[1].kill()
        lost_at, began = step(workplace, output), time.monotonic()
        until(lambda: "resumed from" in agents[0].text(), 60, agents)
        until(lambda: step(workplace, output) > lost_at, 60, agents)
        took = time.monotonic() - began
        print(f"killed at step {lost_at}; past it again after {took:.1f} s")
        agents.append(train(net, 2, workplace, output, "1:2", steps))
        began = time.monotonic()
        until(lambda: agents[0].text().count("resumed from") == 2, 60, agents)
        print(f"two hosts again after {time.monotonic() - began:.1f} s, at step {step(workplace, output)}")
        until(lambda: "2 rank(s) on cpu" in agents[0].text().rsplit("resumed from", 1)[1], 30, agents)
        assert agents[0].wait(240) == 0, agents[0].text()
        assert agents[2].wait(30) == 0, agents[2].text()
    one, ours = losses(unbroken), losses(workplace / output)
    assert sorted(ours) == [*range(1, steps + 1)]
    assert [ours[s] for s in range(1, lost_at)] == [one[s] for s in range(1, lost_at)]
    near = [ours[s] for s in range(lost_at, lost_at + 40)]  # one rank instead of two sums in another order
    assert near == pytest.approx([one[s] for s in range(lost_at, lost_at + 40)], rel=5e-3)
    assert steps_done_twice(workplace / output) <= 2 * EVERY  # back to the last checkpoint that was written


def test_hosts_with_folders_of_their_own_evaluate(workplace: Path, unbroken: Path) -> None:
    """Benchmarks before and after, each host with its own /tmp; both lose power in between; then `eval` on both."""
    output, steps = "own-folders", 80
    benchmarks = ("--eval.benchmarks", "town")
    with hosts(2) as net:
        agents = [train(net, i, workplace, output, "2", steps, *benchmarks) for i in (1, 2)]
        until(lambda: step(workplace, output) > 2 * EVERY, 600, agents)
        for agent in agents:
            agent.kill()
        agents = [train(net, i, workplace, output, "2", steps, *benchmarks) for i in (1, 2)]
        assert [agent.wait(600) for agent in agents] == [0, 0], "\n".join(agent.text() for agent in agents)
        assert "untrained: town" in agents[0].text()
        assert "resumed from" in agents[0].text()
        verb = ("--nnodes", "2", "--", "eval", "--checkpoint", output, "--benchmarks", "town")
        logs = [workplace / f"eval.h{i}.log" for i in (1, 2)]
        agents = [net.launch(i, workplace, logs[i - 1], *verb, "--out", "own-eval") for i in (1, 2)]
        assert [agent.wait(600) for agent in agents] == [0, 0], "\n".join(agent.text() for agent in agents)
        agents = [net.launch(i, workplace, workplace / f"homeless.h{i}.log", *verb) for i in (1, 2)]
        assert 0 not in [agent.wait(600) for agent in agents]
        said = "".join(agent.text() for agent in agents)
        assert "rank 1 on h2 does not see rank 0's temporary folder" in said
        assert "name one with --features" in said
    one, ours = losses(unbroken), losses(workplace / output)
    assert [ours[s] for s in range(1, steps + 1)] == [one[s] for s in range(1, steps + 1)]
    trained = json.loads((workplace / output / "results.json").read_text())
    evaluated = json.loads((workplace / "own-eval" / "results.json").read_text())
    assert evaluated["results"][0]["recall"] == trained["results"][0]["recall"]
    assert trained["before"][0]["name"] == "town"
    assert not list((workplace / output).glob(".features-*"))


def test_a_killed_rank_is_started_again(workplace: Path, unbroken: Path) -> None:
    """kill -9 of h2's rank alone: both hosts go on from the last checkpoint with the bits of an unbroken training."""
    output, steps = "rank", 200
    with hosts(2) as net:
        agents = [train(net, i, workplace, output, "1:2", steps) for i in (1, 2)]
        until(lambda: step(workplace, output) > 2 * EVERY, 120, agents)
        began = time.monotonic()
        (rank,) = agents[1].ranks()
        rank.kill()
        until(lambda: "resumed from" in agents[0].text(), 60, agents)
        print(f"resumed after {time.monotonic() - began:.1f} s")
        assert [agent.wait(180) for agent in agents] == [0, 0], "\n".join(agent.text() for agent in agents)
    one, ours = losses(unbroken), losses(workplace / output)
    assert [ours[s] for s in range(1, steps + 1)] == [one[s] for s in range(1, steps + 1)]
    assert steps_done_twice(workplace / output) <= 2 * EVERY  # back to the last checkpoint that was written


def test_a_link_that_goes_down_and_up(workplace: Path) -> None:
    """The host that is cut off: the rest notices after engine.timeout_s and goes on; it is taken back once it is up."""
    output, steps = "link", 1200
    with hosts(2) as net:
        agents = [train(net, i, workplace, output, "1:2", steps, "--engine.timeout-s", "10") for i in (1, 2)]
        until(lambda: step(workplace, output) > 2 * EVERY, 120, agents)
        net.link(2, "down")
        lost_at, began = step(workplace, output), time.monotonic()
        until(lambda: step(workplace, output) > lost_at + 1, 90, agents)
        print(f"alone past step {lost_at} after {time.monotonic() - began:.1f} s")
        net.link(2, "up")
        began = time.monotonic()
        until(lambda: agents[0].text().count("resumed from") == 2, 120, agents)
        print(f"two hosts again after {time.monotonic() - began:.1f} s, at step {step(workplace, output)}")
        assert [agent.wait(240) for agent in agents] == [0, 0], "\n".join(agent.text() for agent in agents)
    assert sorted(losses(workplace / output)) == [*range(1, steps + 1)]
    assert steps_done_twice(workplace / output) <= 2 * EVERY  # back to the last checkpoint that was written


def test_the_loss_of_the_first_host_ends_the_job_in_time(workplace: Path) -> None:
    """The store of the rendezvous is gone with it: the others end, not well, and a new start resumes."""
    output = "first"
    with hosts(2) as net:
        agents = [train(net, i, workplace, output, "1:2", 1500, "--engine.timeout-s", "10") for i in (1, 2)]
        until(lambda: step(workplace, output) > 2 * EVERY, 120, agents)
        agents[0].kill()
        reached, began = step(workplace, output), time.monotonic()
        assert agents[1].wait(150) != 0
        print(f"ended after {time.monotonic() - began:.1f} s: {agents[1].text().splitlines()[-1]}")
        steps = reached + 10
        again = [train(net, i, workplace, output, "2", steps) for i in (1, 2)]
        assert [agent.wait(120) for agent in again] == [0, 0], "\n".join(agent.text() for agent in again)
    assert sorted(losses(workplace / output)) == [*range(1, steps + 1)]
    assert steps_done_twice(workplace / output) <= 2 * EVERY  # back to the last checkpoint that was written


def test_a_slow_link_changes_the_time_alone(workplace: Path, unbroken: Path) -> None:
    """50 ms each way."""
    with hosts(2) as net:
        net.delay(50)
        net.round_trip_ms()  # the first asks for hardware addresses
        assert 100 <= net.round_trip_ms() < 150
        agents = [train(net, i, workplace, "slow", "2", 20) for i in (1, 2)]
        assert [agent.wait(240) for agent in agents] == [0, 0], "\n".join(agent.text() for agent in agents)
    one, ours = losses(unbroken), losses(workplace / "slow")
    assert [ours[s] for s in range(1, 21)] == [one[s] for s in range(1, 21)]
    assert "doctor: all-reduce: 1" in "".join(agent.text() for agent in agents)  # 100 ms and more
