"""Early warnings: what the lines of `metrics.jsonl` say when a run goes wrong, each kind once.

A warning is a function of the lines alone, so a resumed run, which reads them again, knows what it
has said. `docs/metrics.md` says why the thresholds are what they are, and what to do.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwft.durable import write_atomic, writing

FILE = "warnings.jsonl"
LINES = 3  # that must agree before anything is said; and whose mean is the start, for what is compared with it
KEPT = 100  # lines, from which the noise of a figure is known
NOISE = 4.0  # times a line's noise, which a rise must exceed; the difference of two means of three has 0.8 of it
OF_NORMAL = 0.954  # median of the absolute difference of two draws of a standard normal distribution
FEW = 5
LOW_ESS = 0.1
VANISHED = 0.9  # share of the forwarded tokens whose weight is zero
RISEN, RISEN_SHARE = 0.1, 0.1  # nats, and share of the start, by which the NLL of good rows has risen
FLED = 2.0  # nats by which tokens that are pushed down have become less probable
IMPROBABLE = 0.5  # share of the negative weight that is on improbable tokens
COLLAPSED, OVERCONFIDENT = 0.2, 0.5  # entropy, as a share of the start and of the NLL
CLIPPED, CLIPPED_STEPS = 0.95, 50
RATIOS = (0.5, 2.0)
WORSE, WORSE_SHARE = 0.05, 0.05  # nats, and share of the best, by which the held-out NLL has risen

Line = Mapping[str, Any]


@dataclass
class History:
    """Lines so far: the first training lines, the latest ones, and the evaluations beside the training NLL then."""

    first: list[Line] = field(default_factory=list)
    last: deque[Line] = field(default_factory=lambda: deque(maxlen=KEPT))
    evaluations: list[tuple[float, float]] = field(default_factory=list)  # held-out NLL, training NLL

    def add(self, line: Line) -> None:
        """Take one line of `metrics.jsonl`."""
        if "nll/mean" in line:
            self.last.append(line)
            if len(self.first) < LINES:
                self.first.append(line)
        held_out = line.get("eval/nll_good/mean", line.get("eval/nll/mean"))
        if held_out is not None and self.last:
            nll = "nll_good/mean" if "eval/nll_good/mean" in line else "nll/mean"
            self.evaluations.append((held_out, self.last[-1].get(nll, self.last[-1]["nll/mean"])))

    def latest(self) -> list[Line]:
        """The lines that must agree before anything is said; fewer while there are not so many."""
        return list(self.last)[-LINES:]

    def start(self, name: str) -> float | None:
        """Mean over the first lines; None where one lacks it, and until there are as many others."""
        return _mean(self.first, name) if len(self.last) >= 2 * LINES else None

    def now(self, name: str) -> float | None:
        """Mean over the latest lines; None where one lacks it."""
        return _mean(self.latest(), name)

    def noise(self, name: str) -> float:
        """Standard deviation of a line's figure, by the median of successive differences, so without trend or jump.

        Few lines give little to go by: then it is taken for greater, five of them twofold.
        """
        values = [line[name] for line in self.last if name in line]
        steps = [abs(b - a) for a, b in itertools.pairwise(values)]
        return statistics.median(steps) / OF_NORMAL * (1 + FEW / len(steps)) if steps else 0.0


def _mean(lines: list[Line], name: str) -> float | None:
    values = [line[name] for line in lines if name in line]
    return sum(values) / LINES if len(values) == LINES else None


def ess_collapse(history: History) -> str | None:
    """A tenth of the forwarded tokens, or fewer, makes the update, though many have a weight."""
    shares = [line["weight/ess"] * _spread(line) for line in history.latest()]
    if len(shares) < LINES or max(shares) >= LOW_ESS or max(map(_zeros, history.latest())) > VANISHED:
        return None
    return f"{shares[-1]:.1%} of the tokens make the update; raise the temperature, or bound the weights"


def weights_vanish(history: History) -> str | None:
    """Nearly every forwarded token has weight zero."""
    shares = [_zeros(line) for line in history.latest()]
    if len(shares) < LINES or min(shares) <= VANISHED:
        return None
    return f"{shares[-1]:.1%} of the weights are zero: hardly anything is learnt; widen the clip, look at the rewards"


def _spread(line: Line) -> float:
    """Makes a share of all tokens one of those forwarded: rows of weight zero by data alone are a filter's choice."""
    return line["tokens/sum"] / max(line["forwarded_tokens/sum"], 1.0)


def _zeros(line: Line) -> float:
    """The share of the forwarded tokens whose weight is zero."""
    return 1 - (1 - line["weight/zero_share"]) * _spread(line)


def likelihood_displacement(history: History) -> str | None:
    """Good rows become less likely, while the loss falls or the bad ones become so even faster."""
    start, now = history.start("nll_good/mean"), history.now("nll_good/mean")
    if start is None or now is None:
        return None
    if now <= start + max(RISEN, RISEN_SHARE * start, NOISE * history.noise("nll_good/mean")):
        return None
    if not (_moved(history, "loss/mean") < 0 or _moved(history, "nll_bad/mean") > now - start):
        return None
    return (
        f"good rows have become less likely (NLL {start:.3g} -> {now:.3g}) though the objective gains; "
        "lower train.lr, or add SFT on the good rows"
    )


