"""What buys recall: trainings that differ in one setting, over seeds, paired query by query; `docs/ablation.md`.

    python -m benchmarks.ablation --set town
    python -m benchmarks.ablation --set places --data-root DATA --weights weights/vits14.safetensors
    python -m benchmarks.ablation --set town --drift

Each runs for hours and may be stopped at any time: what is finished is a JSON file under --out, and the same command
resumes with the rest. All rows get their first seed before any gets its second, the most telling rows first. The page
is written anew after each run, from what is there.

Runs go side by side, --at-once of them, each with its share of the cores as threads: threads decide the last bits of a
training, so runs with other threads are kept and shown apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.ablation_page import write_page
from benchmarks.ablation_rows import PLANS, Plan, Row, Settings
from benchmarks.ablation_runs import Job, run_jobs, start_server
from benchmarks.ablation_views import write_without_held_out
from benchmarks.report import machine, write_json
from configs.files import write_whole
from configs.load import load_recipe
from rerankvpr import prepare_libraries


@dataclass(frozen=True)
class Options:
    """What is run."""

    set: Literal["places", "town"] = "places"
    """places: ViT-S/14 on places_mini; town: a small network on a rendered town."""
    rows: tuple[str, ...] = ()
    """Rows to run, and what they are held against; none given: all. `--rows help` lists them."""
    seeds: int = 0
    """Seeds of each row; 0: 5 of places, 10 of the town."""
    first_seed: int = 0
    """The first of them."""
    steps: int = 0
    """Steps of each training; 0: 60 of places, 250 of the town."""
    at_once: int = 2
    """Trainings side by side, each with cores / at-once threads."""
    drift: bool = False
    """How fast the queue drifts at several learning rates, instead of rows."""
    page_only: bool = False
    """Write the page from what is finished, and run nothing."""
    data_root: Path = Path("data")
    """Folder that holds places_mini/ and gardens_point/; the town is rendered under --out."""
    weights: Path = Path("weights/vits14.safetensors")
    """ViT-S/14 weights; the town's network starts at random."""
    out: Path = Path("runs/ablation")
    """Folder of finished runs."""
    page: Path = Path("docs/ablation.md")
    """File that the tables are written to, from all that is finished under --out; its section "In short" is kept."""
    beside: Path | None = None
    """The --out of runs on another machine: the page says how far the R@1 of those that both have are apart."""
    keep_checkpoints: bool = False
    """Keep networks, which are otherwise removed once their evaluations are done."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        for name, low in {"seeds": 0, "first_seed": 0, "steps": 0, "at_once": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {low} or more")


@dataclass(frozen=True)
class Run:
    """A training with a seed, and the evaluations of it that are wanted."""

    training: str
    seed: int
    evaluations: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.training}, seed {self.seed}"


def main() -> int:
    """Runs what is not there yet; 1 if something failed."""
    failed: list[str] = []
    try:
        options = parsed()
        plan = PLANS[options.set]
        if options.rows == ("help",):
            print("\n".join(f"{row.name:18} {row.what}" for row in plan.rows))
            return 0
        if not options.page_only:
            work = Work(options, plan)
            failed = work.drift() if options.drift else work.rows()
        figures = write_page(options.page, options.out, options.beside)
    except ValueError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"ablation: {' '.join(error.cmd[2:])}: {_last_line(error.stdout)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        return 130
    write_json(options.json, figures)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{options.page} is written")
    return 1 if failed else 0


def parsed(argv: Sequence[str] | None = None) -> Options:
    """The options of these arguments, else of this process's."""
    switches = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(Options, args=argv, prog="python -m benchmarks.ablation", description=__doc__, config=switches)


