"""Objectives side by side: the same data, the same order, the same start; only the weight differs.

With a seed come the initial weights, the order of the rows and the sampled evaluation, so runs
of one seed differ in their objective alone. With `compare.prior`, each seed's policy is first
trained by plain SFT, once, and all runs of that seed start from its exported model: the usual
case of fine-tuning a model that already speaks. Every run has a folder of its own and goes on
where it stopped; finished runs are not run again.

    <output>/prior/seed-0/   <output>/sft/seed-0/   ...   compare.json   compare.csv   compare.png
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from rwft.config import CompareConfig, Config, load_config
from rwft.errors import ConfigError, RwftError

PRIOR = "prior"
SHORT = {"objective": "objectives", "objectives": "objectives", "seeds": "seeds", "workers": "workers"}
BAND = (0.0, 1.0)
COLUMNS = {"nll/mean": "NLL", "nll_good/mean": "NLL good", "nll_bad/mean": "NLL bad"}


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    label: str
    seed: int
    config: Config
    fresh: bool


@dataclass(frozen=True)
class Outcome:
    """What a run came to: mean score of its samples (None without a verifier), held-out figures, and their course.

    `curve` holds `(step, figures)` for every evaluation of the run, in order.
    """

    label: str
    seed: int
    output: str
    success: float | None
    low: float | None
    high: float | None
    held_out: dict[str, float]
    curve: tuple[tuple[int, dict[str, float]], ...]


@dataclass(frozen=True)
class Summary:
    """An objective over its seeds. `low` and `high` bound the mean score with 95% confidence (see `interval`)."""

    label: str
    seeds: int
    success: float | None
    low: float | None
    high: float | None
    held_out: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """All runs, their summaries in the order of the config (a prior first), and the behaviour policy's rate.

    `behavior_exact`: the rate is known in closed form, not estimated from the rewards of the held-out rows.
    """

    summaries: tuple[Summary, ...]
    outcomes: tuple[Outcome, ...]
    behavior: float | None
    behavior_exact: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def compare(config: Config, *, fresh: bool = False, console: Any = None) -> Comparison:
    """Run every objective of `config.compare` with every seed, and sum up.

    Writes compare.json, compare.csv and compare.png into `config.output`. Raises ConfigError for
    objectives that cannot be told apart, and whatever a run raises.
    """
    from rwft.checkpoint import write_atomic
    from rwft.plots import plot_comparison
    from rwft.progress import Display

    _refuse_ranks()
    labels = list(objectives(config))
    with Display(console, main=True) as display:
        outcomes = run_all(config, fresh, display)
        result = summarise(config, outcomes, [*([PRIOR] if config.compare.prior else []), *labels])
        folder = Path(config.output).expanduser()
        write_atomic(folder / "compare.json", json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
        write_atomic(folder / "compare.csv", to_csv(result.outcomes))
        plot_comparison(result, folder / "compare.png")
        display.table(_title(result), *table(result))
        display.say(f"runs, compare.json, compare.csv and compare.png: {folder}")
    return result


def _refuse_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("compare: started on several ranks; start it once, without torchrun, and use compare.workers")


def objectives(config: Config) -> dict[str, Any]:
    """Label -> objective as the config gives it. Raises ConfigError if two share a label or a folder."""
    from rwft.weighting import build_objective

    specs = list(config.compare.objectives) or [config.objective]
    out: dict[str, Any] = {}
    folders: dict[str, str] = {PRIOR: PRIOR}
    for spec in specs:
        label = str(build_objective(spec))
        if slug(label) in folders:
            raise ConfigError(f"compare.objectives: '{label}' comes twice (folder '{slug(label)}'); expected each once")
        folders[slug(label)], out[label] = label, spec
    return out


def slug(label: str) -> str:
    """A label as the name of a folder: `dft * filtered_bc` -> `dft-x-filtered_bc`."""
    return re.sub(r"[^A-Za-z0-9_.=]+", "-", label.replace(" * ", "-x-")).strip("-.")


def prior_job(config: Config, seed: int, fresh: bool) -> Job:
    """The SFT stage of a seed; it exports a whole model, whatever the adapters."""
    assert config.compare.prior is not None
    lora = config.model.lora
    model = config.model if lora is None else replace(config.model, lora=replace(lora, merge=True))
    train = replace(config.compare.prior, seed=seed)
    return _job(config, PRIOR, seed, fresh, objective="sft", regularize=[], model=model, train=train)


def objective_jobs(config: Config, seed: int, fresh: bool) -> list[Job]:
    """A run of each objective with this seed."""
    model = config.model
    if config.compare.prior is not None:
        folder = Path(prior_job(config, seed, fresh).config.output) / "model"
        model = replace(model, path=str(folder), config=None, tokenizer=None, revision=None)
    train = replace(config.train, seed=seed)
    specs = objectives(config).items()
    return [_job(config, label, seed, fresh, objective=spec, model=model, train=train) for label, spec in specs]


def _job(config: Config, label: str, seed: int, fresh: bool, **changes: Any) -> Job:
    output = Path(config.output).expanduser() / slug(label) / f"seed-{seed}"
    return Job(label, seed, replace(config, **changes, output=str(output), compare=CompareConfig()), fresh)


def run_all(config: Config, fresh: bool, display: Any) -> list[Outcome]:
    """Every run; with several workers, each seed's objectives as soon as its prior is there."""
    seeds = [config.train.seed + i for i in range(config.compare.seeds)]
    total = len(seeds) * (len(objectives(config)) + (config.compare.prior is not None))
    if config.compare.workers > 1:
        try:
            return _run_parallel(config, seeds, fresh, display.ticker("runs", total))
        except BrokenProcessPool:
            raise RwftError(
                "compare: a worker process died, perhaps for want of memory; the same command goes on with what is "
                "finished (fewer compare.workers need less)"
            ) from None
    outcomes: list[Outcome] = []
    for job in (job for seed in seeds for stage in _stages(config, seed, fresh) for job in stage):
        display.say(f"run {len(outcomes) + 1} of {total}: {job.label}, seed {job.seed}")
        outcomes.append(execute(job))
    return outcomes