def _moved(history: History, name: str) -> float:
    """How far a figure has come since the start; 0 where it is not known."""
    start, now = history.start(name), history.now(name)
    return 0.0 if start is None or now is None else now - start


def negatives_run_away(history: History) -> str | None:
    """Tokens that are pushed down are improbable already, and pushed on."""
    fled, share = _moved(history, "nll_negative/mean"), history.now("weight/negative_improbable_share")
    if share is None or fled <= FLED or share <= IMPROBABLE:
        return None
    return (
        f"what is pushed down lost {fled:.2g} nats a token, and {share:.0%} of the push is on tokens with p < 0.01; "
        "choose an objective that bounds negative weights, such as topr, or a higher baseline"
    )


def entropy_collapse(history: History) -> str | None:
    """The policy has become far more certain, and more than the data (good rows, where rewards tell) bear out."""
    start, now = history.start("entropy/mean"), history.now("entropy/mean")
    nll = history.now("nll_good/mean") or history.now("nll/mean")
    if start is None or now is None or nll is None or now >= min(COLLAPSED * start, OVERCONFIDENT * nll):
        return None
    return (
        f"the entropy fell from {start:.3g} to {now:.3g} nats, far below the NLL of the data ({nll:.3g}); "
        "add regularize: [{name: entropy, coef: ...}], or stop earlier"
    )


def gradient_clipped(history: History) -> str | None:
    """The gradient is longer than train.clip at nearly every step."""
    lines, steps = [], 0.0
    for line in reversed(history.last):
        if line.get("grad_clipped/mean", 0.0) < CLIPPED:
            break
        lines.append(line)
        steps = history.last[-1]["step"] - line["step"]
    if len(lines) <= LINES or steps < CLIPPED_STEPS:
        return None
    norm = lines[0]["grad_norm"]
    return f"the gradient was clipped at nearly every of {steps:.0f} steps (norm {norm:.3g}); raise train.clip"


def ratios_off(history: History) -> str | None:
    """The mean ratio to the behaviour policy is 1 in expectation, whatever the policy."""
    ratios = [line["ratio_to_behavior/mean"] for line in history.latest() if "ratio_to_behavior/mean" in line]
    if len(ratios) < LINES or any(RATIOS[0] <= ratio <= RATIOS[1] for ratio in ratios):
        return None
    return (
        f"the mean ratio to the behaviour policy is {ratios[-1]:.3g}, expected about 1: the logged log-probabilities "
        "are another model's, template's or temperature's, or the policy has left the data"
    )


def memorising(history: History) -> str | None:
    """Held-out rows become less likely while training rows become more so."""
    if len(history.evaluations) <= 2:
        return None
    best, then = min(history.evaluations[:-2])
    limit = best + max(WORSE, WORSE_SHARE * best)
    if any(held_out <= limit or nll >= then for held_out, nll in history.evaluations[-2:]):
        return None
    now = history.evaluations[-1][0]
    return f"held-out NLL rose from {best:.3g} to {now:.3g} while training NLL falls; fewer epochs, or a lower train.lr"


RULES: tuple[Callable[[History], str | None], ...] = (
    ess_collapse,
    weights_vanish,
    likelihood_displacement,
    negatives_run_away,
    entropy_collapse,
    gradient_clipped,
    ratios_off,
    memorising,
)


class Alarms:
    """Hears the lines of a run in order and says what is wrong, each kind once."""

    def __init__(self) -> None:
        self.history = History()
        self.said: set[str] = set()

    def hear(self, line: Line) -> list[dict[str, Any]]:
        """Warnings that this line gives rise to: step, kind, sentence."""
        self.history.add(line)
        out: list[dict[str, Any]] = []
        for rule in RULES:
            sentence = None if rule.__name__ in self.said else rule(self.history)
            if sentence is not None:
                self.said.add(rule.__name__)
                out.append({"step": line["step"], "kind": rule.__name__, "message": sentence})
        return out


class AlarmLog:
    """`warnings.jsonl` of a run: one object a warning. A resumed run finds those up to the step that it resumes at."""

    def __init__(self, run: Path, metrics: Path, main: bool) -> None:
        self.path, self.alarms = run / FILE, Alarms()
        if main and metrics.is_file():
            lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
            heard = [warning for line in lines for warning in self.alarms.hear(line)]
            if heard or self.path.is_file():
                write_atomic(self.path, "".join(f"{json.dumps(warning)}\n" for warning in heard))

    def hear(self, line: Line) -> list[str]:
        """Keep what this line gives rise to; one sentence a warning, for the terminal."""
        warnings = self.alarms.hear(line)
        for warning in warnings:
            with writing(self.path), self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(warning) + "\n")
        return [f"warning: step {w['step']}: {w['kind'].replace('_', ' ')}: {w['message']}" for w in warnings]
