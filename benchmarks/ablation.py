"""What buys recall: trainings that differ in one setting, over seeds, paired query by query; `docs/ablation.md`.

    python -m benchmarks.ablation --set town
    python -m benchmarks.ablation --set places --data-root DATA --weights weights/vits14.safetensors
    python -m benchmarks.ablation --set town --drift

Each runs for hours and may be stopped at any time: what is finished is a JSON file under --out, and the same command
resumes with the rest. All rows get their first seed before any gets its second. The page is written anew after each
run, from what is there. Trainings and evaluations are `rerankvpr train` and `rerankvpr eval`, one process each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import tyro
import yaml

from benchmarks.ablation_page import write_page
from benchmarks.ablation_rows import PLANS, Plan, Row, Settings
from benchmarks.report import machine, write_json
from configs.files import write_whole
from configs.load import load_recipe

KS = (1, 5, 10)
STAGES = ("retrieved", "re-ranked")


@dataclass(frozen=True)
class Options:
    """What is run."""

    set: Literal["places", "town"] = "places"
    """places: ViT-S/14 on places_mini; town: a small network on a rendered town."""
    rows: tuple[str, ...] = ()
    """Rows to run, and what they are held against; none given: all. `--rows help` lists them."""
    seeds: int = 0
    """Seeds of each row; 0: 5 of places, 10 of the town."""
    steps: int = 0
    """Steps of each training; 0: 60 of places, 250 of the town."""
    drift: bool = False
    """How fast the queue drifts at several learning rates, instead of rows."""
    data_root: Path = Path("data")
    """Folder that holds places_mini/ and gardens_point/; the town is rendered under --out."""
    weights: Path = Path("weights/vits14.safetensors")
    """ViT-S/14 weights; the town's network starts at random."""
    out: Path = Path("runs/ablation")
    """Folder of finished runs."""
    page: Path = Path("docs/ablation.md")
    """File that the tables are written to, from all that is finished under --out."""
    keep_checkpoints: bool = False
    """Keep networks, which are otherwise removed once their evaluations are done."""
    json: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Run:
    """A training with a seed, and the evaluations of it that are wanted."""

    training: str
    seed: int
    evaluations: tuple[str, ...]


