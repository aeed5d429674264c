"""Tabular contextual bandits: where each objective's expected gradient leads, beside the closed form.

One row stands for one arm of one context and counts by its share under the logging policy, so nothing is sampled:
full-batch gradient ascent in float64 on a table of logits, through `token_logprobs`, `build_objective` and
`surrogate_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rwft

Array = NDArray[np.float64]
Objective = Callable[[Mapping[str, Tensor]], Tensor]

CONTEXTS, ARMS = 6, 5
TEMPERATURE = 0.5  # of rwr, awr, dro and dpo: all tilt the data by exp(r / 0.5)
GOOD = 0.5  # an arm with a reward of at least this succeeds
WIDE = 1e9  # a clip that never acts


@dataclass(frozen=True)
class Bandit:
    """Contexts with their logging policy `mu (x a)` and rewards `(x a)` in 0..1; each context counts alike."""

    mu: Array
    reward: Array

    @property
    def value(self) -> Array:
        """`(x 1)`: expected reward of the logging policy."""
        return (self.mu * self.reward).sum(1, keepdims=True)

    @property
    def good(self) -> NDArray[np.bool_]:
        return self.reward >= GOOD

    def expected(self, policy: Array) -> float:
        """Expected reward of a policy `(x a)`: enumerated."""
        return float((policy * self.reward).sum(1).mean())


def problem(seed: int = 7) -> Bandit:
    """A softmax logging policy with random logits; in each context two of five arms are good."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
    bad = rng.uniform(0.0, 0.4, size=(CONTEXTS, ARMS - 2))
    good = rng.uniform(0.6, 1.0, size=(CONTEXTS, 2))
    reward = rng.permuted(np.concatenate([bad, good], axis=1), axis=1)
    return Bandit(softmax(rng.normal(size=reward.shape)), reward)


def softmax(logits: Array) -> Array:
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def normalised(mass: Array) -> Array:
    return mass / mass.sum(axis=1, keepdims=True)


def one_hot(score: Array) -> Array:
    """`(x a) -> (x a)`: all mass on the arm with the greatest score."""
    return (score == score.max(axis=1, keepdims=True)).astype(np.float64)