def _stages(config: Config, seed: int, fresh: bool) -> list[list[Job]]:
    """The prior of a seed, if any, then what builds on it."""
    prior = [[prior_job(config, seed, fresh)]] if config.compare.prior is not None else []
    return [*prior, objective_jobs(config, seed, fresh)]


def _run_parallel(config: Config, seeds: Sequence[int], fresh: bool, tick: Callable[[int], None]) -> list[Outcome]:
    workers = config.compare.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    initial = (max(1, cores // workers),)
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, initial) as pool:
        later: dict[Future[Outcome], list[list[Job]]] = {}
        for first, *rest in (_stages(config, seed, fresh) for seed in seeds):
            later |= {pool.submit(execute, job): rest for job in first}
        try:
            while later:
                done, _ = wait(later, return_when=FIRST_COMPLETED)
                for future in done:
                    rest = later.pop(future)
                    outcomes.append(future.result())
                    tick(1)
                    later |= {pool.submit(execute, job): [] for stage in rest for job in stage}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def _start_worker(threads: int) -> None:
    """A fair share of the cores, and no bars of its own among those of the main process."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.disable_progress_bar()


def execute(job: Job) -> Outcome:
    """Train (or find finished), evaluate what was exported, and keep the outcome in the run's folder.

    An error of the run is raised with its label and seed before the message.
    """
    from rich.console import Console

    from rwft.checkpoint import write_atomic
    from rwft.evaluate import evaluate, exported
    from rwft.loop import train

    quiet = Console(quiet=True)
    try:
        folder = Path(train(job.config, fresh=job.fresh, console=quiet).output)
        kept = folder / "compare.json"
        if not kept.is_file():
            model, adapter = exported(job.config, folder / "model")
            result = evaluate(replace(job.config, model=model), quiet, adapter)
            write_atomic(kept, json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
        return outcome(job, folder, json.loads(kept.read_text(encoding="utf-8")))
    except RwftError as error:
        error.args = (f"{job.label}, seed {job.seed}: {error}", *error.args[1:])
        raise


def outcome(job: Job, folder: Path, evaluation: dict[str, Any]) -> Outcome:
    """A run's evaluation, with the course of its held-out figures."""
    sampled, curve = evaluation["sampled"] or {}, tuple(read_curve(folder / "metrics.jsonl"))
    score = sampled.get("mean"), sampled.get("low"), sampled.get("high")
    return Outcome(job.label, job.seed, str(folder), *score, evaluation["held_out"], curve)


def read_curve(path: Path) -> Iterable[tuple[int, dict[str, float]]]:
    """The evaluations in a run's metrics: step, and figures without their prefix `eval/`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        figures = {k.removeprefix("eval/"): v for k, v in record.items() if k.startswith("eval/")}
        if figures:
            yield int(record["step"]), figures


def summarise(config: Config, outcomes: Iterable[Outcome], labels: Sequence[str]) -> Comparison:
    """Runs by objective, in the order of `labels`, and within one by seed."""
    ordered = sorted(outcomes, key=lambda o: (labels.index(o.label), o.seed))
    behavior, exact = behavior_rate(config, ordered)
    summaries = tuple(summary(label, [o for o in ordered if o.label == label]) for label in labels)
    return Comparison(summaries, tuple(ordered), behavior, exact)


def summary(label: str, runs: Sequence[Outcome]) -> Summary:
    """One objective over its seeds."""
    names = [name for name in runs[0].held_out if all(name in run.held_out for run in runs)]
    held_out = {name: float(np.mean([run.held_out[name] for run in runs])) for name in names}
    scores = [run.success for run in runs if run.success is not None]
    if len(scores) < len(runs):
        return Summary(label, len(runs), None, None, None, held_out)
    low, high = (runs[0].low, runs[0].high) if len(runs) == 1 else interval(scores)
    return Summary(label, len(runs), float(np.mean(scores)), low, high, held_out)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over seeds, by Student's t; for scores in 0..1 it is cut to 0..1.

    It covers what differs between seeds: weights or prior, data order, and the sampling of the evaluation.
    """
    values = np.asarray(scores, dtype=np.float64)
    half = t_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    low, high = float(values.mean()) - half, float(values.mean()) + half
    if BAND[0] <= values.min() and values.max() <= BAND[1]:
        return max(low, BAND[0]), min(high, BAND[1])
    return low, high


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t with P(|T| < t) = `level`. With T = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1)."""
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level, mass / mass[-1], angle)))


def behavior_rate(config: Config, outcomes: Sequence[Outcome]) -> tuple[float | None, bool]:
    """The behaviour policy's success on the held-out prompts: exact for an embedded task, else the mean reward."""
    if config.data.task is not None:
        from rwft.data.tasks import load_task

        return load_task(config.data.task, Path(config.cache).expanduser() / "tasks").success, True
    kept = json.loads((Path(outcomes[0].output) / "compare.json").read_text(encoding="utf-8"))
    return kept["behavior"], False


