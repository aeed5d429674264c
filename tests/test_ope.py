"""Off-policy estimates against enumerated values, naive sums, and the closed forms of the embedded task."""

from __future__ import annotations

import io
import itertools
import json
import math
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from rwft.config import Config, resolve
from rwft.data.rows import Rows, open_rows, write_rows
from rwft.data.tasks import Behavior, caesar, write_task
from rwft.errors import DataError
from rwft.evaluate import evaluate, evaluate_command
from rwft.fitted_q import Steps, explained, fit_value, fitted_values, peers_return
from rwft.logged import logged_under, row_states, step_starts
from rwft.ope import Logged, estimate, off_policy_figures, others_mean, student_quantile
from tests.tiny import tiny, write_rollouts

Floats = NDArray[np.float64]
X, A = 5, 3  # prompts and letters of the tabular problem: completions are two letters long


def softmax(scores: Floats) -> Floats:
    e = np.exp(scores)
    return e / e.sum(axis=-1, keepdims=True)


class Tabular:
    """Two-letter completions of five prompts under two policies, with a reward for each letter."""

    def __init__(self, apart: float) -> None:
        draw = np.random.default_rng(3)
        first, second = draw.normal(size=(X, A)), draw.normal(size=(X, A, A))
        self.mu = softmax(first), softmax(second)
        self.pi = (
            softmax(first + apart * draw.normal(size=(X, A))),
            softmax(second + apart * draw.normal(size=(X, A, A))),
        )
        self.reward = draw.uniform(size=(X, A)), draw.uniform(size=(X, A, A))

    def value(self) -> float:
        """Expected sum of rewards of pi over equally likely prompts, by enumeration."""
        total = 0.0
        for x, a, b in itertools.product(range(X), range(A), range(A)):
            total += self.pi[0][x, a] * self.pi[1][x, a, b] * (self.reward[0][x, a] + self.reward[1][x, a, b]) / X
        return total

    def log(self, prompts: int, each: int, draw: np.random.Generator) -> Logged:
        x = np.repeat(draw.integers(X, size=prompts), each)
        a = (draw.random((len(x), 1)) > self.mu[0][x].cumsum(axis=1)[:, :-1]).sum(axis=1)
        b = (draw.random((len(x), 1)) > self.mu[1][x, a].cumsum(axis=1)[:, :-1]).sum(axis=1)
        one = np.log(self.pi[0][x, a] / self.mu[0][x, a])
        two = one + np.log(self.pi[1][x, a, b] / self.mu[1][x, a, b])
        steps = np.stack([self.reward[0][x, a], self.reward[1][x, a, b]], axis=1)
        steps += draw.normal(size=steps.shape) * 0.3
        prompt = np.repeat(np.arange(prompts), each)
        return Logged(steps.sum(axis=1), prompt, two, steps, np.stack([one, two], axis=1))


@pytest.mark.parametrize(("apart", "prompts", "each"), [(0.5, 60, 3), (1.0, 160, 1), (1.0, 50, 4)])
def test_estimates_are_right_on_average_and_intervals_cover(apart: float, prompts: int, each: int) -> None:
    problem, draw, times = Tabular(apart), np.random.default_rng(prompts), 400
    truth = problem.value()
    found = [estimate(problem.log(prompts, each, draw)) for _ in range(times)]
    used = [f for f in found if f.refused is None]
    assert len(used) > 0.9 * times
    for name in ("self_normalized", "doubly_robust", "per_decision"):
        values = np.array([f.estimates[name].value for f in used])
        covered = np.mean([f.estimates[name].low <= truth <= f.estimates[name].high for f in used])
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values)), name
        assert 0.91 <= covered <= 0.985, (name, covered)  # 0.95, with a standard error of 0.011
    behavior = np.mean([f.behavior.value for f in found])
    assert abs(behavior - truth) > 0.02  # the logs' own reward is another number


def test_more_logs_come_nearer() -> None:
    problem = Tabular(1.0)
    found = estimate(problem.log(40_000, 2, np.random.default_rng(0)))
    for name, one in found.estimates.items():
        assert one.value == pytest.approx(problem.value(), abs=0.01), name
        assert one.high - one.low < 0.03
    assert found.mean_ratio == pytest.approx(1.0, abs=0.02)


def test_doubly_robust_correction_is_unbiased_by_enumeration() -> None:
    mu, pi, reward = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7]), np.array([1.0, -2.0, 5.0])
    total = 0.0
    for pair in itertools.product(range(3), repeat=2):  # both completions that were logged for one prompt
        drawn = list(pair)
        rewards = np.array([*reward[drawn], 9.0])  # a second prompt, with one completion
        baseline = others_mean(rewards, np.array([0, 0, 1]))[:2]
        w = pi[drawn] / mu[drawn]
        total += float(mu[drawn].prod() * (baseline + w * (rewards[:2] - baseline)).mean())
    assert total == pytest.approx(float(pi @ reward), abs=1e-12)


