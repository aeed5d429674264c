"""Exact proofs on tabular policies: every completion is enumerated, nothing is sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rwft

V, T = 3, 2
COMPLETIONS = list(itertools.product(range(V), repeat=T))
Logits = dict[tuple[int, ...], Tensor]


def tabular_policy(seed: int = 0) -> Logits:
    """Independent logits `(v)` for every prefix shorter than T, in float64."""
    random = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(T) for p in itertools.product(range(V), repeat=n)]
    return {p: torch.randn(V, generator=random, dtype=torch.float64).requires_grad_() for p in prefixes}


def token_logp(policy: Logits, y: tuple[int, ...]) -> Tensor:
    """`(t)`: log-probabilities of a completion's tokens."""
    return torch.stack([policy[y[:t]].log_softmax(0)[y[t]] for t in range(T)])


def rwft_gradient(policy: Logits, spec: Any, rows: list[tuple[int, ...]], **signals: Tensor) -> Tensor:
    """Ascent direction of the framework on `rows`, flattened over all prefixes; Z is the number of rows."""
    logp = torch.stack([token_logp(policy, y) for y in rows])
    mask = torch.ones_like(logp)
    weights = rwft.build_objective(spec)({"logp": logp, "mask": mask, **signals})
    loss = rwft.surrogate_loss(logp, weights, mask, len(rows))
    return flat(torch.autograd.grad(-loss, list(policy.values()), materialize_grads=True))


def enumerated(policy: Logits, value: Callable[[tuple[int, ...], Tensor], Tensor]) -> Tensor:
    """Gradient of `sum_y value(y, token log-probabilities)` over all completions."""
    total = torch.stack([value(y, token_logp(policy, y)) for y in COMPLETIONS]).sum()
    return flat(torch.autograd.grad(total, list(policy.values())))


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(list(gradients))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 1e-3  # two zeros would prove nothing


# --- SFT and DFT as policy gradients


@pytest.mark.parametrize("demonstration", COMPLETIONS)
def test_sft_is_the_policy_gradient_of_the_reward_indicator_over_pi(demonstration: tuple[int, ...]) -> None:
    """E_{y~pi}[ (1[y = y*] / pi(y)) grad log pi(y) ] over all nine completions = SFT's gradient on y*."""
    policy = tabular_policy()

    def term(y: tuple[int, ...], logp: Tensor) -> Tensor:
        pi = logp.sum().exp().detach()
        implicit_reward = float(y == demonstration) / pi
        return pi * implicit_reward * logp.sum()

    assert_equal(rwft_gradient(policy, "sft", [demonstration]), enumerated(policy, term))


@pytest.mark.parametrize("demonstration", COMPLETIONS)
def test_dft_takes_exactly_that_factor_away(demonstration: tuple[int, ...]) -> None:
    """Token by token, E_{a~pi(.|s_t)}[ 1[a = y*_t] grad log pi(a|s_t) ]: the indicator without 1 / pi."""
    policy = tabular_policy()
    total = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(demonstration):
        logp = policy[demonstration[:t]].log_softmax(0)
        for action in range(V):
            total = total + logp[action].exp().detach() * float(action == target) * logp[action]
    expected = flat(torch.autograd.grad(total, list(policy.values()), materialize_grads=True))
    assert_equal(rwft_gradient(policy, "dft", [demonstration]), expected)


@pytest.mark.parametrize("demonstration", COMPLETIONS)
def test_dft_is_the_gradient_of_the_summed_probabilities(demonstration: tuple[int, ...]) -> None:
    policy = tabular_policy()
    total = token_logp(policy, demonstration).exp().sum()
    expected = flat(torch.autograd.grad(total, list(policy.values()), materialize_grads=True))
    assert_equal(rwft_gradient(policy, "dft", [demonstration]), expected)


def test_dft_without_the_stop_gradient_is_another_objective() -> None:
    """p log p has the weight p (1 + log p), negative below 1/e: the mistake that a test of values cannot see."""
    policy = tabular_policy()
    y = min(COMPLETIONS, key=lambda y: float(token_logp(policy, y).max().detach()))
    logp = token_logp(policy, y)
    wrong = flat(torch.autograd.grad((logp.exp() * logp).sum(), list(policy.values()), materialize_grads=True))
    right = rwft_gradient(policy, "dft", [y])
    assert (logp < -1).all()
    assert torch.dot(wrong, right) < 0


@pytest.mark.parametrize("penalty", [0.0, -0.1, 0.5])
def test_one_token_rollouts_are_dft_in_expectation(penalty: float) -> None:
    """Sampling a token and rewarding 1 for the label, `penalty` for others: (1 - penalty) times DFT's gradient."""
    policy, demonstration = tabular_policy(), (2, 0)
    total = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(demonstration):
        logp = policy[demonstration[:t]].log_softmax(0)
        for action in range(V):
            total = total + logp[action].exp().detach() * (1.0 if action == target else penalty) * logp[action]
    expected = flat(torch.autograd.grad(total, list(policy.values()), materialize_grads=True))
    assert_equal((1 - penalty) * rwft_gradient(policy, "dft", [demonstration]), expected)