def to_csv(outcomes: Sequence[Outcome]) -> str:
    """One line a run."""
    names = list(dict.fromkeys(name for run in outcomes for name in run.held_out))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["objective", "seed", "success", "low", "high", *names, "output"])
    for run in outcomes:
        figures = [run.held_out.get(name, "") for name in names]
        writer.writerow([run.label, run.seed, run.success, run.low, run.high, *figures, run.output])
    return buffer.getvalue()


def table(result: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the printed table."""
    known = [name for name in COLUMNS if any(name in s.held_out for s in result.summaries)]
    names = known[1:] if len(known) == len(COLUMNS) else known[:1]
    head = ["objective", "success", "95% interval", "vs logs", *(COLUMNS[name] for name in names)]
    body = [
        [s.label, *_score(s, result.behavior), *(s.held_out.get(name, "") for name in names)] for s in result.summaries
    ]
    return head, body


def _score(s: Summary, behavior: float | None) -> list[str]:
    """Mean, interval, and where the interval lies against the behaviour policy's rate."""
    if s.success is None or s.low is None or s.high is None:
        return ["", "", ""]
    side = "" if behavior is None else "above" if s.low > behavior else "below" if s.high < behavior else "covers"
    return [f"{s.success:.3f}", f"{s.low:.3f}-{s.high:.3f}", side]


def _title(result: Comparison) -> str:
    if result.behavior is None:
        return "held-out rows (NLL in nats a token)"
    kind = "exact" if result.behavior_exact else "as logged"
    return f"the logs' own rate of success, held out: {result.behavior:.3f} ({kind}); NLL in nats a token"


def compare_command(path: str, overrides: Sequence[str], *, fresh: bool = False, console: Any = None) -> Comparison:
    """`rwft compare`: a config and overrides; `objective=sft,[dft,rwr]`, `seeds=` and `workers=` are short forms."""
    return compare(load_config(path, [long_form(override) for override in overrides]), fresh=fresh, console=console)


def long_form(override: str) -> str:
    """`objective=a,[b,c]` -> `compare.objectives=[a,[b,c]]`; `seeds=5` -> `compare.seeds=5`; anything else as it is."""
    key, equals, value = override.partition("=")
    if not equals or key not in SHORT:
        return override
    return f"compare.{SHORT[key]}={f'[{value}]' if SHORT[key] == 'objectives' else value}"