def main() -> int:
    """Runs what is not there yet; 1 if something failed."""
    options = tyro.cli(
        Options, prog="python -m benchmarks.ablation", description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
    plan = PLANS[options.set]
    if options.rows == ("help",):
        print("\n".join(f"{row.name:18} {row.what}" for row in plan.rows))
        return 0
    try:
        work = Work(options, plan)
        failed = work.drift() if options.drift else work.rows()
    except ValueError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        return 130
    write_json(options.json, write_page(options.page, options.out))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{options.page} is written")
    return 1 if failed else 0


class Work:
    """The runs of a set, in their order, and how long they take."""

    def __init__(self, options: Options, plan: Plan) -> None:
        """Raises ValueError for a row that is not there, or data that is not."""
        self.options, self.plan = options, plan
        self.steps, self.seeds = options.steps or plan.steps, options.seeds or plan.seeds
        self.chosen = self._chosen()
        self.folder = options.out / f"{options.set}-{self.steps}-steps"
        self.root = options.out / "data" if options.set == "town" else options.data_root
        self.source = self.root / ("town/train" if options.set == "town" else "places_mini")
        self.shards = options.out / "shards" / options.set
        self.recipe = self._prepare()

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
        runs = [Run(name, seed, tuple(wanted[name])) for seed in range(self.seeds) for name in wanted]
        return self._all(runs, {name: self.plan.trainings[name] for name in wanted}, self._train_and_evaluate)

    def drift(self) -> list[str]:
        """Trains at each learning rate with the drift of the queue measured; a line for each run that failed."""
        changes = {f"drift-{rate:g}": {**self.plan.drift, "optim.lr": rate} for rate in self.plan.learning_rates}
        runs = [Run(name, seed, ("drift",)) for seed in range(self.seeds) for name in changes]
        return self._all(runs, changes, self._train_and_read_drift)

    def _all(self, runs: list[Run], changes: Mapping[str, Settings], do: Any) -> list[str]:
        missing = [run for run in runs if not self._is_done(run, changes[run.training])]
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are there, {len(missing)} to do", flush=True)
        failed, took = [], dict(self._seconds_of_earlier())
        for number, run in enumerate(missing):
            began, name = time.monotonic(), f"{run.training}, seed {run.seed}"
            try:
                do(run, changes[run.training])
            except subprocess.CalledProcessError as error:
                failed.append(f"{name}: {_last_line(error.stdout)}")
                print(failed[-1], flush=True)
                continue
            took.setdefault(run.training, []).append(time.monotonic() - began)
            write_page(self.options.page, self.options.out)
            left = sum(_expected(took, other.training) for other in missing[number + 1 :])
            done = f"[{number + 1}/{len(missing)}] {name}: {took[run.training][-1]:.0f} s"
            print(f"{done}; about {_hours(left)} left", flush=True)
        return failed

    def _train_and_evaluate(self, run: Run, changes: Settings) -> None:
        seconds = self._train(run, changes)
        folder = self._folder_of(run)
        for name in run.evaluations:
            began = time.monotonic()
            flags = [text for key, value in self.plan.evaluations[name].items() for text in _flag(key, value)]
            _rerankvpr(
                *("eval", "--checkpoint", folder / "train", "--benchmarks", *self.plan.benchmarks),
                *("--data-root", self.root, "--out", folder / f"eval-{name}"),
                *("--features", folder / "features", "--bootstrap", 0, "--pictures", 0, *flags),
            )
            results = json.loads((folder / f"eval-{name}" / "results.json").read_text())["results"]
            content = {
                **self._about(run, changes, name),
                "hits": _hits(folder / f"eval-{name}" / "predictions.parquet"),
                "depth": [result["mean_depth"] for result in results],
                "seconds_training": seconds,
                "seconds_evaluation": time.monotonic() - began,
            }
            write_whole(self._file_of(run, name), json.dumps(content))
        shutil.rmtree(folder / "features", ignore_errors=True)
        if not self.options.keep_checkpoints:
            shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)

    def _train_and_read_drift(self, run: Run, changes: Settings) -> None:
        seconds = self._train(run, changes)
        folder = self._folder_of(run)
        curves = {}
        for line in (folder / "train" / "metrics.jsonl").read_text().splitlines():
            metrics = json.loads(line)
            ages = {int(key.rpartition("_")[2]): cosine for key, cosine in metrics.items() if "drift_age_" in key}
            if ages:
                curves[metrics["step"]] = ages
        about = self._about(run, changes, "drift") | {"lr": changes["optim.lr"]}
        write_whole(self._file_of(run, "drift"), json.dumps({**about, "curves": curves, "seconds_training": seconds}))
        if not self.options.keep_checkpoints:
            shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)

    def _train(self, run: Run, changes: Settings) -> float:
        """Seconds of the training, from its start if it was stopped."""
        folder, began = self._folder_of(run), time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        content = self.recipe.model_dump(mode="json")
        content |= {"name": f"{run.training}-{run.seed}", "output": str(folder / "train"), "seed": run.seed}
        settings = {**self.plan.base, "trainer.max_steps": self.steps, **changes}
        for key, value in settings.items():
            section, _, name = key.partition(".")
            content[section][name] = value
        content["data"]["sets"] = {city: str(self._shards_of(city)) for city in content["data"]["sets"]}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        _rerankvpr("train", folder / "recipe.yaml")
        return time.monotonic() - began

    def _shards_of(self, city: str) -> Path:
        """The shard set of one city alone."""
        shards = self.shards.with_name(f"{self.shards.name}-{city}")
        if not (shards / "index.parquet").is_file():
            _rerankvpr("shard", "gsv-cities", self.source, shards, "--cities", city)
        return shards

    def _about(self, run: Run, changes: Settings, evaluation: str) -> dict[str, Any]:
        settings = {**self.plan.base, **changes, **dict(self.plan.evaluations.get(evaluation, {}))}
        return {
            **{"set": self.options.set, "steps": self.steps, "seed": run.seed, "training": run.training},
            **{"evaluation": evaluation, "settings": settings, "machine": machine()},
        }

    def _is_done(self, run: Run, changes: Settings) -> bool:
        """Whether all that a run gives is there, made with these settings."""
        for name in run.evaluations:
            file = self._file_of(run, name)
            wanted = json.loads(json.dumps(self._about(run, changes, name)["settings"]))
            if not file.is_file() or json.loads(file.read_text())["settings"] != wanted:
                return False
        return True

    def _folder_of(self, run: Run) -> Path:
        return self.folder / run.training / f"seed-{run.seed}"

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

    def _prepare(self) -> Any:
        """The set's recipe, its shards made and its data there. Raises ValueError for what is not."""
        recipe, root = load_recipe(Path(self.plan.recipe)), self.root
        content = recipe.model_dump(mode="json")
        content["tracking"] |= {"enabled": False, "system_metrics_every_s": 0}
        content["eval"] |= {"benchmarks": [], "data_root": str(root)}
        content["data"]["shards"] = str(self.shards)
        if self.options.set == "town":
            _render_town(root / "town")
        else:
            for path in (self.source, root / "gardens_point", self.options.weights):
                if not path.exists():
                    raise ValueError(f"{path}: not there; --data-root and --weights say where it is")
            content["model"]["weights"] = str(self.options.weights)
        if not (self.shards / "index.parquet").is_file():
            _rerankvpr("shard", "gsv-cities", self.source, self.shards)
        return type(recipe).model_validate(content)


def _render_town(folder: Path) -> None:
    from data_pipeline.town.render import Town, render_town, town_is_current

    town = Town(seed=1, places=360, held_out_places=300)
    if not town_is_current(folder, town):
        print(f"rendering a town of {town.images} images into {folder}", flush=True)
        render_town(folder, town)


def _rerankvpr(*arguments: object) -> None:
    """One command of the product in a process of its own. Raises CalledProcessError with what it printed."""
    command = [sys.executable, "-m", "rerankvpr", *map(str, arguments)]
    subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)


def _flag(key: str, value: object) -> list[str]:
    return [f"--{key.replace('_', '-')}", str(value)]


def _hits(predictions: Path) -> dict[str, Any]:
    """Of each stage, whether each query has a positive among the first K; queries by benchmark and name."""
    table = pq.read_table(predictions, columns=["benchmark", "stage", "query", "rank", "positive"]).to_pylist()
    queries: dict[tuple[str, str], dict[str, int]] = {}
    for row in table:
        best = queries.setdefault((row["benchmark"], row["query"]), {})
        if row["positive"]:
            best[row["stage"]] = min(row["rank"], best.get(row["stage"], row["rank"]))
    names = sorted(queries)
    none = max(KS) + 1
    return {
        "queries": [list(name) for name in names],
        **{
            stage: {str(k): [int(queries[name].get(stage, none) <= k) for name in names] for k in KS}
            for stage in STAGES
        },
    }


def _expected(took: dict[str, list[float]], training: str) -> float:
    known = took.get(training) or [seconds for of in took.values() for seconds in of]
    return sum(known) / len(known) if known else 0.0


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else "nothing printed"


if __name__ == "__main__":
    sys.exit(main())
