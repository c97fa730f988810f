"""`rerankvpr launch`: a verb on many processes, by torchrun's agent, from a warm fork server."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from configs.flags import parse_flags, parse_known_flags
from configs.recipe_flags import parse_over_recipe
from configs.schema import Recipe
from configs.secrets import hidden, without_secrets
from launch import fork_server
from launch.rendezvous import end_when_cut_off
from launch.stages import resuming, split_at_dashes
from trainer import flight_recorder
from trainer.command import TrainCommand
from trainer.routes import has_infiniband, interface_environment, loopback, route_to
from trainer.stop_signal import REQUEUE_STATUS

PROG = "rerankvpr launch"
PORT = 29400
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
CUT_OFF_S = 120
SHUTDOWN_S = 120
OLD_SHUTDOWN_S = 30  # where torchrun has no flag for it
STOPPING = (15, 10)  # SIGTERM, SIGUSR1
OF_EVERY_RANK = ("torch.distributed", "launch.rank", "launch.doctor")
STALLED_STATUS = 74  # of trainer.watchdog, which imports torch
SERVER_GONE = 255  # how multiprocessing reports a process whose fork server has ended


@dataclass(frozen=True)
class LaunchCommand:
    """Runs `rerankvpr VERB ...` (after `--`) in N processes per node, by torchrun, and prints the torchrun command.

    Other flags go to torchrun as they are. Unless they are set already, OMP_NUM_THREADS becomes cores / processes,
    GLOO_SOCKET_IFNAME the interface that leads to HOST, or loopback on one node, and NCCL_SOCKET_IFNAME the same if
    there is no InfiniBand; torch's flight recorder is on. SIGTERM and SIGUSR1 are passed on: train saves, and the
    status is 75 (run me again).

      rerankvpr launch --nproc-per-node 2 -- train demo --output runs/two

      rerankvpr launch --nnodes 2 --rdzv node1 -- train RECIPE          (on both nodes)

      rerankvpr launch --nnodes 2:4 --rdzv node1 -- train RECIPE        (on up to four nodes)
    """

    nproc_per_node: str = "auto"
    """Processes on this node, auto or a number; auto is one per GPU, or one if there is no GPU."""
    nnodes: str = "1"
    """Nodes, N or MIN:MAX; run the same command on each. With a range, training continues with the nodes that are left
    when one is lost, and takes it back when it returns."""
    rdzv: Annotated[str, tyro.conf.arg(aliases=("--rdzv-endpoint",), metavar="HOST[:PORT]")] = ""
    """The first node, by an address that all can reach (port 29400); a node that does not reach it for 120 s ends."""
    rdzv_id: str = "rerankvpr"
    """Name of the rendezvous, for two jobs on one port."""
    max_restarts: int | None = None
    """Restarts after a failed process; by default 0 on one node, 3 with a range of nodes. train resumes."""
    rdzv_conf: str = ""
    """torchrun's, KEY=VALUE,...; last_call_timeout is 10 here: seconds to wait for further nodes of a range."""
    shutdown_timeout: int | None = None
    """Seconds that processes have to save after SIGTERM or SIGUSR1; by default 120. torch 2.11 always gives 30."""
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    """forkserver: one process per node imports PyTorch and the rest once, during the rendezvous; ranks, first and
    restarted, are forks of it. spawn: each rank imports for itself, as under torchrun."""
    dry_run: bool = False
    """Only prints the torchrun command."""

    def __post_init__(self) -> None:
        for name in ("max_restarts", "shutdown_timeout"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number, 0 or more")


@dataclass(frozen=True)
class Launch:
    """A launch as torchrun understands it."""

    arguments: list[str]
    verb: list[str]  # what ranks run, at the end of `arguments` too
    environment: dict[str, str] = field(default_factory=dict)
    start_method: str = "forkserver"
    rendezvous: tuple[str, int] | None = None  # another host's, which this node must reach
    output: Path | None = None  # of a training: where its ranks leave what they know of a standstill

    def command(self) -> str:
        """The command that a person can paste, without secrets."""
        words = [*(f"{k}={v}" for k, v in self.environment.items()), "torchrun", *self.arguments]
        return shlex.join(without_secrets(word, is_address=True) for word in words)


def main(argv: list[str]) -> int:
    """Splits the arguments at `--` and runs torchrun in this process."""
    flags, verb = split_at_dashes(argv)
    if verb is None:
        if {"-h", "--help"} & set(flags):
            parse_flags(LaunchCommand, ["--help"], prog=PROG)
        raise ValueError("launch needs `--` before the verb: rerankvpr launch --nproc-per-node 2 -- train RECIPE")
    if not verb:
        raise ValueError("launch needs a verb after `--`, such as train or eval")
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    if tasks and int(tasks[0]) > 1:
        raise ValueError(
            f"srun started {tasks[0]} launches on this node, and each would start all ranks; give srun "
            f"--ntasks-per-node=1, or leave `launch` out: srun ... rerankvpr {verb[0]} ..."
        )
    ours, others = parse_known_flags(LaunchCommand, flags, prog=PROG)
    recipe = None
    if verb[0] == "train" and not ours.dry_run:  # a mistake is reported once, not by each rank after each restart
        recipe = parse_over_recipe(TrainCommand, verb[1:], verb="train")[0].recipe
    launch = plan_launch(ours, others, verb)
    launch = replace(launch, output=recipe.output) if recipe else launch
    print(launch.command(), flush=True)
    if ours.dry_run:
        return 0
    warm = start_server(launch, preload(verb, recipe))
    if recipe and recipe.model.weights == "timm":
        from model.weights import find_weights

        find_weights(recipe.model.backbone, recipe.model.weights)  # downloads them once, not once in each rank
    return start(launch, warm)


def run(flags: list[str], verb: list[str]) -> int:
    """Runs `rerankvpr VERB` under torchrun; returns 0, or the status of the first process that failed."""
    launch = plan(flags, verb)
    return start(launch, start_server(launch, preload(verb)))


def plan(flags: list[str], verb: list[str]) -> Launch:
    """What torchrun is asked for, from launch's flags and a verb. Raises ValueError naming the flag that is wrong."""
    return plan_launch(*parse_known_flags(LaunchCommand, flags, prog=PROG), verb)


def plan_launch(ours: LaunchCommand, others: list[str], verb: list[str]) -> Launch:
    """What torchrun is asked for; `others` are its own flags. Raises ValueError naming the flag that is wrong."""
    low, high = _nodes(ours.nnodes)
    processes = _processes(ours.nproc_per_node)
    restarts = ours.max_restarts if ours.max_restarts is not None else 3 if low < high else 0
    arguments = [f"--nnodes={ours.nnodes}", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    arguments += [f"--signals-to-handle={SIGNALS}"]
    if _torchrun_has_shutdown_timeout():
        seconds = SHUTDOWN_S if ours.shutdown_timeout is None else ours.shutdown_timeout
        arguments += [f"--shutdown-timeout={seconds}"]
    elif ours.shutdown_timeout is not None:
        raise ValueError(
            f"--shutdown-timeout {ours.shutdown_timeout}: this torch gives processes {OLD_SHUTDOWN_S} s and has no "
            "flag for it; leave it out, or use torch 2.15"
        )
    # A store that torchrun keeps over restarts gives ranks the addresses of dead ones.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **flight_recorder.settings()}
    interface, rendezvous = "", None
    if any(flag.startswith(("--master", "--rdzv-backend", "--standalone")) for flag in others):
        pass  # the caller's own rendezvous
    elif high > 1 or ours.rdzv:
        where, interface, rendezvous = _rendezvous(ours, low < high)
        arguments += where
    else:
        arguments += ["--standalone", "--local-addr=127.0.0.1"]
        interface = loopback()
    environment |= interface_environment(interface, infiniband=has_infiniband())
    environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    environment = {key: os.environ.get(key, value) for key, value in environment.items()}
    if verb[0] == "train" and (restarts or high > 1):
        verb = resuming(verb)
    if high > 1 and verb[0] != "doctor":
        verb = ["rank", *(["--fit"] if low < high else []), "--", *verb]
    torchrun = [*arguments, *others, "-m", "rerankvpr", *verb]
    return Launch(torchrun, verb, environment, ours.start_method, rendezvous=rendezvous)


@functools.cache
def _torchrun_has_shutdown_timeout() -> bool:
    """Whether the installed torch's torchrun has the flag; found in its source, since importing takes seconds."""
    spec = importlib.util.find_spec("torch")
    root = Path(spec.origin).parent if spec and spec.origin else None
    return root is None or "shutdown_timeout" in (root / "distributed" / "run.py").read_text()


def preload(verb: Sequence[str], recipe: Recipe | None = None) -> list[str]:
    """What ranks of a verb import, `recipe` the one of a training, in the form that `fork_server.start` takes."""
    tracked = recipe is None or recipe.tracking.enabled
    if verb[0] == "train":
        return [
            *("trainer.loop", "trainer.command:warm_up", "trainer.engine:import_deepspeed"),
            *("model.dinov2", "scipy.spatial", "eval.report.pictures"),  # of most recipes, imported where they are used
            "deepspeed.module_inject.auto_ep_config",  # by its engine
            *(["mlflow", "mlflow.store.tracking.sqlalchemy_store"] if tracked else []),
            *OF_EVERY_RANK,
        ]
    if verb[0] == "eval":
        return ["eval.evaluate", "eval.report.pictures", "launch.eval_command", "launch.eval_tracking", *OF_EVERY_RANK]
    if verb[0] == "index":
        return ["eval.index.build", "trainer.pretrained", "launch.index_command", *OF_EVERY_RANK]
    return list(OF_EVERY_RANK)


def _nodes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    low = int(match[1]) if match else 0
    high = int(match[2] or match[1]) if match else 0
    if not 1 <= low <= high:
        raise ValueError(f"--nnodes {text}: expected a number of nodes or MIN:MAX, such as 4 or 2:4")
    return low, high


def _processes(text: str) -> int:
    if text in ("auto", "gpu"):
        import torch

        from trainer.devices import REMEDY, why_no_gpu

        found = torch.cuda.device_count()
        if reason := why_no_gpu():
            raise ValueError(f"{reason}; {REMEDY}")
        if text == "gpu" and not found:
            raise ValueError("--nproc-per-node gpu: this node shows no GPU; use auto or a number")
        return found or 1
    return _count("--nproc-per-node", text)


def _count(flag: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise ValueError(f"{flag} {text}: expected a number, 1 or more")
    return int(text)


def _rendezvous(ours: LaunchCommand, elastic: bool) -> tuple[list[str], str, tuple[str, int] | None]:
    """torchrun's flags for a rendezvous of nodes, the interface that leads there, and its place if elsewhere."""
    if not ours.rdzv:
        raise ValueError(
            f"--nnodes {ours.nnodes} needs --rdzv HOST[:PORT]: the first node, by an address that all nodes can reach"
        )
    host, _, port = ours.rdzv.partition(":")
    number = _count("--rdzv, port", port or str(PORT))
    route = route_to(host)
    conf = dict(pair.split("=", 1) for pair in ours.rdzv_conf.split(",") if "=" in pair)
    if elastic:
        conf = {"last_call_timeout": "10"} | conf
    if not route.is_loopback:
        # torchrun would compare host names, which need not resolve.
        conf = {"is_host": str(int(route.is_local))} | conf
    arguments = ["--rdzv-backend=c10d", f"--rdzv-endpoint={route.address}:{number}", f"--rdzv-id={ours.rdzv_id}"]
    arguments += [f"--rdzv-conf={','.join(f'{k}={v}' for k, v in conf.items())}"] if conf else []
    elsewhere = None if route.is_local else (route.address, number)
    return [*arguments, f"--local-addr={route.local_address}"], route.interface, elsewhere


def start_server(launch: Launch, modules: Sequence[str]) -> bool:
    """Starts the fork server that ranks come from, and returns at once; False where they start cold, with the reason.

    Call it before this process imports torch, which takes seconds too.
    """
    os.environ.update(launch.environment)
    if launch.start_method == "spawn":
        return False
    if reason := fork_server.unavailable():
        print(f"rerankvpr: ranks start cold: {reason}", file=sys.stderr, flush=True)
        return False
    fork_server.start(modules)
    return True


def start(launch: Launch, warm: bool) -> int:
    """Runs torchrun's agent in this process; 0, 75 after a polite stop, or the status of the first process that failed.

    Ranks are forks of the server that `start_server` has started if `warm`.
    """
    if launch.rendezvous:
        end_when_cut_off(*launch.rendezvous, limit_s=CUT_OFF_S)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    began = time.time()
    try:
        _run_agent(launch, warm)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # The watchdog has told it already; where NCCL ended the ranks, nobody has.
        told = launch.output is None or failure.exitcode == STALLED_STATUS
        if launch.output and not told and (recorded := flight_recorder.report(launch.output, since=began)):
            print(f"rerankvpr: flight recorder: {recorded}", file=sys.stderr)
        gone = ", or the fork server that it came from was killed" if warm and failure.exitcode == SERVER_GONE else ""
        how = gone or _what_killed(failure.exitcode)
        print(f"rerankvpr: rank {rank} ended the job with status {failure.exitcode}{how}", file=sys.stderr)
        return failure.exitcode if 0 < failure.exitcode < 128 else 1
    except SignalException as stopped:  # passed on to the processes, which had time to save
        return REQUEUE_STATUS if int(stopped.sigval) in STOPPING else 128 + int(stopped.sigval)
    except RendezvousError as error:
        endpoint = _value_of("--rdzv-endpoint", launch.arguments)
        print(f"rerankvpr: the rendezvous of nodes at {endpoint} failed: {error}", file=sys.stderr)
        return 1
    except (EOFError, ConnectionError) as error:
        if not warm:
            raise
        print(
            f"rerankvpr: the fork server ended while it started ranks ({error or 'no answer'}); if it does so again, "
            "use --start-method spawn, which shows a rank's own error",
            file=sys.stderr,
        )
        return 1
    return 0


def _what_killed(status: int) -> str:
    """Who may have killed a rank that ended with a status, to be put behind that; empty if nobody did."""
    if status >= 0:
        return ""
    if status == -signal.SIGKILL:
        return " (SIGKILL): out of memory, if nobody sent it; `rerankvpr plan` says what a rank takes"
    return f" ({signal.Signals(-status).name})" if -status in set(signal.Signals) else ""


def _run_agent(launch: Launch, warm: bool) -> None:
    """torchrun as it is, or torchrun with ranks that are forks: it takes a function for these, not a program."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, get_args_parser
    from torch.distributed.run import run as torchrun

    parser = get_args_parser()
    parser.allow_abbrev = False  # a verb's flag may begin as one of torchrun's
    asked = parser.parse_args(launch.arguments)
    if not warm:
        torchrun(parser.parse_args(hidden(launch.arguments)))  # a rank's command line is for all to see
        return
    static = asked.rdzv_backend == "static" and not asked.rdzv_endpoint and asked.master_port is None
    if asked.standalone or (static and asked.nnodes == "1"):  # as torchrun does before it reads the rest
        asked.rdzv_backend, asked.rdzv_endpoint, asked.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    asked.master_port = asked.master_port or 29500
    config, _, _ = config_from_args(asked)
    config.start_method = "forkserver"
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_without_traceback)
    elastic_launch(config, fork_server.run_rank)(asked.training_script, *launch.verb)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves out the agent's own traceback of a rank's failure, which a program's failure has not; the line stays."""
    record.exc_info = None
    return True


def _value_of(flag: str, arguments: Sequence[str]) -> str:
    return next((one.partition("=")[2] for one in arguments if one.startswith(f"{flag}=")), "this node")