def test_the_effective_reward_is_w_times_the_data_over_pi() -> None:
    """sum_y mu(y) w(y) grad log pi = sum_y pi(y) [mu w / pi](y) grad log pi, here for RWR on a random mu."""
    policy = tabular_policy()
    reward = torch.linspace(-1, 1, len(COMPLETIONS), dtype=torch.float64)[:, None]
    mu = 1.0 / len(COMPLETIONS)

    def term(y: tuple[int, ...], logp: Tensor) -> Tensor:
        pi = logp.sum().exp().detach()
        effective = mu * math.exp(float(reward[COMPLETIONS.index(y)]) / 0.7) / pi
        return pi * effective * logp.sum()

    spec = {"name": "rwr", "temperature": 0.7}
    assert_equal(rwft_gradient(policy, spec, COMPLETIONS, reward=reward), enumerated(policy, term))


def test_importance_sampling_is_unbiased() -> None:
    """With y ~ mu and no truncation, E_mu[rho r grad log pi] is the gradient of J = sum_y pi(y) r(y)."""
    policy, behaviour = tabular_policy(0), tabular_policy(1)
    reward = torch.linspace(-1, 2, len(COMPLETIONS), dtype=torch.float64)[:, None]
    behavior_logp = torch.stack([token_logp(behaviour, y) for y in COMPLETIONS]).detach()
    mu = behavior_logp.sum(1, keepdim=True).exp()
    found = rwft_gradient(
        policy,
        [{"name": "sequence_is", "clip": 1e6}, "reinforce"],
        COMPLETIONS,
        behavior_logp=behavior_logp,
        advantage=mu * len(COMPLETIONS) * reward,  # rows stand for their share mu of the data
    )
    assert_equal(found, enumerated(policy, lambda y, logp: logp.sum().exp() * reward[COMPLETIONS.index(y)].squeeze()))


def test_a_baseline_is_free_on_policy_and_costs_offline() -> None:
    """Its gradient is c sum_y nu(y) grad log pi(y): zero for nu = pi, c (mu - pi) on a bandit's logits."""
    theta = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64)
    pi, mu, c = theta.softmax(0), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), 0.7
    on_policy = bandit_gradient(theta, pi, "reinforce", advantage=torch.full((4, 1), c, dtype=torch.float64))
    offline = bandit_gradient(theta, mu, "reinforce", advantage=torch.full((4, 1), c, dtype=torch.float64))
    torch.testing.assert_close(on_policy, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)
    assert_equal(offline, c * (mu - pi))


# --- closed forms of the dynamics: a bandit, full batch, gradient ascent in the logits


def bandit_gradient(theta: Tensor, mu: Tensor, spec: Any, **signals: Tensor) -> Tensor:
    """Ascent direction for one row per arm, each standing for its share `mu` of the data."""
    leaf = theta.clone().requires_grad_()
    logp = leaf.log_softmax(0)[:, None]
    weights = rwft.build_objective(spec)({"logp": logp, "mask": torch.ones_like(logp), **signals})
    share = mu[:, None]
    (gradient,) = torch.autograd.grad(-rwft.surrogate_loss(logp, weights * share, torch.ones_like(logp), 1.0), leaf)
    return gradient


def flow(
    mu: list[float], spec: Any, steps: int, lr: float, start: list[float] | None = None, **signals: Tensor
) -> Tensor:
    """Where gradient ascent from `start` (zeros) arrives: probabilities of the arms."""
    data = torch.tensor(mu, dtype=torch.float64)
    theta = torch.tensor(start or [0.0] * len(mu), dtype=torch.float64)
    for _ in range(steps):
        theta = theta + lr * bandit_gradient(theta, data, spec, **signals)
    return theta.softmax(0)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


MU = [0.1, 0.2, 0.3, 0.4]
REWARD = (1.0, 0.0, 0.5, -1.0)


def assert_policy(found: Tensor, expected: list[float] | np.ndarray, atol: float = 1e-9) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=atol)


def test_sft_recovers_the_data() -> None:
    assert_policy(flow(MU, "sft", 2000, 2.0), MU)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_rwr_ends_at_the_exponentially_tilted_data(temperature: float) -> None:
    """pi* = mu exp(r / temperature) / Z."""
    tilted = np.array(MU) * np.exp(np.array(REWARD) / temperature)
    spec = {"name": "rwr", "temperature": temperature, "clip": 1e9}
    lr = 2.0 / float(tilted.sum())
    assert_policy(flow(MU, spec, 3000, lr, reward=column(*REWARD)), tilted / tilted.sum())


def test_filtered_bc_ends_at_the_data_above_the_threshold() -> None:
    """mu restricted to r >= 0.5: arms 0 and 2 keep their ratio 1 : 3; the others die out as 1/t."""
    found = flow(MU, {"name": "filtered_bc", "threshold": 0.5}, 4000, 3.0, reward=column(*REWARD))
    assert_policy(found, [0.25, 0.0, 0.75, 0.0], atol=1e-3)


