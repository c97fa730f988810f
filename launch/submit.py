"""`rerankvpr submit`: stages of work as SLURM jobs, each after the one before it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from configs.flags import is_given, parse_flags, parse_known_flags
from configs.secrets import has_secret, without_secrets
from launch.slurm import Job, Resources, array_job, torchrun_job
from launch.stages import resuming, split_at_dashes, split_stages

if TYPE_CHECKING:
    from configs.schema import Recipe

ABOUT = """Writes a batch script for each stage (shard, train, index or eval), keeps it beside what the stage writes
(train: OUTPUT/job/), submits it, and prints job, log and MLflow store. A stage starts when the one before it has ended
well. Flags before the first `--` hold for all stages; a stage may have further ones of its own after --then.

  rerankvpr submit [flags] -- VERB ... [--then [flags --] VERB ...]...

  rerankvpr submit --nodes 4 --gpus-per-node 8 --time 12:00:00 -- train RECIPE

  rerankvpr submit --array 16 -- shard gsv-cities SRC OUT

  rerankvpr submit --gpus-per-node 1 --array 16 -- index build photos/ --checkpoint runs/a --out city.index

  rerankvpr submit --gpus-per-node 1 -- eval --checkpoint runs/a runs/b --benchmarks town --out results

  rerankvpr submit --nodes 4 --gpus-per-node 8 -- shard gsv-cities SRC OUT --then train RECIPE
      --then --nodes 1 -- eval --checkpoint runs/a --benchmarks town

