r"""Clipped, tapered and smoothed policy-gradient surrogates, as the weights that their gradients are.

A surrogate $J(\rho)$ has the weight $\rho \, \partial J / \partial \rho$. Each contains the advantage: do not
multiply by `reinforce`. $\rho_t = \pi / \mu$ is the ratio of the policy as it is to the behaviour policy that wrote
the data. Where nobody logged $\mu$, the model that training starts from may stand in for it: then the clip
bounds the drift from there, not off-policyness.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rwft.bounds import AtLeastOne, Fraction, NonNegative, Positive
from rwft.objectives.logspace import MAX_LOG_RATIO, bounded_exp, by_sign, mean_log_ratio, ratio, sequence_log_ratio
from rwft.signals import seq_mean
from rwft.weighting import objective


def unclipped(rho: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """`x, x -> x`: where PPO's minimum has a gradient: still below 1 + high to gain, still above 1 - low to lose."""
    return ((advantage > 0) & (rho <= 1 + high)) | ((advantage < 0) & (rho >= 1 - low))


@objective
def ppo_clip(
    logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    *,
    low: Fraction = 0.2,
    high: NonNegative = 0.2,
    dual: AtLeastOne | None = None,
) -> Tensor:
    r"""PPO's clipped surrogate; GRPO and DAPO offline: $w_t = A \rho_t \, 1[\rho_t \text{ is not clipped}]$.

    Why: the importance-sampled policy gradient, silent where a step in its direction has gone far enough:
    $\rho > 1 + \epsilon_h$ for $A > 0$, $\rho < 1 - \epsilon_l$ for $A < 0$. `dual` also silences $A < 0$ beyond
    that ratio, where the weight is large.
    Limits: at $\pi = \mu$ it is reinforce; with a clip beyond every ratio, tis times reinforce. GRPO is the
    advantage with group_mean and group_std; DAPO has high = 0.28 and normalize: token.
    Negative rewards: bounded below the ratio $1 - \epsilon_l$, where they stop; without `dual` a token that the
    policy likes far more than the data did weighs up to $e^{20} |A|$.
    Reference: arXiv 1707.06347, eq. 7; dual clip arXiv 1912.09729, usually 3 (10 in PSFT, 4 in INTELLECT-2's).
    Failures: on old data most tokens are outside the clip and little is learnt (TOPR, arXiv 2503.14286).
    """
    rho = ratio(logp, behavior_logp)
    active = unclipped(rho, advantage, low, high)
    if dual is not None:
        active = active & ((advantage > 0) | (rho <= dual))
    return advantage * rho * active


@objective
def cispo(logp: Tensor, behavior_logp: Tensor, advantage: Tensor, *, cap: Positive = 5.0) -> Tensor:
    r"""CISPO with an absolute cap: $w_t = A \min(\rho_t, c)$.

    Why: truncates the weight and keeps the gradient of every token, where PPO's clip drops it.
    Limits: at $\pi = \mu$ it is reinforce; it is [tis, reinforce] at the same cap.
    Negative rewards: vanish as $\rho \to 0$.
    Reference: arXiv 2506.13585; the cap of 5 as in TRL and Liger.
    Warning: verl bounds the ratio to [1 - eps_low, 1 + eps_high] under the same name: that is cispo_clip.
    """
    return advantage * bounded_exp(logp - behavior_logp, cap)


@objective
def cispo_clip(
    logp: Tensor, behavior_logp: Tensor, advantage: Tensor, *, low: Fraction = 0.2, high: NonNegative = 0.2
) -> Tensor:
    r"""CISPO with a relative clip: $w_t = A \, \mathrm{clamp}(\rho_t, 1 - \epsilon_l, 1 + \epsilon_h)$.

    Why: cispo as verl has it, with a floor as well.
    Limits: at $\pi = \mu$ it is reinforce; with both epsilons 0 too, whatever the policy.
    Negative rewards: never below the weight $(1 - \epsilon_l) A$: not tapered, so they push without bound.
    Reference: arXiv 2506.13585, as in verl.
    Warning: TRL and Liger cap the ratio at an absolute 5 under the same name: that is cispo.
    """
    return advantage * bounded_exp(logp - behavior_logp, 1 + high, 1 - low)