def test_a_negative_free_shift_ends_at_the_shifted_data() -> None:
    """REINFORCE with V <= min r: pi* = mu (r - V) / (V_mu - V). V = -1.5: 0.25, 0.3, 0.6, 0.2 over 1.35."""
    found = flow(MU, "reinforce", 4000, 1.0, advantage=column(*(r + 1.5 for r in REWARD)))
    assert_policy(found, np.array([0.25, 0.3, 0.6, 0.2]) / 1.35)


def water_filling(c: np.ndarray) -> np.ndarray:
    """(c - tau)_+ / sum(c) with tau such that it sums to 1, by bisection."""
    low, high = c.min() - c.sum(), c.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.clip(c - tau, 0, None).sum() > c.sum() else (low, tau)
    return np.clip(c - tau, 0, None) / c.sum()


def test_below_the_mean_reward_the_limit_is_water_filling() -> None:
    """AsymRE with V < V_mu: pi* = (mu (r - V) - tau)_+ / (V_mu - V). V_mu = -0.15, V = -0.5."""
    c = np.array(MU) * (np.array(REWARD) + 0.5)  # 0.15, 0.1, 0.3, -0.2; sum 0.35
    expected = water_filling(c)
    assert (expected == 0).sum() == 1  # the negative arm is cut off
    found = flow(MU, "reinforce", 6000, 4.0, advantage=column(*(r + 0.5 for r in REWARD)))
    assert_policy(found, expected, atol=1e-6)


def test_at_the_mean_reward_the_policy_collapses() -> None:
    """V = V_mu: all mass on argmax mu (r - V), here arm 2 (0.115, 0.03, 0.195, -0.34)."""
    found = flow(MU, "reinforce", 4000, 2.0, advantage=column(*(r + 0.15 for r in REWARD)))
    assert_policy(found, [0, 0, 1, 0], atol=1e-9)


def test_above_the_mean_reward_the_limit_depends_on_the_start() -> None:
    """V = 0.6 > V_mu: two starts, two ends."""
    advantage = column(*(r - 0.6 for r in REWARD))
    first = flow(MU, "reinforce", 3000, 1.0, advantage=advantage)
    second = flow(MU, "reinforce", 3000, 1.0, start=[0.0, 0.0, 8.0, 0.0], advantage=advantage)
    assert first.argmax() == 0
    assert second.argmax() == 2
    assert first[0] > 0.999
    assert second[2] > 0.999


def test_dft_flow_is_replicator_like() -> None:
    """d theta_a = pi_a (mu_a - <mu, pi>), the gradient of sum_a mu_a pi_a."""
    theta = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64)
    pi, mu = theta.softmax(0), torch.tensor(MU, dtype=torch.float64)
    assert_equal(bandit_gradient(theta, mu, "dft"), pi * (mu - mu @ pi))


def test_dft_seeks_the_mode_and_does_not_recover_the_data() -> None:
    """Stationary where mu is constant on the support; from almost everywhere it ends at argmax mu."""
    data = [0.3, 0.3, 0.2, 0.2]
    even = torch.tensor([0.0, 0.0, -60.0, -60.0], dtype=torch.float64)
    still = bandit_gradient(even, torch.tensor(data, dtype=torch.float64), "dft")
    torch.testing.assert_close(still, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)
    found = flow(MU, "dft", 4000, 20.0, start=[0.5, 0.2, 0.1, 0.0])
    assert_policy(found, [0, 0, 0, 1], atol=1e-3)
    assert_policy(flow(MU, "sft", 4000, 2.0, start=[0.5, 0.2, 0.1, 0.0]), MU)


# --- how fast a lone negative arm is driven away: -t without a taper, -log t with one


def negative_arm(spec: Any, times: list[int], **signals: Tensor) -> np.ndarray:
    """theta_0 - theta_1 at `times`, for data that hold nothing but arm 0, with reward and advantage -1."""
    mu, theta = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    path = {}
    rewards = {"reward": column(-1, -1), "advantage": column(-1, -1), **signals}
    for step in range(1, max(times) + 1):
        theta = theta + 0.5 * bandit_gradient(theta, mu, spec, **rewards)
        path[step] = float(theta[0] - theta[1])
    return np.array([path[t] for t in times])


def slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0])


def test_a_raw_negative_weight_pushes_logits_away_linearly() -> None:
    times = [250, 500, 1000, 2000]
    gap = negative_arm("reinforce", times)
    assert slope(np.log(times), np.log(-gap)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("spec", [["dft", "reinforce"], "topr"])
def test_a_tapered_negative_weight_pushes_them_away_logarithmically(spec: Any) -> None:
    """|w| = p ~ 1 / t, so the gap grows as -log t."""
    times = [250, 500, 1000, 2000]
    gap = negative_arm(spec, times, behavior_logp=torch.zeros(2, 1, dtype=torch.float64))
    assert slope(np.log(times), gap) == pytest.approx(-1, abs=0.05)
    probability = 1 / (1 + np.exp(-gap))
    assert slope(np.log(times), np.log(probability)) == pytest.approx(-1, abs=0.05)
