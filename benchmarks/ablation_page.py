"""`docs/ablation.md` from finished runs: means over seeds and queries, paired differences, their intervals."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student  # type: ignore[import-untyped]

from benchmarks.ablation_rows import BASE, PLANS, RERANKED, RETRIEVED, Judged, Plan, Row
from configs.files import write_whole

LEVEL = 0.95
SHORT = {RETRIEVED: "first stage", RERANKED: "re-ranked"}
IN_SHORT = "## In short"
Key = tuple[str, str]  # training and evaluation


@dataclass(frozen=True)
class Interval:
    """A mean in percent or points with its 95 % interval, and the seeds that it is of."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.1f} ({max(0.0, self.low):.1f} to {min(100.0, self.high):.1f})"

    @property
    def signed(self) -> str:
        """As a difference."""
        return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f})"

    @property
    def is_told(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def interval(hits_SQ: NDArray[np.float64], units_Q: NDArray[np.int64]) -> Interval:
    """Mean in percent of hits (or of their differences) over seeds and queries, with its 95 % interval.

    The variance of the mean is that of seeds plus that of query images; what one image does against several databases,
    `units_Q` alike, is one draw. Student's t with the degrees of freedom of Satterthwaite (1946): of three seeds a
    bootstrap would be too sure. Of one seed it is of images alone.
    """
    seeds, units = len(hits_SQ), int(units_Q.max()) + 1
    mean = float(hits_SQ.mean())
    by_seed = float(hits_SQ.mean(axis=1).var(ddof=1)) / seeds if seeds > 1 else 0.0
    sums_U = np.bincount(units_Q, weights=hits_SQ.mean(axis=0) - mean, minlength=units)
    by_unit = float((sums_U**2).sum()) / len(units_Q) ** 2 * units / (units - 1) if units > 1 else 0.0
    variance = by_seed + by_unit
    if not variance:
        return Interval(100 * mean, 100 * mean, 100 * mean, seeds)
    parts = [part**2 / (count - 1) for part, count in ((by_seed, seeds), (by_unit, units)) if count > 1]
    half = float(student.ppf((1 + LEVEL) / 2, variance**2 / sum(parts))) * variance**0.5
    return Interval(100 * mean, 100 * (mean - half), 100 * (mean + half), seeds)


class Runs:
    """Finished runs of one set at one number of steps, judged on the benchmarks whose names begin with `prefix`."""

    def __init__(self, runs: Iterable[Mapping[str, Any]], prefix: str = "") -> None:
        self.prefix = prefix
        self.by_key: dict[Key, dict[int, Mapping[str, Any]]] = defaultdict(dict)
        for run in runs:
            self.by_key[run["training"], run["evaluation"]][run["seed"]] = run
        ran = [run["machine"] for of in self.by_key.values() for run in of.values()]
        self.machine = Counter(ran).most_common(1)[0][0]
        self.queries: list[list[str]] = next(iter(next(iter(self.by_key.values())).values()))["hits"]["queries"]
        self.chosen = [number for number, (name, _) in enumerate(self.queries) if name.startswith(prefix)]

    def hits(self, key: Key, stage: str, k: int, seeds: Iterable[int]) -> NDArray[np.float64]:
        """[S, Q]. Raises ValueError if these runs were not judged on the same queries."""
        runs = [self.by_key[key][seed] for seed in seeds]
        if any(run["hits"]["queries"] != self.queries for run in runs):
            raise ValueError(f"{key}: judged on other queries than the rest; remove these runs")
        return np.array([run["hits"][stage][str(k)] for run in runs], dtype=np.float64)[:, self.chosen]

    @property
    def units(self) -> NDArray[np.int64]:
        """The query image of each query, numbered."""
        names = [self.queries[number][1] for number in self.chosen]
        return np.unique(names, return_inverse=True)[1].astype(np.int64)

    def mean(self, row: Row, stage: str, k: int = 1) -> Interval:
        """Recall@k of a row."""
        key = row.training, row.evaluation
        return interval(self.hits(key, stage, k, sorted(self.by_key[key])), self.units)

    def difference(self, row: Row, other: Row, stage: str, k: int = 1) -> Interval | None:
        """A row minus another in points, over the seeds that both have; None if there are none."""
        key, base = (row.training, row.evaluation), (other.training, other.evaluation)
        seeds = sorted(set(self.by_key.get(key, {})) & set(self.by_key.get(base, {})))
        if not seeds:
            return None
        return interval(self.hits(key, stage, k, seeds) - self.hits(base, stage, k, seeds), self.units)

    def processor_seconds(self, row: Row) -> tuple[float, float]:
        """Mean processor seconds of a row's training and evaluation, on the machine of most runs if that had any."""
        runs = list(self.by_key[row.training, row.evaluation].values())
        runs = [run for run in runs if run["machine"] == self.machine] or runs
        times = [(run["processor_s_training"], run["processor_s_evaluation"]) for run in runs]
        return tuple(np.mean(times, axis=0))


def write_page(page: Path, out: Path, beside: Path | None = None) -> dict[str, float]:
    """Writes the tables of all that is finished under `out`; returns their figures, flat.

    With `beside`, the same of another machine, each table is followed by how far the two are apart. The section
    "In short" of the page that is there, which a person writes, is kept.
    """
    figures: dict[str, float] = {}
    parts = [HEAD, *_in_short(page)]
    for folder in sorted(out.glob("*-steps-*-threads"), reverse=True):
        if not (runs := _read(folder)):
            continue
        others = [run for run in (_read(beside / folder.name) if beside else []) if run["evaluation"] != "drift"]
        name, steps, threads = runs[0]["set"], runs[0]["steps"], runs[0]["threads"]
        plan, prefix = PLANS[name], f"{name}_{steps}"
        rows = [run for run in runs if run["evaluation"] != "drift"]
        drift = [run for run in runs if run["evaluation"] == "drift"]
        how = f"Each training ran with {threads} thread(s) on {_machines(runs)}."
        parts.append(f"## {name}, {steps} steps\n\n{_sentence(plan.about)} {how}")
        command = f"python -m benchmarks.ablation --set {name} --steps {steps} --at-once {runs[0]['at_once']}"
        if rows:
            parts.append(f"    {command}{_flags(plan, rows)}")
        for judged in plan.judged if rows else ():
            parts.append(_judged(plan, Runs(rows, judged.prefix), judged, prefix, figures))
            if others:
                parts.append(_apart(Runs(rows, judged.prefix), others, f"{prefix}_{judged.name}", figures))
        if drift:
            with_seeds = f"{command} --seeds {1 + max(run['seed'] for run in drift)} --drift"
            text = _drift(drift, name, figures)
            parts.append(f"### How fast does the queue drift?\n\n    {with_seeds}\n\n{text}")
    if not figures:
        parts.append("No run is finished yet: `python -m benchmarks.ablation --help` says how to start them.")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, "\n\n".join(parts) + "\n")
    return figures


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def _machines(runs: Sequence[Mapping[str, Any]]) -> str:
    """Where they ran; with the number of trainings if it was more than one machine."""
    of = {(run["training"], run["seed"]): run["machine"] for run in runs}
    counts = Counter(of.values()).most_common()
    return " and ".join(f"{name} ({count})" if len(counts) > 1 else name for name, count in counts)