def test_baselines_by_hand() -> None:
    rewards, prompt = np.array([1.0, 2.0, 6.0, 10.0, 4.0, 8.0]), np.array([5, 5, 5, 2, 9, 9])
    # means of the prompts: 3, 10, 6; prompt 2 has one row, so it gets (3 + 6) / 2
    assert others_mean(rewards, prompt).tolist() == [4.0, 3.5, 1.5, 4.5, 8.0, 4.0]


def naive(logged: Logged) -> dict[str, float]:
    """The three estimators as double sums over prompts and their rows."""
    assert logged.step_reward is not None
    assert logged.step_log_ratio is not None
    groups = [np.flatnonzero(logged.prompt == g) for g in sorted(set(logged.prompt.tolist()))]
    w = [math.exp(x) for x in logged.log_ratio]
    top = bottom = base = corrected = 0.0
    for rows in groups:
        for i in rows:
            others = [logged.reward[j] for j in rows if j != i]
            b = sum(others) / len(others)
            share = 1 / len(rows) / len(groups)
            top, bottom = top + share * w[i] * logged.reward[i], bottom + share * w[i]
            base, corrected = base + share * b, corrected + share * w[i] * (logged.reward[i] - b)
    steps = 0.0
    for k in range(logged.step_reward.shape[1]):
        ratio = [math.exp(x) for x in logged.step_log_ratio[:, k]]
        up = sum(ratio[i] * logged.step_reward[i, k] / len(rows) for rows in groups for i in rows)
        steps += up / sum(ratio[i] / len(rows) for rows in groups for i in rows)
    return {"self_normalized": top / bottom, "doubly_robust": base + corrected / bottom, "per_decision": steps}


def uneven(prompts: int) -> Logged:
    """Prompts with two to four rows each."""
    draw = np.random.default_rng(8)
    prompt = np.repeat(np.arange(prompts) * 7, draw.integers(2, 5, size=prompts))
    n = len(prompt)
    steps, gaps = draw.normal(size=(n, 3)), draw.normal(size=(n, 3)) * 0.4
    return Logged(draw.normal(size=n), prompt, gaps[:, 2] + draw.normal(size=n) * 0.1, steps, gaps)


def without(logged: Logged, g: int) -> Logged:
    keep = logged.prompt != g
    assert logged.step_reward is not None
    assert logged.step_log_ratio is not None
    rest = logged.step_reward[keep], logged.step_log_ratio[keep]
    return Logged(logged.reward[keep], logged.prompt[keep], logged.log_ratio[keep], *rest)


def test_values_and_intervals_against_naive_sums() -> None:
    logged = uneven(30)
    found, expected = estimate(logged), naive(logged)
    prompts = sorted(set(logged.prompt.tolist()))
    left = [naive(without(logged, g)) for g in prompts]
    sums = [np.array([np.exp(x[logged.prompt == g]).mean() for g in prompts]) for x in
            (logged.log_ratio, *np.asarray(logged.step_log_ratio).T)]  # fmt: skip
    effective = min(s.sum() ** 2 / (s**2).sum() for s in sums)
    for name, value in expected.items():
        one = found.estimates[name]
        assert one.value == pytest.approx(value, rel=1e-12), name
        spread = np.array([item[name] for item in left])
        error = math.sqrt((len(prompts) - 1) * spread.var())
        assert one.high - one.value == pytest.approx(student_quantile(effective - 1) * error, rel=1e-9), name
        assert one.value - one.low == pytest.approx(one.high - one.value, rel=1e-9)
    assert found.ess_prompts == pytest.approx(effective)
    half = student_quantile(effective - 1) * sums[0].std(ddof=1) / math.sqrt(len(prompts))
    assert found.mean_ratio_interval == pytest.approx((sums[0].mean() - half, sums[0].mean() + half))
    size = {g: (logged.prompt == g).sum() for g in prompts}
    share = [math.exp(x) / size[g] for x, g in zip(logged.log_ratio, logged.prompt.tolist(), strict=True)]
    assert found.mean_ratio == pytest.approx(sum(share) / len(prompts))
    assert found.largest == pytest.approx(max(share) / sum(share))


def test_effective_rows_by_hand() -> None:
    ratios = np.array([3.0, 1.0] * 40)  # (160)^2 / 400 = 64 of 80
    found = estimate(Logged(np.ones(80), np.repeat(np.arange(40), 2), np.log(ratios / 2)))
    assert found.ess == pytest.approx(64.0)
    assert found.ess_prompts == pytest.approx(40.0)
    assert found.mean_ratio == pytest.approx(1.0)


@pytest.mark.parametrize(("freedom", "quantile"), [(9, 2.262157), (14, 2.144787), (29, 2.045230), (99, 1.984217)])
def test_student_quantile_is_the_table(freedom: float, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=3e-4)


