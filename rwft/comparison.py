"""What a comparison comes to: runs, objectives over their seeds, intervals, and the table that is printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PRIOR = "prior"
BAND = (0.0, 1.0)
COLUMNS = {"nll/mean": "NLL", "nll_good/mean": "NLL good", "nll_bad/mean": "NLL bad"}


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

    @property
    def level(self) -> float | None:
        """`behavior`; None where scores lie in 0..1 and the logged rewards' mean does not: that is another scale."""
        scores = [s.success for s in self.summaries if s.success is not None]
        if self.behavior is None or self.behavior_exact or not scores:
            return self.behavior
        rates = BAND[0] <= min(scores) and max(scores) <= BAND[1]
        return None if rates and not BAND[0] <= self.behavior <= BAND[1] else self.behavior

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def summarise(outcomes: Iterable[Outcome], labels: Sequence[str], behavior: float | None, exact: bool) -> Comparison:
    """Runs by objective, in the order of `labels`, and within one by seed."""
    ordered = sorted(outcomes, key=lambda o: (labels.index(o.label), o.seed))
    summaries = tuple(summary(label, [o for o in ordered if o.label == label]) for label in labels)
    return Comparison(summaries, tuple(ordered), behavior, exact)


def summary(label: str, runs: Sequence[Outcome]) -> Summary:
    """One objective over its seeds."""
    names = [name for name in runs[0].held_out if all(name in run.held_out for run in runs)]
    held_out = {name: float(np.mean([run.held_out[name] for run in runs])) for name in names}
    scores = [run.success for run in runs if run.success is not None]
    if len(scores) < len(runs):
        return Summary(label, len(runs), None, None, None, held_out)
    low, high = _of_prompts(runs) if len(set(scores)) == 1 else interval(scores)
    return Summary(label, len(runs), float(np.mean(scores)), low, high, held_out)


def _of_prompts(runs: Sequence[Outcome]) -> tuple[float | None, float | None]:
    """The runs' intervals over prompts, their bounds averaged: one seed, or seeds that agree, tell of no spread."""
    low, high = zip(*((run.low, run.high) for run in runs), strict=True)
    return (None, None) if None in (*low, *high) else (float(np.mean(low)), float(np.mean(high)))


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
    head = ["objective", "score", "95% interval", "vs logs", *(COLUMNS[name] for name in names)]
    body = [
        [s.label, *_score(s, result.level), *(s.held_out.get(name, "") for name in names)] for s in result.summaries
    ]
    return head, body


def _score(s: Summary, behavior: float | None) -> list[str]:
    """Mean, interval, and where the interval lies against the behaviour policy's rate."""
    if s.success is None or s.low is None or s.high is None:
        return ["", "", ""]
    side = "" if behavior is None else "above" if s.low > behavior else "below" if s.high < behavior else "covers"
    return [f"{s.success:.3f}", f"{s.low:.3f}-{s.high:.3f}", side]


def title(result: Comparison) -> str:
    """What stands above the printed table."""
    scored = any(s.success is not None for s in result.summaries)
    return f"{'score: the verifier, on held-out prompts' if scored else 'held-out rows'}; NLL in nats a token"


def of_the_logs(result: Comparison) -> list[str]:
    """What is known of the policy that wrote the logs, and whether scores are to be compared with it."""
    if result.behavior is None:
        return []
    if result.behavior_exact:
        return [f"the policy that wrote the logs scores {result.behavior:.3f} (exact)"]
    rewards = f"mean reward that the held-out rows were logged with: {result.behavior:.4g}"
    if all(s.success is None for s in result.summaries):
        return [rewards]
    if result.level is None:
        return [f"{rewards}, on another scale than the scores, so that they are not compared"]
    return [f"{rewards} (vs logs: to be compared with scores only if the verifier scores as the logs were rewarded)"]