def _apart(here: Runs, others: Sequence[Mapping[str, Any]], prefix: str, figures: dict[str, float]) -> str:
    """How far the R@1 of each run is from that of the same run on another machine, and how many queries agree."""
    there = Runs(others, here.prefix)
    both = [
        (key, seed)
        for key, of in there.by_key.items()
        for seed, run in of.items()
        if (mine := here.by_key.get(key, {}).get(seed)) and mine["machine"] != run["machine"]
    ]
    if not both:
        return "No run is there from another machine too."
    said = []
    for stage in (RETRIEVED, RERANKED):
        pairs = [(here.hits(key, stage, 1, [seed]), there.hits(key, stage, 1, [seed])) for key, seed in both]
        apart = [100 * abs(float(one.mean() - other.mean())) for one, other in pairs]
        alike = 100 * float(np.mean([one == other for one, other in pairs]))
        figures |= {f"{prefix}_apart_{stage}_most": max(apart), f"{prefix}_apart_{stage}_alike": alike}
        said.append(f"{SHORT[stage]} {np.mean(apart):.1f} ({max(apart):.1f}), {alike:.1f} % of queries alike")
    trainings = len({(key[0], seed) for key, seed in both})
    where = _machines([there.by_key[key][seed] for key, seed in both])
    return (
        f"{trainings} of the trainings ran on {where} too, with {len(both)} evaluations. By so many points R@1 of the "
        f"two machines differs, in the mean and at the most: {'; '.join(said)}."
    )