class Work:
    """The runs of a set, in their order, and how long they take."""

    def __init__(self, options: Options, plan: Plan) -> None:
        """Raises ValueError for a row that is not there."""
        self.options, self.plan = options, plan
        self.steps, self.seeds = options.steps or plan.steps, options.seeds or plan.seeds
        self.threads = max(1, len(os.sched_getaffinity(0)) // options.at_once)
        self.chosen = self._chosen()
        self.folder = options.out / f"{options.set}-{self.steps}-steps-{self.threads}-threads"
        self.root = options.out / "data" if options.set == "town" else options.data_root
        self.views = options.out / "data" / "places_mini" / "held_out_views.csv"
        self.machine = machine()

    def _chosen(self) -> list[Row]:
        if not self.options.rows:
            return list(self.plan.rows)
        named = [self.plan.row(name) for name in self.options.rows]
        names = {row.name for row in named} | {row.against for row in named}
        return [row for row in self.plan.rows if row.name in names]

    def rows(self) -> list[str]:
        """Trains and evaluates; a line for each run that failed."""
        wanted: dict[str, list[str]] = {}
        for row in self.chosen:
            evaluations = wanted.setdefault(row.training, [])
            if row.evaluation not in evaluations:
                evaluations.append(row.evaluation)
        runs = [Run(name, seed, tuple(wanted[name])) for seed in self._seeds() for name in wanted]
        return self._all(runs, {name: self.plan.trainings[name] for name in wanted})

    def drift(self) -> list[str]:
        """Trains at each learning rate with the drift of the queue measured; a line for each run that failed."""
        changes = {f"drift-{rate:g}": {**self.plan.drift, "optim.lr": rate} for rate in self.plan.learning_rates}
        runs = [Run(name, seed, ("drift",)) for seed in self._seeds() for name in changes]
        return self._all(runs, changes)

    def _seeds(self) -> range:
        return range(self.options.first_seed, self.options.first_seed + self.seeds)

    def _all(self, runs: Sequence[Run], changes: Mapping[str, Settings]) -> list[str]:
        missing = [run for run in runs if not self._is_done(run, changes[run.training])]
        at_once = self.options.at_once
        print(
            f"{self.options.set}, {self.steps} steps, {self.threads} thread(s) each, {at_once} at once: "
            f"{len(runs) - len(missing)} of {len(runs)} runs are there, {len(missing)} to do",
            flush=True,
        )
        if not missing:
            return []
        recipe = self._prepared(changes.values())
        start_server(recipe, self.threads)
        content = recipe.model_dump(mode="json")
        by_name = {str(run): run for run in missing}
        jobs = [self._job(run, changes[run.training], content) for run in missing]
        failed, took, ended = [], dict(self._seconds_of_earlier()), 0
        with closing(run_jobs(jobs, at_once)) as done:
            for job, fault in done:
                run, ended = by_name.pop(job.name), ended + 1
                if fault:
                    failed.append(f"{run}: {fault}")
                    print(f"[{ended}/{len(jobs)}] {failed[-1]}", flush=True)
                    continue
                seconds = self._keep(run, changes[run.training], job)
                took.setdefault(run.training, []).append(seconds)
                write_page(self.options.page, self.options.out, self.options.beside)
                left = sum(_expected(took, other.training) for other in by_name.values()) / at_once
                at = datetime.now() + timedelta(seconds=left)
                said = f"[{ended}/{len(jobs)}] {run}: {seconds:.0f} s"
                print(f"{said}; about {_hours(left)} left, until {at:%H:%M}", flush=True)
        return failed

    def _keep(self, run: Run, changes: Settings, job: Job) -> float:
        """Writes what a run found, a file for each evaluation; returns its seconds."""
        found = job.found()
        training = {"seconds_training": found["seconds"], "processor_s_training": found["processor_s"]}
        if run.evaluations == ("drift",):
            curves = _drift_curves(job.folder / "train" / "metrics.jsonl")
            content = {**self._about(run, changes, "drift"), "lr": changes["optim.lr"], "curves": curves, **training}
            write_whole(self._file_of(run, "drift"), json.dumps(content))
        seconds: float = found["seconds"]
        for name, of in found["evaluations"].items():
            content = {
                **self._about(run, changes, name),
                **training,
                **{"hits": of["hits"], "depth": of["depth"]},
                **{"seconds_evaluation": of["seconds"], "processor_s_evaluation": of["processor_s"]},
            }
            write_whole(self._file_of(run, name), json.dumps(content))
            seconds += of["seconds"]
        return seconds

    def _job(self, run: Run, changes: Settings, recipe: Mapping[str, Any]) -> Job:
        folder = self.folder / run.training / f"seed-{run.seed}"
        content = json.loads(json.dumps(recipe))
        content |= {"name": f"{run.training}-{run.seed}", "output": str(folder / "train"), "seed": run.seed}
        only_last = {"trainer.max_steps": self.steps, "trainer.checkpoint_every_steps": self.steps}
        for key, value in {**self.plan.base, **only_last, **changes}.items():
            section, _, name = key.partition(".")
            content[section][name] = value
        content["data"]["sets"] = {city: str(self._shards_of(city)) for city in content["data"]["sets"]}
        return Job(
            name=str(run),
            folder=folder,
            recipe=content,
            benchmarks=tuple(judged.spec.format(views=self.views.absolute()) for judged in self.plan.judged),
            data_root=self.root,
            evaluations={name: self.plan.evaluations[name] for name in run.evaluations if name != "drift"},
            keep_checkpoints=self.options.keep_checkpoints,
        )

    def _about(self, run: Run, changes: Settings, evaluation: str) -> dict[str, Any]:
        settings = {**self.plan.base, **changes, **dict(self.plan.evaluations.get(evaluation, {}))}
        return {
            **{"set": self.options.set, "steps": self.steps, "threads": self.threads, "at_once": self.options.at_once},
            **{"seed": run.seed, "training": run.training, "evaluation": evaluation, "settings": settings},
            "machine": self.machine,
        }

    def _is_done(self, run: Run, changes: Settings) -> bool:
        """Whether all that a run gives is there, made with these settings."""
        for name in run.evaluations:
            file = self._file_of(run, name)
            wanted = json.loads(json.dumps(self._about(run, changes, name)["settings"]))
            if not file.is_file() or json.loads(file.read_text())["settings"] != wanted:
                return False
        return True

    def _file_of(self, run: Run, evaluation: str) -> Path:
        return self.folder / f"{run.training}.{evaluation}.seed-{run.seed}.json"

    def _seconds_of_earlier(self) -> Iterator[tuple[str, list[float]]]:
        found: dict[str, dict[int, float]] = {}
        for file in self.folder.glob("*.json"):
            one = json.loads(file.read_text())
            seconds = found.setdefault(one["training"], {})
            seconds.setdefault(one["seed"], one["seconds_training"])
            seconds[one["seed"]] += one.get("seconds_evaluation", 0.0)
        yield from ((name, list(seconds.values())) for name, seconds in found.items())

    def _prepared(self, changes: Iterable[Settings]) -> Any:
        """The set's recipe, with its data and shards made. Raises ValueError for what is not there."""
        recipe = load_recipe(Path(self.plan.recipe))
        content = recipe.model_dump(mode="json")
        content["tracking"] |= {"enabled": False, "system_metrics_every_s": 0}
        content["eval"] |= {"benchmarks": [], "data_root": str(self.root)}
        if self.options.set == "town":
            _render_town(self.root / "town")
        else:
            for path in (self.root / "places_mini", self.root / "gardens_point", self.options.weights):
                if not path.exists():
                    raise ValueError(f"{path}: not there; --data-root and --weights say where it is")
            content["model"]["weights"] = str(self.options.weights)
            write_without_held_out(self.root / "places_mini", self.views.parent)
        for city in sorted({city for of in changes for city in of.get("data.sets", {})}):
            self._shard(self._shards_of(city), "--cities", city)
        content["data"]["shards"] = str(self._shards_of("all"))
        self._shard(self._shards_of("all"))
        return type(recipe).model_validate(content)

    def _shards_of(self, city: str) -> Path:
        """The shard set of one city alone, or of all."""
        return self.options.out / "shards" / f"{self.options.set}-{city}"

    def _shard(self, folder: Path, *flags: str) -> None:
        if not (folder / "index.parquet").is_file():
            source = self.root / "town/train" if self.options.set == "town" else self.views.parent
            command = [sys.executable, "-m", "rerankvpr", "shard", "gsv-cities", str(source), str(folder), *flags]
            subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)


def _render_town(folder: Path) -> None:
    from data_pipeline.town.render import Town, render_town, town_is_current

    town = Town(seed=1, places=360, held_out_places=300)
    if not town_is_current(folder, town):
        print(f"rendering a town of {town.images} images into {folder}", flush=True)
        render_town(folder, town)


def _drift_curves(metrics: Path) -> dict[int, dict[int, float]]:
    """Cosine of stored and present descriptor by step of the measurement and age."""
    curves = {}
    for line in metrics.read_text().splitlines():
        logged = json.loads(line)
        ages = {int(key.rpartition("_")[2]): cosine for key, cosine in logged.items() if "drift_age_" in key}
        if ages:
            curves[logged["step"]] = ages
    return curves


def _expected(took: dict[str, list[float]], training: str) -> float:
    known = took.get(training) or [seconds for of in took.values() for seconds in of]
    return sum(known) / len(known) if known else 0.0


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else "nothing printed"


if __name__ == "__main__":
    prepare_libraries()
    sys.exit(main())
