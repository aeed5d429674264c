r"""Weights that grow with the reward, never negative: filters and exponentials."""

from __future__ import annotations

import torch
from torch import Tensor

from rwft.bounds import Positive, PositiveFraction
from rwft.objectives.logspace import bounded_exp
from rwft.weighting import objective


@objective
def filtered_bc(reward: Tensor, *, threshold: float = 0.5) -> Tensor:
    r"""Filtered behaviour cloning, rejection fine-tuning: $w = 1[r \ge c]$.

    Why: SFT on what succeeded. A lower bound of the expected reward when rewards are 0 or 1.
    Limits: a threshold below every reward is SFT; the limit of rwr as its temperature goes to 0 is
    the filter at the highest reward.
    Negative rewards: their rows are dropped.
    Reference: RFT, arXiv 2308.01825; RAFT, arXiv 2304.06767; percentile behaviour cloning, arXiv 2106.01345. The
    default threshold is ours, for rewards of 0 and 1.
    Failures: early entropy collapse, as with every positive-only objective; with normalize: token the
    dropped rows still count in Z, which shrinks the step, not its direction.
    Results: Qwen2.5-Math-1.5B on own samples 23.97, with DFT as a second factor 35.43 (arXiv 2508.05629).
    """
    return (reward >= threshold).to(reward.dtype)


@objective
def top_fraction(reward_above: Tensor, *, keep: PositiveFraction = 0.1) -> Tensor:
    r"""Percentile behaviour cloning: $w = 1[r \text{ is among the best } k \text{ of the dataset}]$.

    Why: filtered_bc whose threshold is a quantile. A row is kept if less than the share `keep` of
    the dataset has a greater reward, so ties are kept together and the best rows are never lost.
    Limits: keep = 1 is SFT.
    Negative rewards: kept if they are among the best.
    Reference: percentile behaviour cloning of arXiv 2106.01345, there at 10 %.
    """
    return (reward_above < keep).to(reward_above.dtype)


@objective
def top_of_group(group_above: Tensor, *, keep: PositiveFraction = 0.25) -> Tensor:
    r"""Best of the prompt: $w = 1[r \text{ is among the best } k \text{ of its group}]$.

    Why: top_fraction within each prompt, so that hard prompts are not lost. Ties are kept together: a
    group in which all rewards are equal is kept whole.
    Limits: keep = 1 is SFT; keep = 1/n trains on the best of n (with its ties).
    Negative rewards: kept if they are among the best of their group.
    Reference: best-of-n distillation, RAFT, arXiv 2304.06767. The default share is ours.
    """
    return (group_above < keep).to(group_above.dtype)


@objective
def raft(reward: Tensor) -> Tensor:
    r"""RAFT as run in practice: $w = \max(r, 0)$.

    Why: the reward itself in place of an advantage, its negative part dropped.
    Limits: with rewards 0 or 1 it is filtered_bc.
    Negative rewards: dropped.
    Reference: arXiv 2304.06767; the weight is that of the Minimal-RL code, arXiv 2504.11343.
    """
    return reward.clamp(min=0)


@objective
def rwr(reward: Tensor, *, temperature: Positive = 1.0, clip: Positive = 20.0) -> Tensor:
    r"""Reward-weighted regression: $w = \min(e^{r/\tau}, c)$.

    Why: the M-step of maximising $\log E[e^{r/\tau}]$; the fixed point on tabular policies is
    $\mu(y) e^{r/\tau} / Z$, the best policy under a KL penalty to the data's own.
    Limits: temperature to infinity is SFT; to 0, after normalising, the best rows alone. Adding a constant
    to all rewards multiplies all weights: no change under normalize: weight, a larger step under the others.
    Negative rewards: turned down ($0 < w < 1$), never pushed away.
    Reference: Peters and Schaal, ICML 2007; the clip is AWR's.
    Warning: across prompts the raw exponential weighs easy prompts more than hard ones; awr with a group
    baseline, or rwr_group, does not.
    """
    return bounded_exp(reward / temperature, clip)