def _flags(plan: Plan, runs: Sequence[Mapping[str, Any]]) -> str:
    """What chooses these runs among those of the plan."""
    done = {(run["training"], run["evaluation"]) for run in runs}
    rows = [row.name for row in plan.rows if (row.training, row.evaluation) in done]
    seeds = f" --seeds {1 + max(run['seed'] for run in runs)}"
    return seeds + (f" --rows {' '.join(rows)}" if len(rows) < len(plan.rows) else "")


def _in_short(page: Path) -> list[str]:
    text = page.read_text() if page.is_file() else ""
    if IN_SHORT not in text:
        return []
    kept = text[text.index(IN_SHORT) :]
    end = kept.find("\n## ", len(IN_SHORT))
    return [kept[: end if end >= 0 else None].strip()]


HEAD = "# What buys recall?\n\n" + " ".join(
    [
        "Each row differs from `base` in what it names and in nothing else: same data, order, augmentation and",
        "number of steps for a seed. R@1 is in percent, the mean over seeds and queries, with a 95 % interval that",
        "takes both as drawn (Student's t, so that few seeds give a wide one). Differences are in points and paired by",
        "seed and query, against row `base` unless another is named, over the seeds that both rows have; those in bold",
        "have an interval without 0. With one seed an interval is of queries alone, and says nothing of what another",
        "seed would give. Of twenty differences that are none, one is in bold by chance.",
    ]
)


def _judged(plan: Plan, runs: Runs, judged: Judged, prefix: str, figures: dict[str, float]) -> str:
    title = f"### {judged.what}: {len(runs.chosen)} queries"
    if len(plan.judged) > 1:
        prefix = f"{prefix}_{judged.name}"
    is_first = judged is plan.judged[0]
    return f"{title}\n\n{_table(plan, runs, prefix, figures, is_first=is_first)}"


def _table(plan: Plan, runs: Runs, prefix: str, figures: dict[str, float], *, is_first: bool) -> str:
    columns = ("row", "what", "seeds", "R@1", "difference", "R@1, re-ranked", "difference", "R@5, re-ranked", "s")
    lines = [columns, ("---",) * len(columns)]
    told: dict[str, list[str]] = {"more": [], "less": [], "no clear difference": []}
    there = [row for row in plan.rows if (row.training, row.evaluation) in runs.by_key]
    for row in there:
        other = "" if row.against == BASE else f", against `{row.against}`"
        cells = [f"`{row.name}`", row.what + other, str(len(runs.by_key[row.training, row.evaluation]))]
        for stage in (RETRIEVED, RERANKED):
            if stage not in row.stages:
                cells += ["as base", ""]
                continue
            mean = runs.mean(row, stage)
            figures[f"{prefix}_{row.name}_{stage}_r1"] = mean.value
            gain = runs.difference(row, plan.row(row.against), stage) if row.name != BASE else None
            cells += [str(mean), "" if gain is None else _bold(gain)]
            if gain:
                figures[f"{prefix}_{row.name}_{stage}_gain"] = gain.value
                if gain.seeds > 1:
                    verdict = "no clear difference" if not gain.is_told else "more" if gain.value > 0 else "less"
                    told[verdict].append(f"{row.what} ({SHORT[stage]})")
        training, evaluation = runs.processor_seconds(row)
        figures[f"{prefix}_{row.name}_processor_s_training"] = training
        figures[f"{prefix}_{row.name}_processor_s_evaluation"] = evaluation
        lines.append((*cells, f"{runs.mean(row, RERANKED, 5).value:.1f}", f"{training:.0f} + {evaluation:.0f}"))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = [
        f"- R@1 {what} beyond the interval, with two seeds or more: {', '.join(told[what]) or 'nothing'}."
        for what in ("more", "less")
    ]
    said.append(f"- No clear difference: {', '.join(told['no clear difference']) or 'nothing'}.")
    if depths := _depths(plan, runs):
        said.append(f"- Candidates matched of a query: {depths}.")
    if is_first and (missing := [row.name for row in plan.rows if row not in there]):
        said.append(f"- Not run: {', '.join(missing)}.")
    seconds = "s: processor seconds of a training and of its evaluation; where they ran on two machines, on the first."
    return f"{table}\n\n{seconds}\n\n" + "\n".join(said)