`shard` runs on one node without GPUs: --array 16 makes sixteen tasks that write the tars, and a job that writes the
index. An index is built or added to over --nodes, or with --array by tasks of one node that encode its shards and a
job that makes it of them. `eval` of several checkpoints is an array. A training is checked as `rerankvpr plan` does it;
it is asked to save before its time limit and on preemption, is put back in the queue and resumes."""

PROG = "rerankvpr submit"


def main(argv: list[str]) -> int:
    """Writes and submits the jobs of all stages."""
    flags, rest = split_at_dashes(argv)
    if rest is None:
        if {"-h", "--help"} & set(argv):
            parse_flags(Resources, ["--help"], prog=PROG, description=ABOUT)
        raise ValueError("submit needs `--` before the verb: rerankvpr submit --nodes 2 -- train RECIPE")
    common = parse_flags(Resources, flags, prog=PROG)
    jobs = []
    for i, (more, verb) in enumerate(split_stages(rest)):
        default = replace(common, dependency=common.dependency if i == 0 else "")
        jobs += stage_jobs(verb, parse_flags(Resources, more, prog=PROG, default=default))
    if common.dry_run:
        for job in jobs:
            print(f"# {job.script}\n{job.text}")
        return 0
    if not shutil.which("sbatch"):
        raise ValueError("sbatch is not on this machine; submit from a login node of the cluster, or use --dry-run")
    after = common.dependency
    for job in jobs:
        after = f"afterok:{_submit(job, after)}"
    return 0


def stage_jobs(verb: list[str], want: Resources) -> list[Job]:
    """The jobs of a stage: one, or for a sharding in parts the array and the job that writes its index.

    Raises ValueError for a verb that would fail at once on the cluster.
    """
    for word in verb:
        if has_secret(word):
            raise ValueError(
                f"submit: {without_secrets(word, is_address=True)} holds a password or a query, which the script would "
                "keep; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where you submit"
            )
    if verb[0] == "train":
        return [_train_job(verb, want)]
    if verb[0] == "shard":
        return _shard_jobs(verb, want)
    if verb[0] == "index":
        return _index_jobs(verb, want)
    verbs = eval_verbs(verb)
    stage, _ = parse_known_flags(EvalStage, verb[1:], prog="rerankvpr eval")
    folder = _beside(stage.out or next(iter(stage.checkpoint), "eval"))
    if len(verbs) == 1 and want.node_range[1] > 1:
        return [torchrun_job("eval", folder, verb, want, python=sys.executable, cwd=Path.cwd())]
    return [array_job("eval", folder, verbs, want, python=sys.executable, cwd=Path.cwd(), launched=True)]


def _train_job(verb: list[str], want: Resources) -> Job:
    from trainer.command import parse

    command = parse(verb[1:])  # a mistake in it is reported before torch is loaded
    from trainer.fit import fitted
    from trainer.preflight import check_training
    from trainer.tracking import open_command

    recipe, _ = fitted(command.recipe)
    absent = check_training(recipe, want.ranks, resume=command.resume is not None, checkpoint=command.checkpoint)
    for line in absent:
        print(f"rerankvpr: not here when it was submitted: {line}", file=sys.stderr)
    verb = resuming(verb)  # a job that is requeued runs the same line
    folder = _beside(str(recipe.output))
    job = torchrun_job(f"train-{recipe.name}", folder, verb, want, python=sys.executable, cwd=Path.cwd())
    if recipe.model.weights == "timm" and not want.dry_run:  # last: it may wait long for a network
        _download_weights(recipe)
    return replace(job, note=f"; curves: {open_command(recipe.tracking.uri)}" if recipe.tracking.enabled else "")


def _download_weights(recipe: Recipe) -> None:
    """Gets the backbone's weights into the user's cache: nodes may have no way out. A failure is only said."""
    from model.weights import WeightsError, find_weights

    try:
        find_weights(recipe.model.backbone, recipe.model.weights)
    except WeightsError as error:
        print(f"rerankvpr: submit: {error}; the job will try again on its node", file=sys.stderr)


def _shard_jobs(verb: list[str], want: Resources) -> list[Job]:
    from launch.data_commands import parse_shard

    command = parse_shard(verb[1:])
    if want.array and command.part:
        raise ValueError(f"submit: --array {want.array} deals out the parts; leave --part {command.part} out")
    folder, want = _beside(str(command.out)), _plain(want)
    job = partial(array_job, folder=folder, want=want, python=sys.executable, cwd=Path.cwd(), launched=False)
    jobs = []
    if want.array > 1:
        parts = [[*verb, "--part", f"{i}/{want.array}"] for i in range(want.array)]
        jobs.append(job("shard", verbs=parts))
    name = "shard-index" if jobs else "shard"
    return [*jobs, job(name, verbs=[verb])]


def _index_jobs(verb: list[str], want: Resources) -> list[Job]:
    from launch.index_command import written_folder

    folder = written_folder(verb[1:])
    if folder is None:
        raise ValueError(f"submit: index {' '.join(verb[1:2])}: expected index build or index add")
    if want.array and is_given(verb, "part"):
        raise ValueError(f"submit: --array {want.array} deals out the parts; leave --part out")
    name, beside, python, cwd = f"index-{verb[1]}", _beside(str(folder)), sys.executable, Path.cwd()
    if want.node_range[1] > 1 and want.array < 2:
        return [torchrun_job(name, beside, verb, want, python=python, cwd=cwd)]
    jobs = []
    if want.array > 1:
        parts = [[*verb, "--part", f"{i}/{want.array}"] for i in range(want.array)]
        jobs.append(array_job(f"{name}-parts", beside, parts, want, python=python, cwd=cwd, launched=True))
    return [*jobs, array_job(name, beside, [verb], want, python=python, cwd=cwd, launched=True)]


def _plain(want: Resources) -> Resources:
    """The same on one node without GPUs."""
    return replace(want, nodes="1", gpus_per_node=0, nproc_per_node="auto")


@dataclass(frozen=True)
class EvalStage:
    """What `submit` reads of an `eval` verb."""

    checkpoint: tuple[str, ...] = ()
    out: str = ""


def eval_verbs(verb: list[str]) -> list[list[str]]:
    """One evaluation per checkpoint: `--checkpoint A B` becomes two verbs with a subfolder of --out each."""
    stage, others = parse_known_flags(EvalStage, verb[1:], prog="rerankvpr eval")
    if is_given(verb, "checkpoint") and not stage.checkpoint:
        raise ValueError("submit: eval --checkpoint names no folder")
    verbs = []
    for i, checkpoint in enumerate(stage.checkpoint):
        out = stage.out
        if out and len(stage.checkpoint) > 1:
            out = str(Path(out) / f"{i:03d}-{Path(checkpoint).name}")
        verbs.append(["eval", "--checkpoint", checkpoint, *(["--out", out] if out else []), *others])
    return verbs or [verb]


def _beside(folder: str) -> Path:
    return Path(folder).absolute() / "job"


def _submit(job: Job, after: str) -> str:
    """Writes the script and hands it to sbatch; its job id."""
    job.folder.mkdir(parents=True, exist_ok=True)
    job.script.write_bytes(job.text.encode(errors="surrogateescape"))
    options = ["--parsable"]
    if after:
        options += [f"--dependency={after}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run(["sbatch", *options, str(job.script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refused {job.script}: {done.stderr.strip()}")
    number = done.stdout.strip().split(";")[0]
    log = job.folder / job.log.name.replace("%A", number).replace("%j", number).replace("%a", "*")
    print(f"{job.name}: job {number}{f', after {after}' if after else ''}; log {log}{job.note}", flush=True)
    return number
