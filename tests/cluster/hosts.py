"""Separate hosts on one machine: namespaces h1, h2, ... with a network and a /tmp of their own, without a way out."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.own_tmp import own_tmp
from tests.cluster.workplace import ROOT, environment

NET = "10.77.0"


def ip(*command: str) -> None:
    """Runs `ip`."""
    subprocess.run(["ip", *command], check=True, capture_output=True)


@dataclass
class Agent:
    """A `rerankvpr launch` on a host."""

    host: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """What it and its ranks printed."""
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """All processes of the agent, itself last."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [*parent.children(recursive=True), parent]
        return []

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, the processes that run `rank`."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if "rank" in command and "launch" not in command:
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to agent and ranks: the host loses power."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout_s: float) -> int:
        """Its status."""
        return self.process.wait(timeout_s)


@dataclass
class Hosts:
    """Namespaces of one switch, and what was started in them."""

    tag: str  # begins the names of namespaces, so that two of these do not meet
    count: int
    agents: list[Agent] = field(default_factory=list)
    wires: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def address(self, i: int) -> str:
        """Address of host i, from 1."""
        return f"{NET}.{i}"

    def launch(self, i: int, folder: Path, log: Path, *argv: str) -> Agent:
        """Starts `rerankvpr launch ARGV` on host i, with its rendezvous on host 1."""
        name = f"{self.tag}h{i}"
        log.parent.mkdir(parents=True, exist_ok=True)
        host = f'hostname h{i}; exec "$@"'
        flags = ("--rdzv", self.address(1), "--nproc-per-node", "1", *argv)
        process = subprocess.Popen(
            [
                *("ip", "netns", "exec", name, *own_tmp(folder), "unshare", "--uts", "bash", "-c", host, "_"),
                *(sys.executable, "-m", "rerankvpr", "launch", *flags),
            ],
            cwd=folder,
            env=environment(),
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        self.agents.append(Agent(f"h{i}", process, log))
        return self.agents[-1]

    def link(self, i: int, state: str) -> None:
        """Sets the link of host i `up` or `down`."""
        ip("-n", f"{self.tag}sw", "link", "set", f"v{i}", state)

    def delay(self, milliseconds: float) -> None:
        """Takes hosts 1 and 2 off the switch and joins them by a wire that delays what either sends."""
        switch = f"{self.tag}sw"
        for port in ("v1", "v2"):
            ip("-n", switch, "link", "set", port, "nomaster")
        wire = [sys.executable, str(ROOT / "tests" / "cluster" / "slow_wire.py"), "v1", "v2", str(milliseconds / 1000)]
        self.wires.append(subprocess.Popen(["ip", "netns", "exec", switch, *wire]))

    def round_trip_ms(self) -> float:
        """Time of a TCP connection from host 1 to a closed port of host 2, which answers at once."""
        code = f"import socket, time; t = time.time(); socket.socket().connect_ex(('{self.address(2)}', 9))"
        code += "; print(1000 * (time.time() - t))"
        done = subprocess.run(
            ["ip", "netns", "exec", f"{self.tag}h1", sys.executable, "-c", code], capture_output=True, check=True
        )
        return float(done.stdout)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Makes `count` hosts 10.77.0.1, ... and removes them, with all that was started in them."""
    if os.geteuid() or not shutil.which("ip"):
        raise RuntimeError("hosts are made by root with iproute2: apt-get install iproute2")
    made = Hosts(f"rv{os.getpid()}", count)
    switch = f"{made.tag}sw"
    names = [f"{made.tag}h{i}" for i in range(1, count + 1)]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", switch, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", switch, "link", "set", f"v{i}", "master", "br0")
            ip("-n", switch, "link", "set", f"v{i}", "up")
            ip("-n", name, "addr", "add", f"{made.address(i)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield made
    finally:
        for agent in made.agents:
            agent.kill()
        for wire in made.wires:
            wire.kill()
            wire.wait()
        for name in (*names, switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def until(done: Callable[[], bool], timeout_s: float, agents: list[Agent]) -> float:
    """Waits for something and returns the seconds that it took; raises with the agents' logs if it does not come."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > timeout_s:
            logs = "\n".join(f"--- {agent.host}\n{agent.text()[-3000:]}" for agent in agents)
            raise AssertionError(f"not within {timeout_s} s\n{logs}")
        time.sleep(0.05)
    return time.monotonic() - began