def _depths(plan: Plan, runs: Runs) -> str:
    names = list(dict.fromkeys(name for name, _ in runs.queries))
    chosen = [number for number, name in enumerate(names) if name.startswith(runs.prefix)]
    found = []
    for row in plan.rows:
        if row.evaluation in (BASE, "auto", "adaptive") and row.training == BASE:
            those = runs.by_key.get((BASE, row.evaluation), {}).values()
            of = [run["depth"][number] for run in those for number in chosen]
            if of:
                found.append(f"{row.name} {np.mean(of):.1f}")
    return ", ".join(found)


def _drift(runs: Sequence[Mapping[str, Any]], prefix: str, figures: dict[str, float]) -> str:
    """Cosine of stored and present descriptor by age, in the second half of the trainings, and the decay that fits."""
    by_rate: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        by_rate[run["lr"]].append(run)
    curves = {rate: _curve(of_rate) for rate, of_rate in sorted(by_rate.items())}
    shown = _some_ages(sorted({age for curve in curves.values() for age in curve}))
    columns = ("learning rate", "seeds", *(f"{age}" for age in shown), "decay that fits", "half-life, steps")
    lines = [columns, ("---",) * len(columns)]
    for rate, curve in curves.items():
        fitted = fitted_decay(curve)
        figures[f"{prefix}_drift_{rate:g}_decay"] = fitted
        half = f"{np.log(2) / fitted:.1f}" if fitted > 0 else "never"
        cells = [f"{curve[age]:.3f}" if age in curve else "-" for age in shown]
        lines.append((f"{rate:g}", str(len(by_rate[rate])), *cells, f"{fitted:.4f}", half))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "Mean cosine between a descriptor as stored and the same image encoded again, by its age in steps, over the "
        "second half of each training. The decay that fits is the lambda whose exp(-lambda age) is nearest to the "
        f"squared cosine, which `memory.decay measured` weighs by (least squares of logarithms).\n\n{table}"
    )


def _curve(runs: list[Mapping[str, Any]]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step, ages in run["curves"].items():
            if 2 * int(step) >= run["steps"]:
                for age, cosine in ages.items():
                    found[int(age)].append(cosine)
    return {age: float(np.mean(cosines)) for age, cosines in sorted(found.items())}


def fitted_decay(curve: Mapping[int, float]) -> float:
    """The lambda, 0 or more, whose exp(-lambda * age) is nearest to cosine squared, by least squares of logarithms."""
    ages = np.array(list(curve), dtype=np.float64)
    logs = 2 * np.log(np.clip(list(curve.values()), 1e-6, 1))
    return max(0.0, float(-(ages * logs).sum() / max(1.0, (ages**2).sum())))


def _some_ages(ages: list[int]) -> list[int]:
    return [ages[i] for i in np.unique(np.linspace(0, len(ages) - 1, min(6, len(ages))).round().astype(int))]


def _bold(gain: Interval) -> str:
    return f"**{gain.signed}**" if gain.is_told and gain.seeds > 1 else gain.signed


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