@objective
def rwr_max(reward: Tensor, reward_max: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    r"""Reward-weighted regression, shifted: $w = e^{(r - r_{\max})/\tau}$.

    Why: rwr divided by its largest weight over the dataset, so no weight exceeds 1 and none needs a clip.
    Limits: temperature to infinity is SFT, to 0 the best rows alone; a shift of all rewards changes nothing.
    Negative rewards: turned down, never pushed away.
    Reference: Peters and Schaal, ICML 2007; the shift is the usual one of a softmax.
    Warning: often taken over the mini-batch; here the maximum is the dataset's.
    """
    return bounded_exp((reward - reward_max) / temperature, 1.0)


@objective
def rwr_group(reward: Tensor, group: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    r"""Reward-weighted regression within a prompt: $w_i = n \, e^{r_i/\tau} / \sum_{j \in g} e^{r_j/\tau}$.

    Why: divides by $Z(x) = E_\mu[e^{r/\tau} | x]$, estimated on the prompt's own completions; every prompt then
    weighs the same (mean weight 1), however easy it is.
    Limits: temperature to infinity, equal rewards, or a prompt with one completion: SFT. To 0: the best of
    each prompt. A shift of a prompt's rewards changes nothing.
    Negative rewards: turned down, never pushed away.
    Reference: the exponential policy of arXiv 1910.00177, with Z(x) kept.
    """
    same = group[:, None] == group[None, :]
    scores = (reward / temperature).transpose(0, 1).where(same, -torch.inf)
    share = (reward / temperature - scores.logsumexp(dim=1, keepdim=True)).exp()
    return share * same.sum(dim=1, keepdim=True)


@objective
def awr(advantage: Tensor, *, temperature: Positive = 1.0, clip: Positive = 20.0) -> Tensor:
    r"""Advantage-weighted regression: $w = \min(e^{A/\tau}, c)$.

    Why: rwr with a baseline, so that what counts is being better than expected. Which baseline is a
    setting of the data (`data.credit`; `value` takes a critic's from a column); without one the advantage is the
    reward and this is rwr.
    Limits: temperature to infinity is SFT; $w / c$ at temperature to 0 is crr_binary where $A \ne 0$.
    Negative rewards: below the baseline $w < 1$: turned down, never pushed away.
    Reference: arXiv 1910.00177; clip 20 as there.
    Warning: the paper's formula has the raw advantage; its code standardises over the buffer at temperature
    1 (here `credit: {baseline: mean, scale: std}`).
    """
    return bounded_exp(advantage / temperature, clip)


@objective
def crr_binary(advantage: Tensor) -> Tensor:
    r"""Critic-regularised regression, binary: $w = 1[A > 0]$.

    Why: behaviour cloning of what is better than expected.
    Limits: the limit of awr divided by its clip as the temperature goes to 0; with the reward less c as the
    advantage, filtered_bc but for rows exactly at c.
    Negative rewards: rows at or below the baseline are dropped.
    Reference: arXiv 2006.15134; $1[0] = 0$ as in the authors' code.
    """
    return (advantage > 0).to(advantage.dtype)


@objective
def crr_exp(advantage: Tensor, *, temperature: Positive = 1.0, clip: Positive = 20.0) -> Tensor:
    r"""Critic-regularised regression, exponential: $w = \min(e^{A/\beta}, c)$.

    Why: the same weight as awr; the two papers differ in where the advantage comes from (CRR: a learned
    $Q(x, y)$ less its mean over samples of the policy; AWR: returns less a value function).
    Limits: awr's.
    Negative rewards: turned down, never pushed away.
    Reference: arXiv 2006.15134; clip 20 as in the authors' code.
    """
    return bounded_exp(advantage / temperature, clip)