def water_filling(score: Array) -> Array:
    """`(x a) -> (x a)`: (c - tau)_+ / sum(c), with the tau for which it sums to 1, by bisection."""
    total = score.sum(axis=1, keepdims=True)
    low, high = score.min(axis=1, keepdims=True) - total, score.max(axis=1, keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        over = np.clip(score - middle, 0, None).sum(axis=1, keepdims=True) > total
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return np.clip(score - low, 0, None) / total


@dataclass(frozen=True)
class Case:
    """An objective on the bandit. `limit` is the predicted end, None where only the success can be predicted."""

    name: str
    spec: Any
    limit: Array | None
    source: str
    signals: Mapping[str, Array] = field(default_factory=dict)  # (x a)
    start: Array | None = None  # logits (x a); None: zeros, the uniform policy
    data: Array | None = None  # who wrote the data, where it is not mu
    lr: float = 4.0
    success: float | None = None  # predicted chance of a good arm, for cases without `limit`


def cases(bandit: Bandit) -> list[Case]:
    """The main objectives, each with what is known of its fixed point."""
    mu, r, value, good = bandit.mu, bandit.reward, bandit.value, bandit.good
    tilted = normalised(mu * np.exp(r / TEMPERATURE))
    log_mu, sign = np.log(mu), np.where(good, 1.0, -1.0)
    soft = TEMPERATURE * np.log((mu * np.exp(r / TEMPERATURE)).sum(1, keepdims=True))
    std = np.sqrt((mu * (r - value) ** 2).sum(1, keepdims=True))
    means = {"group_mean": np.broadcast_to(value, r.shape)}
    other = normalised(1.0 / mu)
    wide = {"clip": WIDE}
    return [
        Case("sft", "sft", mu, "the data"),
        Case("rwr", {"name": "rwr", "temperature": TEMPERATURE}, tilted, "Peters and Schaal 2007", lr=1.0),
        Case(
            "awr", {"name": "awr", "temperature": TEMPERATURE}, tilted, "1910.00177", {"advantage": r - value}, lr=1.0
        ),
        Case("filtered_bc", {"name": "filtered_bc", "threshold": GOOD}, normalised(mu * good), "2308.01825"),
        Case("dft", "dft", one_hot(mu), "2508.05629", start=log_mu, lr=64.0),
        Case(
            "dft * filtered_bc", ["dft", {"name": "filtered_bc", "threshold": GOOD}], one_hot(mu * good), "2508.05629",
            start=log_mu, lr=64.0,
        ),
        Case("iw_sft", "iw_sft", mu, "2507.12856", {"ref_logp": log_mu}, start=log_mu),
        Case(
            "iw_sft * filtered_bc", [{"name": "iw_sft", **wide}, {"name": "filtered_bc", "threshold": GOOD}], None,
            "2507.12856", {"ref_logp": log_mu}, start=log_mu, lr=16.0, success=1.0,
        ),
        Case(
            "topr (rewards 1, -1)", "topr", normalised(mu * good), "2503.14286",
            {"reward": sign, "behavior_logp": log_mu}, start=log_mu, lr=8.0,
        ),
        Case(
            "reinforce, baseline the mean (GRPO)", "reinforce", one_hot(mu * (r - value)), "2506.20520",
            {"advantage": (r - value) / std},
        ),
        Case("asymre, shift -0.2", {"name": "asymre", "shift": -0.2}, water_filling(mu * (r - value + 0.2)),
             "2506.20520", means),
        Case("dft * reinforce", ["dft", "reinforce"], one_hot(mu * (r - value)), "", {"advantage": r - value},
             start=log_mu, lr=64.0),
        Case(
            "tis * reinforce, no clip", [{"name": "tis", **wide}, "reinforce"], one_hot(r), "1802.01561",
            {"advantage": r - value, "behavior_logp": log_mu}, start=log_mu, lr=32.0,
        ),
        Case(
            "dro, data by another policy", {"name": "dro", "temperature": TEMPERATURE}, tilted, "2405.19107",
            {"advantage": r - soft, "ref_logp": log_mu}, start=log_mu, data=other,
        ),
    ]  # fmt: skip


class Table:
    """A policy that is a table of logits `(x a)`, trained by full-batch gradient ascent."""

    def __init__(self, start: Array) -> None:
        self.logits = torch.tensor(start, dtype=torch.float64, requires_grad=True)

    def policy(self) -> Array:
        return self.logits.detach().softmax(1).numpy()

    def logp(self, context: Tensor, arm: Tensor) -> Tensor:
        """`(n), (n) -> (n 1)`: log-probability of each arm in its context."""
        head = torch.eye(self.logits.shape[1], dtype=torch.float64)
        return rwft.token_logprobs(self.logits[context][:, None], head, arm[:, None])

    def gradient(self, context: Tensor, arm: Tensor, share: Tensor, objective: Objective, signals: Any) -> Tensor:
        """`(x a)`: ascent direction for rows that stand for their share of the data, `(n 1)`."""
        logp = self.logp(context, arm)
        mask = torch.ones_like(logp)
        weights = objective({"logp": logp, "mask": mask, **signals})
        (gradient,) = torch.autograd.grad(rwft.surrogate_loss(logp, weights * share, mask, 1.0), self.logits)
        return -gradient

    def move(self, step: Tensor) -> None:
        with torch.no_grad():
            self.logits += step


def arm_rows(bandit: Bandit) -> tuple[Tensor, Tensor]:
    """Context and arm of one row per cell of the table."""
    context, arm = np.indices(bandit.mu.shape).reshape(2, -1)
    return torch.tensor(context), torch.tensor(arm)


def column(values: Array) -> Tensor:
    """`(x a) -> (n 1)`, in the order of the rows."""
    return torch.tensor(np.ascontiguousarray(values).reshape(-1, 1))


def follow(bandit: Bandit, case: Case, steps: int) -> dict[str, Any]:
    """Train, and compare where it ends with what was predicted."""
    table = Table(np.zeros_like(bandit.mu) if case.start is None else case.start)
    context, arm = arm_rows(bandit)
    signals = {"reward": column(bandit.reward), **{k: column(v) for k, v in case.signals.items()}}
    share, objective = column(bandit.mu if case.data is None else case.data), rwft.build_objective(case.spec)
    marks, curve = set(np.unique(np.geomspace(1, steps, 40).astype(int)).tolist()), []
    for step in range(steps + 1):
        if step == 0 or step in marks:
            curve.append([step, bandit.expected(table.policy())])
        if step < steps:
            table.move(case.lr * table.gradient(context, arm, share, objective, signals))
    return outcome(bandit, case, table.policy(), curve)


def outcome(bandit: Bandit, case: Case, policy: Array, curve: list[list[float]]) -> dict[str, Any]:
    """A case as plain values: predicted and measured reward and success, and the largest gap in probability."""
    success = float((policy * bandit.good).sum(1).mean())
    found = {"name": case.name, "source": case.source, "reward": bandit.expected(policy), "success": success}
    if case.limit is None:
        return {**found, "gap": abs(success - (case.success or 0.0)), "predicted_reward": None,
                "predicted_success": case.success, "curve": curve}  # fmt: skip
    limit = case.limit
    return {
        **found,
        "gap": float(np.abs(policy - limit).max()),
        "predicted_reward": bandit.expected(limit),
        "predicted_success": float((limit * bandit.good).sum(1).mean()),
        "curve": curve,
    }


def preference(bandit: Bandit, steps: int, noisy: bool) -> dict[str, Any]:
    """DPO on all pairs of arms. Noisy: the better wins with chance sigmoid(difference); else always."""
    first, second = (index.ravel() for index in np.meshgrid(np.arange(ARMS), np.arange(ARMS), indexing="ij"))
    first, second = first[first != second], second[first != second]
    x = np.repeat(np.arange(CONTEXTS), len(first))
    win, lose = np.tile(first, CONTEXTS), np.tile(second, CONTEXTS)
    margin = (bandit.reward[x, win] - bandit.reward[x, lose]) / TEMPERATURE
    chance = 1 / (1 + np.exp(-margin)) if noisy else (margin > 0).astype(np.float64)
    share = bandit.mu[x, win] * bandit.mu[x, lose] * chance
    rows = np.stack([win, lose], axis=1).ravel()
    context, arm = torch.tensor(np.repeat(x, 2)), torch.tensor(rows)
    log_mu = np.log(bandit.mu)
    signals = {
        "ref_logp": torch.tensor(log_mu[np.repeat(x, 2), rows])[:, None],
        "reward": torch.tensor(np.tile([1.0, 0.0], len(x)))[:, None],
        "group": torch.arange(len(x)).repeat_interleave(2),
    }
    objective, table = rwft.build_objective({"name": "dpo", "beta": 1.0}), Table(log_mu)
    for _ in range(steps):
        both = torch.tensor(np.repeat(share, 2))[:, None]
        table.move(8.0 * table.gradient(context, arm, both, objective, signals))
    limit = normalised(bandit.mu * np.exp(bandit.reward / TEMPERATURE)) if noisy else one_hot(bandit.reward)
    name = "dpo, noisy preferences" if noisy else "dpo, the better one always preferred"
    return outcome(bandit, Case(name, "dpo", limit, "2305.18290"), table.policy(), [])


def depends_on_start(bandit: Bandit, steps: int) -> dict[str, float]:
    """Reinforce with a baseline 0.2 above the mean reward: success from the data's policy and from another."""
    advantage = bandit.reward - bandit.value - 0.2
    starts = {"from the data's policy": np.log(bandit.mu), "from one that prefers bad arms": -4.0 * bandit.good}
    out: dict[str, float] = {}
    for name, start in starts.items():
        case = Case(name, "reinforce", None, "", {"advantage": advantage}, start=start, lr=1.0, success=1.0)
        out[name] = follow(bandit, case, steps)["success"]
    return out


def iw_is_the_policy_gradient(bandit: Bandit) -> float:
    """Largest difference between iw_sft * filtered_bc's gradient and that of the chance of success, anywhere."""
    rng = np.random.Generator(np.random.Philox(key=[3, 3]))
    table = Table(rng.normal(size=bandit.mu.shape))
    context, arm = arm_rows(bandit)
    objective = rwft.build_objective([{"name": "iw_sft", "clip": WIDE}, {"name": "filtered_bc", "threshold": GOOD}])
    signals = {"ref_logp": column(np.log(bandit.mu)), "reward": column(bandit.reward)}
    found = table.gradient(context, arm, column(bandit.mu), objective, signals).numpy()
    pi = table.policy()
    expected = pi * (bandit.good - (pi * bandit.good).sum(1, keepdims=True))
    return float(np.abs(found - expected).max())


# --- how fast: one good and one bad arm, time until the good one has 99%

RATES = ("filtered_bc", "dft * filtered_bc", "iw_sft * filtered_bc", "topr")
RATE_LR = 0.25


def rate_spec(name: str) -> Any:
    return name.split(" * ") if " * " in name else name


def speed(name: str, p: Array, good: float, start: float) -> Array:
    """d(gap in logits)/dt at probability `p` of the good arm, by hand; `good` is its share of the data.

    The reference of iw_sft is the start, the behaviour of topr the data; iw_sft's clip is 16.
    """
    if name == "topr":  # the bad row, too, widens the gap by 2 p |w| (its share), w = -min((1 - p) / (1 - good), 1)
        return 2 * (1 - p) * good + 2 * p * np.minimum(1 - p, 1 - good)
    push = {"filtered_bc": 1.0, "dft * filtered_bc": p, "iw_sft * filtered_bc": np.minimum(p / start, 16.0)}[name]
    return 2 * (1 - p) * good * push


def predicted_time(name: str, good: float, start: float, end: float = 0.99) -> float:
    """Time of the gradient flow from chance `start` to `end`, by quadrature over the gap in logits."""
    gap = np.linspace(np.log(start / (1 - start)), np.log(end / (1 - end)), 20_001)
    slowness = 1 / speed(name, 1 / (1 + np.exp(-gap)), good, start)
    return float(((slowness[1:] + slowness[:-1]) / 2 * np.diff(gap)).sum())


def measured_time(name: str, good: float, start: float, end: float = 0.99, most: int = 40_000) -> float:
    """The same by gradient ascent in small steps through the framework."""
    table = Table(np.log([[start, 1 - start]]))
    context, arm = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    share = torch.tensor([[good], [1 - good]], dtype=torch.float64)
    signals = {
        "reward": torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        "ref_logp": torch.tensor([[start], [1 - start]], dtype=torch.float64).log(),
        "behavior_logp": share.log(),
    }
    objective = rwft.build_objective(rate_spec(name))
    for step in range(most):
        if float(table.policy()[0, 0]) >= end:
            return step * RATE_LR
        table.move(RATE_LR * table.gradient(context, arm, share, objective, signals))
    return float("inf")


def rates(settings: list[tuple[float, float]]) -> list[dict[str, Any]]:
    """Times for each `(share of good rows, chance of the good arm at the start)`."""
    return [
        {"objective": name, "good": good, "start": start, "predicted": predicted_time(name, good, start),
         "measured": measured_time(name, good, start)}
        for good, start in settings
        for name in RATES
    ]  # fmt: skip


def measure(steps: int = 3000, settings: list[tuple[float, float]] | None = None) -> dict[str, Any]:
    """Everything about bandits, as plain values."""
    bandit = problem()
    found = [follow(bandit, case, steps) for case in cases(bandit)]
    found += [preference(bandit, steps, noisy) for noisy in (True, False)]
    settings = [(0.5, 0.5), (0.2, 0.2), (0.05, 0.05), (0.5, 0.01)] if settings is None else settings
    return {
        "steps": steps,
        "logs": bandit.expected(bandit.mu),
        "logs_success": float((bandit.mu * bandit.good).sum(1).mean()),
        "best": bandit.expected(one_hot(bandit.reward)),
        "cases": found,
        "above_the_mean": depends_on_start(bandit, steps),
        "iw_gradient_error": iw_is_the_policy_gradient(bandit),
        "rates": rates(settings),
    }