@objective
def gspo(
    logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    low: Fraction = 3e-4,
    high: NonNegative = 4e-4,
) -> Tensor:
    r"""Group sequence policy optimisation: $w = A s \, 1[s \text{ is not clipped}]$, $s = (\prod_t \rho_t)^{1/|y|}$.

    Why: PPO's clip on the geometric-mean ratio of the sequence: a whole completion is in or out, and one
    freak token cannot dominate.
    Limits: at $\pi = \mu$ it is reinforce; for one token it is ppo_clip.
    Negative rewards: as in ppo_clip, by sequence.
    Reference: arXiv 2507.18071; with normalize: sequence.
    """
    s = bounded_exp(mean_log_ratio(logp, behavior_logp, mask), math.exp(MAX_LOG_RATIO))
    return advantage * s * unclipped(s, advantage, low, high)


@objective
def gmpo(logp: Tensor, behavior_logp: Tensor, advantage: Tensor, mask: Tensor, *, width: Positive = 0.4) -> Tensor:
    r"""Geometric-mean policy optimisation: $w_t = A \, g \, 1[\rho_t \text{ is not clipped}]$.

    Why: g is the geometric mean of the clipped token ratios: gspo with PPO's clip on each token's log ratio, at
    plus width to gain and minus width to lose.
    Limits: at $\pi = \mu$ it is reinforce; for one token it is ppo_clip with clips $e^{\pm width}$.
    Negative rewards: tokens below the clip rest.
    Reference: arXiv 2507.20673; with normalize: sequence.
    """
    log_rho = logp - behavior_logp
    gains = advantage > 0
    kept = torch.where(gains, log_rho.clamp(max=width), log_rho.clamp(min=-width))
    active = torch.where(gains, log_rho <= width, log_rho >= -width)
    return advantage * seq_mean(kept, mask).clamp(max=MAX_LOG_RATIO).exp() * active


@objective
def sapo(
    logp: Tensor, behavior_logp: Tensor, advantage: Tensor, *, gain: Positive = 1.0, loss: Positive = 1.05
) -> Tensor:
    r"""Soft adaptive policy optimisation: $w_t = 4 A \rho_t \sigma(x) \sigma(-x)$, $x = \tau (\rho_t - 1)$.

    Why: PPO's clip as a smooth gate; $\tau$ is `gain` for $A > 0$ and the larger `loss` for the rest, so that
    tokens being pushed down are let go sooner.
    Limits: at $\pi = \mu$ it is reinforce for any temperature; $w / (A \rho)$ is symmetric in $\rho - 1$.
    Negative rewards: vanish as $\rho \to 0$ and as $\rho \to \infty$.
    Reference: arXiv 2511.20347.
    """
    rho = ratio(logp, behavior_logp)
    x = by_sign(advantage > 0, gain, loss, rho) * (rho - 1)
    return 4 * advantage * rho * x.sigmoid() * (-x).sigmoid()


@objective
def vespo(
    logp: Tensor,
    behavior_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    gain_power: NonNegative = 2.0,
    gain_decay: NonNegative = 3.0,
    loss_power: NonNegative = 3.0,
    loss_decay: NonNegative = 2.0,
) -> Tensor:
    r"""VESPO: $w = A \, W^k e^{\lambda (1 - W)}$, $W = \prod_t \rho_t$.

    Why: shapes the ratio of the whole sequence by a gamma kernel instead of clipping it; $k, \lambda$ are the
    `gain_*` settings for $A \ge 0$ and the `loss_*` settings for $A < 0$. Largest at $W = k / \lambda$.
    Limits: at $\pi = \mu$ it is reinforce. k = 1, lambda = 0 is sequence_is times reinforce.
    Negative rewards: vanish as $W \to 0$ (and, if lambda > 0, as $W \to \infty$).
    Reference: arXiv 2602.10693; $\log W$ is held in [ln 1e-8, 20] as in TRL.
    """
    log_ratio = sequence_log_ratio(logp, behavior_logp, mask).clamp(math.log(1e-8), MAX_LOG_RATIO)
    gains = advantage >= 0
    power = by_sign(gains, gain_power, loss_power, log_ratio)
    decay = by_sign(gains, gain_decay, loss_decay, log_ratio)
    return advantage * (power * log_ratio + decay * (1 - log_ratio.exp())).clamp(max=MAX_LOG_RATIO).exp()


