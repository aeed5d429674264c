"""How often do off-policy intervals hold the true value?   python benchmarks/off_policy_coverage.py [REPLICATIONS]

Random trees: a prompt, then up to `deep` letters, each with a reward, and an end before any but the first. Two
policies differ by `apart` in their logits. The value of the second is enumerated; logs of the first are drawn
again and again. `seen` is what the state of a history tells: all of it, its prompt and last letter, only its last
letter, or all of it mixed at random into 12 numbers. Prints a Markdown table.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rwft.fitted_q import Steps, fitted_values
from rwft.ope import Estimate, Logged, estimate, student_quantile

Floats = NDArray[np.float64]
NEVER = -60.0  # a logit


@dataclass(frozen=True)
class Setting:
    prompts: int
    letters: int
    deep: int
    apart: float
    seen: str
    seed: int
    logged: int  # prompts in the logs
    each: int  # completions of each
    ends: bool = True


SETTINGS = [
    Setting(5, 3, 2, 0.6, "all", 1, 100, 2),
    Setting(5, 3, 4, 0.4, "last letter", 2, 100, 4),
    Setting(5, 3, 4, 0.4, "prompt and last letter", 2, 100, 4),
    Setting(30, 3, 3, 0.6, "mixed", 3, 150, 1),
    Setting(30, 3, 3, 0.6, "mixed", 3, 60, 4),
    Setting(8, 2, 6, 0.3, "prompt and last letter", 4, 60, 2),
    Setting(8, 2, 6, 0.3, "prompt and last letter", 4, 400, 2, ends=False),
    Setting(5, 3, 3, 1.0, "last letter", 5, 400, 2),
]


def softmax(scores: Floats) -> Floats:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Tree:
    """Histories of k letters are numbered x letters^k + letters; the action behind the letters is the end."""

    def __init__(self, s: Setting) -> None:
        draw, self.s = np.random.default_rng(s.seed), s
        self.mu, self.pi, self.reward, self.seen = [], [], [], []
        of_prompt, of_letter = 0.3 * draw.normal(size=s.prompts), 0.5 * draw.normal(size=s.letters)
        for k in range(s.deep):
            histories = s.prompts * s.letters**k
            scores = draw.normal(size=(histories, s.letters + 1))
            moved = scores + s.apart * draw.normal(size=scores.shape)
            if k == 0 or not s.ends:
                scores[:, -1] = moved[:, -1] = NEVER
            self.mu.append(softmax(scores))
            self.pi.append(softmax(moved))
            own = 0.5 * draw.normal(size=(histories, s.letters))
            self.reward.append(np.repeat(of_prompt, s.letters**k)[:, None] + of_letter + own)
            self.seen.append(self._state(k, histories, draw))

    def _state(self, k: int, histories: int, draw: np.random.Generator) -> Floats:
        number = np.arange(histories)
        last = np.eye(self.s.letters)[number % self.s.letters] * (k > 0)
        if self.s.seen == "last letter":
            return last
        both = np.concatenate([np.eye(self.s.prompts)[number // self.s.letters**k], last], axis=1)
        if self.s.seen == "prompt and last letter":
            return both
        return np.eye(histories) if self.s.seen == "all" else np.eye(histories) @ draw.normal(size=(histories, 12))

    def value(self) -> float:
        """Expected sum of rewards of the second policy, by enumeration."""
        values = np.zeros(self.s.prompts * self.s.letters**self.s.deep)
        for pi, reward in zip(reversed(self.pi), reversed(self.reward), strict=True):
            values = (pi[:, :-1] * (reward + values.reshape(-1, self.s.letters))).sum(axis=1)
        return float(values.mean())

    def log(self, draw: np.random.Generator) -> Logged:
        """What the first policy wrote, as the second sees it."""
        s, width = self.s, max(seen.shape[1] for seen in self.seen)
        history = np.repeat(draw.integers(s.prompts, size=s.logged), s.each)
        n, on, ratio = len(history), np.ones(len(history), dtype=bool), np.zeros(len(history))
        rewards, ratios, alive = np.zeros((n, s.deep)), np.zeros((n, s.deep)), np.zeros((n, s.deep), dtype=bool)
        states = np.zeros((n, s.deep, width))
        for k in range(s.deep):
            action = (draw.random((n, 1)) > self.mu[k][history].cumsum(axis=1)[:, :-1]).sum(axis=1)
            states[on, k, : self.seen[k].shape[1]], alive[:, k] = self.seen[k][history[on]], on
            ratio = ratio + on * np.log(self.pi[k][history, action] / self.mu[k][history, action])
            on = on & (action < s.letters)
            letter = np.minimum(action, s.letters - 1)
            rewards[:, k] = on * (self.reward[k][history, letter] + 0.3 * draw.normal(size=n))
            ratios[:, k], history = ratio, history * s.letters + letter
        number = np.repeat(np.arange(s.logged), s.each)
        return Logged(rewards.sum(axis=1), number, ratio, rewards, ratios, states, alive)


def direct(logged: Logged, effective: float) -> Estimate:
    """The mean over prompts of the fitted values alone, with the interval that their spread would give it."""
    assert logged.step_reward is not None
    assert logged.step_log_ratio is not None
    assert logged.state is not None
    assert logged.alive is not None
    steps = Steps(logged.step_reward, logged.step_log_ratio, logged.state, logged.alive, logged.prompt)
    first = np.bincount(logged.prompt, fitted_values(steps)[:, 0]) / np.bincount(logged.prompt)
    half = student_quantile(effective - 1) * float(first.std(ddof=1)) / math.sqrt(len(first))
    return Estimate(float(first.mean()), float(first.mean()) - half, float(first.mean()) + half)


def report(setting: Setting, times: int) -> str:
    """One row of the table: coverage of each estimate's interval, and widths."""
    tree, draw = Tree(setting), np.random.default_rng(99)
    truth, found, foreseen = tree.value(), defaultdict(list), []
    for _ in range(times):
        logged = tree.log(draw)
        outcome = estimate(logged)
        for name, one in outcome.estimates.items():
            found[name].append(one)
        if outcome.fitted is not None:
            foreseen.append(outcome.fitted.explained)
            found["direct"].append(direct(logged, outcome.ess_prompts))
    cells = [f"{setting.logged} x {setting.each}", f"{setting.deep}", f"{setting.apart:g}", setting.seen]
    cells += [f"{np.mean(foreseen):.2f}"]
    for name in ("self_normalized", "per_decision", "fitted_q", "direct"):
        covered = np.mean([one.low <= truth <= one.high for one in found[name]])
        cells.append(f"{covered:.3f} ({len(found[name])})")
    width = {name: np.mean([one.high - one.low for one in ones]) for name, ones in found.items()}
    return "| " + " | ".join([*cells, f"{width['fitted_q'] / width['per_decision']:.2f}"]) + " |"


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    names = "self_normalized | per_decision | fitted_q | direct"
    print(f"| prompts x rows | steps | apart | the state tells | foreseen | {names} | width |")
    print("|---" * 10 + "|")
    for setting in SETTINGS:
        print(report(setting, times), flush=True)


if __name__ == "__main__":
    main()
