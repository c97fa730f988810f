"""`rerankvpr launch`: a verb on many processes, by torchrun."""

from __future__ import annotations

import os
import sys

USAGE = """usage: rerankvpr launch --nproc-per-node N [torchrun flags] -- VERB ...

Runs `rerankvpr VERB ...` in N processes a node. All flags before `--` go to torchrun as they are; the ones that matter:

  --nproc-per-node N            processes on this node: one a GPU (`gpu`), or a number on a CPU
  --nnodes N                    nodes; run the same command on each (left out: this node alone)
  --rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id NAME
                                where nodes meet

Threads: OMP_NUM_THREADS is set to cores / processes where it is not set.

  rerankvpr launch --nproc-per-node 2 -- train demo --output runs/two
  rerankvpr launch --nproc-per-node 8 -- eval --checkpoint runs/two --benchmarks town"""


def main(argv: list[str]) -> int:
    """Splits the arguments at `--` and runs torchrun in this process."""
    if "--" not in argv:
        if {"-h", "--help"} & set(argv):
            print(USAGE)
            return 0
        raise ValueError("launch needs `--` before the verb: rerankvpr launch --nproc-per-node 2 -- train RECIPE")
    cut = argv.index("--")
    flags, verb = argv[:cut], argv[cut + 1 :]
    if not verb:
        raise ValueError("launch needs a verb after `--`, such as train or eval")
    return run(flags, verb)


def run(flags: list[str], verb: list[str]) -> int:
    """Runs `rerankvpr VERB` under torchrun; returns 0, or the status of the first process that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    if not any(flag.startswith(("--nnodes", "--rdzv", "--master", "--standalone")) for flag in flags):
        flags = ["--standalone", *flags]
    args = get_args_parser().parse_args([*flags, "-m", "rerankvpr", *verb])
    if args.nproc_per_node.isdigit() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(args.nproc_per_node)))
    try:
        torchrun(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rerankvpr: rank {rank} ended the job with status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if 0 < failure.exitcode < 128 else 1
    except SignalException as stopped:  # passed on to the processes, which had 30 s to save
        return 128 + int(stopped.sigval)
    return 0