def test_too_little_overlap_is_refused_with_its_size() -> None:
    draw = np.random.default_rng(0)
    found = estimate(Logged(draw.random(400), np.repeat(np.arange(100), 4), draw.normal(size=400) * 4))
    assert found.estimates == {}
    assert found.ess < 30
    assert found.refused is not None
    assert f"effective sample size {found.ess:.1f} of 400 rows" in found.refused


@pytest.mark.parametrize(("ratio", "refused"), [(0.45, True), (0.55, False), (1.9, False), (2.1, True)])
def test_a_policy_that_writes_elsewhere_is_refused_though_its_ratios_are_even(ratio: float, refused: bool) -> None:
    found = estimate(Logged(np.ones(80), np.arange(80) // 2, np.full(80, math.log(ratio))))
    assert found.ess == pytest.approx(80.0)
    assert found.mean_ratio == pytest.approx(ratio)
    assert (found.refused is not None) == refused
    assert not refused or "the policy writes what the logs do not hold" in str(found.refused)


def test_ratios_beyond_floating_point_are_refused_not_nan() -> None:
    found = estimate(Logged(np.ones(80), np.arange(80) // 2, np.full(80, 2000.0)))
    assert found.refused is not None
    assert math.isfinite(found.mean_ratio)
    assert estimate(Logged(np.ones(80), np.arange(80) // 2, np.full(80, -2000.0))).mean_ratio == 0.0


@pytest.mark.parametrize(
    ("ratios", "says"),
    [([0.9, 1.0], "about 0.05 of what the policy writes is not in the logs"), ([1.1, 1.2], "ratios average above 1")],
)
def test_a_mean_ratio_that_is_surely_not_one_is_a_caution(ratios: list[float], says: str) -> None:
    found = estimate(Logged(np.ones(80), np.arange(80) // 2, np.log(np.repeat(ratios, 40))))
    assert found.refused is None
    assert found.caution is not None
    assert found.caution.startswith(says)
    assert ("off-policy: caution", found.caution) in off_policy_figures(found)
    even = estimate(Logged(np.ones(80), np.arange(80) // 2, np.log(np.repeat([0.8, 1.2], 40))))
    assert even.caution is None


def test_one_row_that_carries_all_is_refused_not_an_error() -> None:
    found = estimate(Logged(np.ones(80), np.arange(80) // 2, np.array([900.0, *[0.0] * 79])))
    assert found.refused is not None
    assert (found.ess, found.ess_prompts, found.largest) == (1.0, 1.0, 1.0)
    assert "effective sample size 1.0 of 80 rows, 1.0 of 40 prompts" in found.refused
    assert json.dumps(found.mean_ratio_interval, allow_nan=False)


def test_too_few_prompts() -> None:
    with pytest.raises(DataError, match="found 9 held-out prompts, expected at least 10"):
        estimate(Logged(np.ones(90), np.arange(90) % 9, np.zeros(90)))


def test_the_embedded_task_has_a_closed_form(tmp_path: Path) -> None:
    """Logs of a policy with skill 0.9 tell how often one with skill 0.8 succeeds; and one with 0.97."""
    for skill in (0.8, 0.97):
        other = Behavior(skill)
        truth = float(np.mean([other.right(letter) for letter in string.ascii_lowercase])) ** 4
        covered = 0
        for seed in range(30):
            files = write_task("caesar", tmp_path / f"{seed}", rows=1, heldout=150, length=4, skill=0.9, seed=seed)
            reward: list[float] = []
            ratio: list[float] = []
            for row in map(json.loads, files.heldout.read_text().splitlines()):
                right = caesar(row["prompt"][:-1])
                for written, score, logp in zip(row["completions"], row["rewards"], row["logprobs"], strict=True):
                    reward.append(score)
                    ratio.append(sum(other.logp(written, right)) - sum(logp))
            found = estimate(Logged(np.array(reward), np.arange(600) // 4, np.array(ratio)))
            one = found.estimates["self_normalized"]
            covered += one.low <= truth <= one.high
        assert covered >= 26, skill  # 28.5 of 30 on average


# -- fitted values -----------------------------------------------------------------------------------------------------


class Tree:
    """Up to `deep` steps, each a letter or the end; two policies, rewards by history, and what is known of a history.

    A history is numbered by its prompt and letters: x A^k + letters. `seen` says what its state tells: all of it
    (one-hot), its last letter, or nothing.
    """

    def __init__(self, deep: int, apart: float, seen: str, seed: int, prompts: int = 5) -> None:
        draw = np.random.default_rng(seed)
        self.deep, self.prompts, self.seen = deep, prompts, seen
        self.mu: list[Floats] = []
        self.pi: list[Floats] = []
        self.reward: list[Floats] = []
        for k in range(deep):
            histories = prompts * A**k
            scores, gap = draw.normal(size=(2, histories, A + 1))
            scores[:, A] -= 50.0 * (k == 0)  # nothing ends before its first step
            self.mu.append(softmax(scores))
            self.pi.append(softmax(scores + apart * gap))
            self.reward.append(draw.normal(size=(histories, 1)) + 0.5 * draw.normal(size=(histories, A)))

    def values(self) -> list[Floats]:
        """`(histories)` for each step: expected rewards from it on, by enumeration."""
        out = [np.zeros(self.prompts * A**self.deep)]
        for pi, reward in zip(reversed(self.pi), reversed(self.reward), strict=True):
            out.append((pi[:, :A] * (reward + out[-1].reshape(-1, A))).sum(axis=1))
        return out[:0:-1]

    def value(self) -> float:
        return float(self.values()[0].mean())

    def state(self, k: int, history: NDArray[np.int64]) -> Floats:
        width = self.prompts * A ** (self.deep - 1)
        if self.seen == "all":
            return np.eye(width)[history]
        return np.eye(width)[history % A] if self.seen == "last" and k > 0 else np.zeros((len(history), width))

    def log(self, prompts: int, each: int, draw: np.random.Generator) -> tuple[Logged, NDArray[np.int64]]:
        """Rows, and the number of each one's history before each step, -1 behind its end."""
        history = np.repeat(draw.integers(self.prompts, size=prompts), each)
        n, on = len(history), np.ones(len(history), dtype=bool)
        ratio, where = np.zeros(n), np.full((n, self.deep), -1)
        step_reward, gaps = np.zeros((n, self.deep)), np.zeros((n, self.deep))
        states = []
        for k in range(self.deep):
            where[on, k] = history[on]
            states.append(self.state(k, history) * on[:, None])
            action = (draw.random((n, 1)) > self.mu[k][history].cumsum(axis=1)[:, :-1]).sum(axis=1)
            ratio = ratio + on * np.log(self.pi[k][history, action] / self.mu[k][history, action])
            gaps[:, k] = ratio
            on = on & (action < A)
            letter = np.minimum(action, A - 1)
            step_reward[:, k] = on * (self.reward[k][history, letter] + 0.3 * draw.normal(size=n))
            history = history * A + letter
        number = np.repeat(np.arange(prompts), each)
        return Logged(
            step_reward.sum(axis=1), number, ratio, step_reward, gaps, np.stack(states, axis=1), where >= 0
        ), where


@pytest.mark.parametrize(
    ("problem", "prompts", "each", "width"),
    [
        (Tree(2, 0.8, "all", seed=5, prompts=2), 100, 2, (0.85, 0.97)),
        (Tree(3, 0.6, "last", seed=1), 80, 3, (0.96, 1.04)),
    ],
    ids=["a state that tells all", "a state that tells little"],
)
def test_fitted_q_is_right_on_average_and_its_interval_covers(
    problem: Tree, prompts: int, each: int, width: tuple[float, float]
) -> None:
    """Whatever the state tells: the correction makes up for the fit. Narrower than without, if it tells much."""
    draw, times, truth = np.random.default_rng(7), 300, problem.value()
    found = [estimate(problem.log(prompts, each, draw)[0]).estimates for _ in range(times)]
    widths = {}
    for name in ("per_decision", "fitted_q"):
        used = [f[name] for f in found if name in f]
        assert len(used) > 0.9 * times
        values = np.array([f.value for f in used])
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(values)), name
        covered = np.mean([f.low <= truth <= f.high for f in used])
        assert 0.91 <= covered <= 0.985, (name, covered)  # 0.95, with a standard error of 0.013
        widths[name] = float(np.mean([f.high - f.low for f in used]))
    assert width[0] < widths["fitted_q"] / widths["per_decision"] < width[1]


def test_many_logs_with_ends_come_near() -> None:
    problem = Tree(3, 1.0, "all", seed=4)
    found = estimate(problem.log(20_000, 1, np.random.default_rng(0))[0])
    for name in ("per_decision", "fitted_q"):
        assert found.estimates[name].value == pytest.approx(problem.value(), abs=0.06)
        assert found.estimates[name].high - found.estimates[name].low < 0.12


def steps_of(logged: Logged) -> Steps:
    assert logged.step_reward is not None
    assert logged.step_log_ratio is not None
    assert logged.state is not None
    assert logged.alive is not None
    return Steps(logged.step_reward, logged.step_log_ratio, logged.state, logged.alive, logged.prompt)


def test_fitted_values_come_to_the_enumerated_ones() -> None:
    problem = Tree(2, 0.5, "all", seed=2)
    logged, where = problem.log(30_000, 1, np.random.default_rng(1))
    found = fitted_values(steps_of(logged))
    for k, truth in enumerate(problem.values()):
        alive = where[:, k] >= 0
        assert np.abs(found[alive, k] - truth[where[alive, k]]).max() < 0.15
        assert not found[~alive, k].any()
    assert not found[:, -1].any()


@pytest.mark.parametrize("each", [1, 3])
def test_no_rows_own_rewards_are_in_its_values(each: int) -> None:
    logged, _ = Tree(2, 0.5, "all", seed=2).log(60, each, np.random.default_rng(1))
    steps = steps_of(logged)
    found, other = fitted_values(steps), steps.reward.copy()
    other[7] += 5.0
    moved = fitted_values(replace(steps, reward=other))
    assert moved[7].tolist() == found[7].tolist()
    assert np.abs(moved - found).max() > 0.01


def test_what_lies_behind_the_end_does_not_count() -> None:
    steps = steps_of(Tree(3, 0.5, "all", seed=2).log(60, 2, np.random.default_rng(1))[0])
    assert not steps.alive.all()
    other = replace(steps, state=np.where(steps.alive[:, :, None], steps.state, 7.0))
    assert (fitted_values(other) == fitted_values(steps)).all()


def test_ridge_against_hat_matrices() -> None:
    """Generalised cross-validation over the same penalties, by the definition: RSS / (n - tr H)^2, H of all n rows."""
    draw = np.random.default_rng(5)
    x = draw.normal(size=(60, 8)) * 10.0 ** np.arange(-3, 5)
    y = x @ (draw.normal(size=8) / 10.0 ** np.arange(-3, 5)) + 3 * draw.normal(size=60)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    best, expected = math.inf, np.zeros(60)
    for penalty in 10.0 ** np.arange(-4, 4.5, 0.5):
        hat = 1 / 60 + z @ np.linalg.inv(z.T @ z + 60 * penalty * np.eye(8)) @ z.T
        error = np.square(y - hat @ y).sum() / (60 - np.trace(hat)) ** 2
        if error < best:
            best, expected = error, hat @ y
    found = fit_value(x, y, np.full(60, 0.2))(x)
    np.testing.assert_allclose(found, np.clip(expected, y.min(), y.max()), rtol=1e-9)
    assert np.abs(found - y.mean()).max() > 1  # it is no mean


def test_a_weight_of_two_is_two_rows() -> None:
    draw = np.random.default_rng(6)
    x, y = draw.normal(size=(80, 2)), draw.normal(size=80)
    x[:, 1] = 4.0  # a constant says nothing
    y += 3 * x[:, 0]
    twice = np.concatenate([x[:40], x]), np.concatenate([y[:40], y])
    w = np.where(np.arange(80) < 40, 2.0, 1.0)
    one, two = fit_value(x, y, w)(x), fit_value(*twice, np.ones(120))(x)
    np.testing.assert_allclose(one, two, atol=0.02)  # the penalty may be another: fewer rows are effective
    assert np.abs(fit_value(x, y, np.ones(80))(x) - two).max() > 0.02


def test_few_effective_rows_give_their_mean_and_predictions_stay_in_range() -> None:
    x, y = np.arange(60.0)[:, None], np.arange(60.0) / 10
    far = np.array([[-1e6], [30.0], [1e6]])
    assert fit_value(x, y, np.ones(60))(far) == pytest.approx([0.0, 3.0, 5.9], abs=0.05)
    weight = np.where(np.arange(60) < 19, 1.0, 1e-9)  # 19 effective rows
    assert fit_value(x, y, weight)(far) == pytest.approx([0.9, 0.9, 0.9], abs=1e-6)
    weight[19:21] = 1.0
    assert fit_value(x, y, weight)(far)[2] == pytest.approx(5.9)


def test_peers_and_what_values_foresee_by_hand() -> None:
    found = peers_return(np.array([1.0, 2.0, 6.0, 10.0, 4.0, 8.0]), np.array([5, 5, 5, 2, 9, 9]))
    np.testing.assert_array_equal(found, [4.0, 3.5, 1.5, np.nan, 8.0, 4.0])
    reward = np.array([[1.0, 2.0], [5.0, 0.0], [0.0, 4.0]])
    alive = np.array([[True, True], [True, False], [True, True]])
    steps = Steps(reward, np.zeros((3, 2)), np.zeros((3, 2, 1)), alive, np.arange(3))
    values = np.array([[3.0, 1.0, 0.0], [4.0, 0.0, 0.0], [4.0, 4.0, 0.0]])
    # to go: 3 5 4 with weights 1 1 2, mean 4; 2 - 4 with weights 1 2, mean 10/3
    spread = 1 + 1 + 0 + (4 / 3) ** 2 + 2 * (2 / 3) ** 2
    assert explained(steps, values, np.array([1.0, 1.0, 2.0])) == pytest.approx(1 - (0 + 1 + 0 + 1 + 0) / spread)


def test_fitted_q_against_naive_sums() -> None:
    logged, _ = Tree(3, 0.3, "all", seed=1).log(60, 2, np.random.default_rng(3))
    steps, found = steps_of(logged), estimate(logged)
    values, prompts = fitted_values(steps), sorted(set(logged.prompt.tolist()))

    def total(keep: list[int]) -> float:
        rows = [i for i in range(120) if logged.prompt[i] in keep]
        out = sum(values[i, 0] for i in rows) / len(rows)
        for k in range(3):
            w = {i: math.exp(steps.log_ratio[i, k]) for i in rows}
            out += sum(w[i] * (steps.reward[i, k] + values[i, k + 1] - values[i, k]) for i in rows) / sum(w.values())
        return out

    one = found.estimates["fitted_q"]
    assert one.value == pytest.approx(total(prompts), rel=1e-10)
    spread = np.array([total([p for p in prompts if p != g]) for g in prompts])
    half = student_quantile(found.ess_prompts - 1) * math.sqrt(59 * spread.var())
    assert (one.low, one.high) == pytest.approx((one.value - half, one.value + half), rel=1e-9)
    assert found.fitted is not None
    assert found.fitted.direct == pytest.approx(values[:, 0].mean())
    assert found.fitted.explained == pytest.approx(explained(steps, values, np.exp(logged.log_ratio)))


def test_values_that_foresee_nothing_give_no_estimate() -> None:
    logged, _ = Tree(2, 0.3, "none", seed=1).log(100, 1, np.random.default_rng(0))
    draw = np.random.default_rng(2)
    found = estimate(replace(logged, step_reward=draw.normal(size=(100, 2)), state=draw.normal(size=(100, 2, 30))))
    assert found.refused is None
    assert found.estimates.keys() == {"self_normalized", "doubly_robust", "per_decision"}
    assert found.fitted is not None
    assert found.fitted.explained <= 0
    assert found.fitted.refused is not None
    assert "of what is to come, expected more than 0" in found.fitted.refused
    assert ("off-policy: fitted values", found.fitted.refused) in off_policy_figures(found)


# -- rows of data and a model ------------------------------------------------------------------------------------------


def stored(folder: Path, *rows: dict[str, Any]) -> Rows:
    blank = {"weight": None, "step_position": None, "step_reward": None, "reward": 1.0, "value": None, "group": "g"}
    blank |= {"file": "f", "row": 1, "prompt": "p", "answer": None}
    write_rows([blank | row for row in rows], folder / "rows.arrow")
    return open_rows(folder / "rows.arrow", "x")


def test_ratios_of_rows_by_hand(tmp_path: Path) -> None:
    rows = stored(
        tmp_path,
        {
            "ids": [1, 2, 3, 4, 5, 6],
            "mask": [False, True, True, False, True],
            "behavior_logp": [0.0, -1.0, -2.0, 0.0, -4.0],
            "step_position": [1, 4],
            "step_reward": [0.5, 2.0],
        },
        {
            "ids": [1, 2, 3],
            "mask": [True, True],
            "behavior_logp": [-1.0, -1.0],
            "step_position": [0],
            "step_reward": [3.0],
        },
    )
    found = logged_under(rows, [np.array([-0.5, -1.0, -3.0]), np.array([-2.0, -5.0])])
    assert found.log_ratio.tolist() == [0.5 + 1.0 + 1.0, -1.0 - 4.0]
    assert found.step_reward is not None
    assert found.step_log_ratio is not None
    assert found.step_reward.tolist() == [[0.5, 2.0], [3.0, 0.0]]
    assert found.step_log_ratio.tolist() == [[0.5, 2.5], [-1.0, -5.0]]  # the second row's end is behind its only step


def test_rows_without_steps_have_no_per_decision_estimate(tmp_path: Path) -> None:
    row = {"ids": [1, 2], "mask": [True], "behavior_logp": [-1.0]}
    steps = {"step_position": [0], "step_reward": [1.0]}
    assert logged_under(stored(tmp_path, row, row | steps), [np.zeros(1), np.zeros(1)]).step_reward is None


def test_where_steps_start_by_hand(tmp_path: Path) -> None:
    blank = {"ids": [1, 2, 3, 4, 5, 6, 7], "behavior_logp": [0.0] * 6, "mask": [False, True, True, False, True, True]}
    rows = stored(
        tmp_path,
        blank | {"step_position": [1, 2, 4], "step_reward": [1.0, 2.0, 3.0]},  # steps of one token; one more behind
        blank | {"step_position": [2], "step_reward": [1.0]},  # two tokens; then an end, which is a step too
        blank | {"step_position": [5], "step_reward": [1.0]},  # nothing behind
        blank | {"step_position": [0, 5], "step_reward": [1.0, 2.0]},  # a first step of which nothing is trained
    )
    logged = logged_under(rows, [np.array([1.0, 2.0, 4.0, 8.0])] * 4)
    assert logged.alive is not None
    assert logged.alive.astype(int).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert [p.tolist() for p in step_starts(rows, logged.alive)] == [[0, 1, 2], [0, 2], [0], [0, 0]]
    assert logged.step_log_ratio is not None
    assert logged.step_log_ratio.tolist() == [[1, 3, 7], [3, 15, 15], [15, 15, 15], [0, 15, 15]]


def test_an_end_is_an_action_of_which_the_ratio_counts(tmp_path: Path) -> None:
    """Half of the logs end behind the first step, the policy ends one time in ten; a second step is worth 1: 0.9."""
    ends = {"ids": [1, 2, 3], "mask": [True, True], "behavior_logp": [0.0, math.log(0.5)]}
    goes = {"ids": [1, 2, 4, 3], "mask": [True, True, True], "behavior_logp": [0.0, math.log(0.5), 0.0]}
    ends |= {"step_position": [0], "step_reward": [0.0]}
    goes |= {"step_position": [0, 1], "step_reward": [0.0, 1.0]}
    rows = stored(tmp_path, *(row | {"group": f"{g}"} for g in range(20) for row in (ends, ends, goes, goes)))
    ours = np.array([0.0, math.log(0.1)]), np.array([0.0, math.log(0.9), 0.0])
    found = estimate(logged_under(rows, [ours[i % 4 > 1] for i in range(80)]))
    assert found.estimates["per_decision"].value == pytest.approx(0.9, abs=1e-12)
    assert found.mean_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("width", [16, 80])
def test_states_are_the_models_own(tmp_path: Path, width: int) -> None:
    """The last hidden state behind the prompt, and behind each step; wide ones are projected, always alike."""
    from rwft.data.batching import Collate
    from rwft.policy import load_policy

    rows = stored(
        tmp_path,
        {"ids": [1, 50, 51, 52, 53, 2], "mask": [False, True, True, True, True]},
        {"ids": [1, 60, 61], "mask": [True, True]},
    )
    config = tiny(tmp_path, f"model.config.hidden_size={width}", "model.config.attention_dropout=0.5")
    policy = load_policy(config.model, 0).train()
    collate = Collate(rows, frozenset(), dtype=torch.float64)
    places = [np.array([0, 2]), np.array([1])]
    found = row_states(policy, collate, rows.length, places, device=torch.device("cpu"))
    assert policy.training
    policy.eval()
    for states, ids, which in zip(found, ([1, 50, 51, 52, 53], [1, 60]), ([1, 3], [1]), strict=True):
        with torch.no_grad():
            out = policy.causal(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected = out.hidden_states[-1][0, which].numpy()
        if width <= 64:
            np.testing.assert_allclose(states, expected, atol=1e-10)
        else:
            assert states.shape == (len(which), 64)
            ratio = np.linalg.norm(states, axis=1) / np.linalg.norm(expected, axis=1)
            assert (np.abs(ratio / 8 - 1) < 0.4).all()  # lengths are kept, times sqrt(64), up to 1 / sqrt(128)
    again = row_states(policy, collate, rows.length, places, device=torch.device("cpu"))
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_steps_from_rows_to_estimates(tmp_path: Path) -> None:
    """The policy's own logs: every ratio is 1, so the estimate is the mean of the logged step rewards."""
    own_logs(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from rwft import Example\n"
        "from rwft.data.example import Span\n\n"
        "def rows(row, source):\n"
        "    for text, logp in zip(row['completions'], row['logprobs']):\n"
        "        spans = [Span(i, i + 1, float(letter > 'd')) for i, letter in enumerate(text)]\n"
        "        yield Example(row['prompt'], text, source, reward=float(len(text)), group=row['prompt'],\n"
        "                      behavior_logp=logp, spans=tuple(spans), finished=True)\n"
    )
    asked = "evaluate.off_policy=true", f"data.adapter={tmp_path}/mine.py:rows"
    whole = ("data.eval_fraction=0.0", f"data.eval_path={tmp_path / 'rollouts.jsonl'}")
    found = evaluate(tiny(tmp_path, *asked, *whole)).off_policy
    assert found is not None
    assert found.refused is None
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    mean = np.mean([np.mean([sum(c > "d" for c in text) for text in line["completions"]]) for line in lines])
    assert found.behavior_steps is not None
    assert found.behavior_steps.value == pytest.approx(mean)
    assert found.estimates["per_decision"].value == pytest.approx(mean, abs=1e-9)
    assert found.fitted is not None
    assert found.fitted.explained != 0
    if found.fitted.refused is None:
        assert found.estimates["fitted_q"].value == pytest.approx(mean, abs=0.5)


def own_logs(folder: Path, shift: float = 0.0) -> Config:
    """A config whose rows were logged with the policy's own log-probabilities, `shift` added to each row's first."""
    from rwft.data.batching import Collate
    from rwft.data.logprobs import row_logp
    from rwft.data.prepare import prepare
    from rwft.policy import load_policy, load_tokenizer

    path = write_rollouts(folder / "rollouts.jsonl", prompts=40)
    config = tiny(folder, "data.eval_fraction=0.5")
    policy = load_policy(config.model, config.train.seed, torch.device("cpu"))
    data = prepare(config.data, load_tokenizer(config.model), frozenset(), folder / "first")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert data.held_out is not None
    for rows in (data.train, data.held_out):
        collate = Collate(rows, frozenset(), dtype=torch.float64)
        logp = row_logp(
            policy, collate, rows.length, np.arange(len(rows)), device=torch.device("cpu"), tick=lambda _: None
        )
        seen: dict[int, int] = {}
        for i in range(len(rows)):
            number = rows.source(i).row
            place = seen[number] = seen.get(number, -1) + 1
            values = [float(v) for v in logp[i]]
            lines[number - 1]["logprobs"][place] = [values[0] + shift, *values[1:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def test_a_policy_on_its_own_logs(tmp_path: Path) -> None:
    config = own_logs(tmp_path)
    assert evaluate(config).off_policy is None
    result = evaluate(resolve(_plain(config), ["evaluate.off_policy=true"]))
    found = result.off_policy
    assert found is not None
    assert found.refused is None
    assert found.mean_ratio == pytest.approx(1.0, abs=1e-9)
    assert found.prompts >= 10
    assert found.estimates["self_normalized"].value == pytest.approx(found.behavior.value, abs=1e-9)
    assert found.estimates.keys() == {"self_normalized", "doubly_robust"}
    assert result.to_json()["off_policy"]["estimates"]["self_normalized"]["value"] == pytest.approx(
        found.behavior.value, abs=1e-9
    )
    assert result.held_out == evaluate(config).held_out


def _plain(config: Config) -> dict[str, Any]:
    from rwft.config import as_dict

    return as_dict(config)


def test_log_probabilities_of_something_else(tmp_path: Path) -> None:
    config = own_logs(tmp_path, shift=-1.0)
    found = evaluate(resolve(_plain(config), ["evaluate.off_policy=true"])).off_policy
    assert found is not None
    assert found.mean_ratio == pytest.approx(math.e, rel=1e-9)
    assert found.refused is not None
    assert "mean ratio 2.72" in found.refused


def test_the_table_says_it(tmp_path: Path) -> None:
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_plain(own_logs(tmp_path))))
    console = Console(file=io.StringIO(), record=True, width=200)
    evaluate_command(str(tmp_path / "config.yaml"), ["evaluate.off_policy=true"], console)
    text = console.export_text()
    assert "off-policy: self_normalized" in text
    assert "off-policy: doubly_robust" in text
    assert "off-policy: mean ratio (1 if covered)" in text


def test_rows_without_log_probabilities(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "rollouts.jsonl", prompts=40)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in x.items() if k != "logprobs"}) + "\n" for x in lines))
    says = "jsonl:1: no log-probabilities of the behaviour policy .* train.watch or evaluate.off_policy reads"
    with pytest.raises(DataError, match=says):
        evaluate(tiny(tmp_path, "evaluate.off_policy=true", "data.eval_fraction=0.5"))


def test_rows_without_rewards(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "rollouts.jsonl", prompts=40)
    (tmp_path / "mine.py").write_text(
        "from rwft import Example\n\n"
        "def rows(row, source):\n"
        "    yield Example(row['prompt'], row['completions'][0], source, behavior_logp=row['logprobs'][0])\n"
    )
    with pytest.raises(DataError, match=r"jsonl:\d+: no reward, which evaluate.off_policy needs of every held-out row"):
        evaluate(
            tiny(
                tmp_path, "evaluate.off_policy=true", "data.eval_fraction=0.5", f"data.adapter={tmp_path}/mine.py:rows"
            )
        )


def test_training_rows_in_a_file_of_their_own_need_no_log_probabilities(tmp_path: Path) -> None:
    own_logs(tmp_path)
    rows = [{"prompt": "a>", "completion": "b"}]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = str(tmp_path / "rollouts.jsonl")
    adapted = ("data.eval_fraction=0.0", f"data.eval_path={held}", f"data.path={tmp_path / 'bare.jsonl'}")
    found = evaluate(tiny(tmp_path, "evaluate.off_policy=true", *adapted)).off_policy
    assert found is not None
    assert found.prompts == 40


def test_the_page_on_metrics_names_every_figure() -> None:
    from rwft.metrics import Meter

    page = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
    meter = Meter(torch.device("cpu"))
    meter.steps = 1
    meter.add({name: torch.ones(()) for name in meter.sums}, torch.ones(1))
    figures = meter.read(lambda tensor: tensor)
    assert len(figures) >= 13
    for name in [*figures, *estimate(uneven(30)).estimates, "fitted_q"]:
        assert f"`{name}`" in page, name