@objective
def off_policy_mask(
    logp: Tensor, behavior_logp: Tensor, advantage: Tensor, mask: Tensor, *, delta: NonNegative = 0.5
) -> Tensor:
    r"""Off-policy sequence masking, a factor: $w = 0$ if $A < 0$ and $\mathrm{mean}_t(-\log \rho_t) > \delta$, else 1.

    Why: a bad completion that the policy would hardly write any more has nothing left to teach, and pushes where
    nothing holds. It reads the sign of the advantage alone, so it multiplies: [off_policy_mask, ppo_clip].
    Limits: at $\pi = \mu$, or delta beyond every gap, it is 1; topr_geometric with a step in place of the taper.
    Negative rewards: dropped whole once the policy has left them by delta nats per token.
    Reference: DeepSeek-V3.2, as in TRL, from which delta is.
    """
    gone = (advantage < 0) & (-mean_log_ratio(logp, behavior_logp, mask) > delta)
    return (~gone).to(logp.dtype)


@objective
def topr(logp: Tensor, behavior_logp: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
    r"""Tapered off-policy REINFORCE: $w = r$ if $r > 0$, else $r \min(\prod_t \rho_t, 1)$.

    Why: positives are imitated whoever wrote them, as in SFT; negatives matter only while the policy would
    still write them. No clip to tune, no baseline, no KL.
    Limits: all $r \ge 0$: raft. At $\pi = \mu$: the raw reward.
    Negative rewards: the way to use them: the weight falls with the sequence's own ratio, so logits move as
    -log t, not -t.
    Reference: arXiv 2503.14286, with its canonical limits (a+ = b+ = b- = 1, a- = 0); rewards +1 and -1.
    Warning: verl's recipe has the length-normalised ratio and the sign of the advantage: topr_geometric.
    Results: best with 10-20 % of effective positives; worse above 50 %.
    """
    return torch.where(reward > 0, reward, reward * bounded_exp(sequence_log_ratio(logp, behavior_logp, mask), 1.0))


@objective
def topr_geometric(logp: Tensor, behavior_logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    r"""TOPR per token: $w = A$ if $A > 0$, else $A \min((\prod_t \rho_t)^{1/|y|}, 1)$.

    Why: topr with the geometric mean, which does not vanish with the length of the completion.
    Limits: for one token, and the advantage as reward, topr.
    Negative rewards: taper with the mean ratio per token, much later than in topr.
    Reference: verl's recipe for arXiv 2503.14286; not that paper's estimator.
    """
    return torch.where(
        advantage > 0, advantage, advantage * bounded_exp(mean_log_ratio(logp, behavior_logp, mask), 1.0)
    )


@objective
def nft(
    logp: Tensor,
    behavior_logp: Tensor,
    reward: Tensor,
    group_mean: Tensor,
    *,
    negative: NonNegative = 1.0,
    floor: Positive = 1.0,
    prompts: Literal["even", "linear", "sqrt"] = "even",
) -> Tensor:
    r"""Negative-aware fine-tuning: $w_t = c_q$ if right, else $-c_q \, r_q \rho_t / ((1 - r_q) \max(n_t, \epsilon))$.

    Why: wrong answers are maximum likelihood too, of the implicit negative policy with the ratio
    $n_t = (1 - r_q \rho_t) / (1 - r_q)$; $r_q$ is the prompt's success rate, held in [0.02, 0.98].
    `prompts` weighs prompts: $c_q = 1$, $1 - r_q$ (linear) or $\sqrt{(1 - r_q) / r_q}$ (sqrt).
    Limits: negative = 0 is filtered_bc. At $\pi = \mu$ with sqrt it is GRPO's standardised advantage, exactly.
    Negative rewards: rewards are read as right (> 0.5) or wrong; wrong ones vanish as $\rho \to 0$.
    Reference: arXiv 2505.18116; epsilon floors $n_t$ in the value while its gradient passes, as in the code.
    Warning: the success rate is the mean reward of the group: give rewards of 0 and 1. The default floor of 1 is
    ours: it never lets a wrong token weigh more than it does at the policy that wrote it, times its ratio.
    """
    rate = group_mean.clamp(0.02, 0.98)
    rho = ratio(logp, behavior_logp)
    implicit = (1 - rate * rho) / (1 - rate)
    wrong = -negative * rate * rho / ((1 - rate) * implicit.clamp(min=floor))
    factor = {"even": torch.ones_like(rate), "linear": 1 - rate, "sqrt": ((1 - rate) / rate).sqrt()}[prompts]
    return factor * torch.where(reward > 0.5, 1.0, wrong)
