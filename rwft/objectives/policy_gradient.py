r"""Signed weights: offline policy gradients with a baseline, a shape or a floor, but without a behaviour policy."""

from __future__ import annotations

import torch
from torch import Tensor

from rwft.bounds import Count, Fraction, NonNegative, Positive
from rwft.objectives.logspace import bounded_exp, sequence_log_ratio
from rwft.weighting import objective


@objective
def reinforce(advantage: Tensor) -> Tensor:
    r"""Offline REINFORCE: $w = A$.

    Why: the policy gradient, with the data's policy in place of one's own. Baselines are a setting of the
    data: `credit: {baseline: leave_one_out}` is RLOO, `{baseline: group_mean, scale: group_std}` GRPO,
    `{baseline: group_mean}` Dr. GRPO (with normalize: sequence_sum), `{baseline: length_weighted}` OPO.
    Limits: without credit settings $w = r$. On-policy a constant baseline changes the variance only;
    offline it changes the optimum, by $c (\mu - \pi)$ in the logits' gradient.
    Negative rewards: pushed away without bound: logits fall linearly, the loss to minus infinity. Use
    [dft, reinforce], topr or asymre, or keep the share of negatives small.
    Reference: Williams 1992; arXiv 2402.14740 (RLOO), 2402.03300 (GRPO), 2503.20783 (Dr. GRPO), 2505.23585 (OPO).
    Failures: collapse when negatives dominate (TOPR, arXiv 2503.14286, and AsymRE, arXiv 2506.20520).
    """
    return advantage


@objective
def reinforce_rej(reward: Tensor, group_std: Tensor) -> Tensor:
    r"""Reinforce-Rej: $w = r \, 1[\sigma_g > 0]$.

    Why: drops prompts that are always right or always wrong, which was found to be most of GRPO's gain.
    Limits: where every group is mixed, the raw reward.
    Negative rewards: pushed away without bound, as in reinforce.
    Reference: arXiv 2504.11343.
    """
    return reward * (group_std > 0)


@objective
def asymre(reward: Tensor, group_mean: Tensor, *, shift: float = -0.1) -> Tensor:
    r"""Asymmetric REINFORCE: $w = r - (\bar r_g + \delta V)$.

    Why: no ratio, no clip: a baseline a little below the group's mean keeps the data's positive part ahead of
    its negative one.
    Limits: $\delta V \to -\infty$ is SFT (after dividing by it); 0 is reinforce with group_mean. On a bandit with V
    below the mean the limit is $(\mu (r - V) - \tau)_+ / (V^\mu - V)$; from the mean on the support collapses.
    Negative rewards: pushed away, outweighed by the rest if the shift is negative.
    Reference: arXiv 2506.20520; rewards +1 and -1, shift -0.1.
    Failures: a shift of 0 or more collapsed in all of the paper's runs.
    """
    return reward - group_mean - shift


@objective
def gft(logp: Tensor, advantage: Tensor, *, threshold: Fraction = 0.5) -> Tensor:
    r"""Group fine-tuning: $w_t = A \, C(p_t)$, $C(p) = p$ if $p < \tau$ else 1.

    Why: DFT's rectification only where it matters, on improbable tokens, and a group advantage on top.
    Limits: threshold 0 is reinforce; 1 is [dft, reinforce] (but for p = 1). Standardised groups of one weigh 0.
    Negative rewards: bounded: the weight vanishes as $p \to 0$.
    Reference: arXiv 2604.14258; the advantage is `credit: {baseline: group_mean, scale: group_std}`.
    Warning: the paper's eq. 17 and 22 have a spurious $1/\pi$ in the gradient; the weight here is its algorithm's.
    The text does not give the threshold; the default is ours.
    Results: Qwen2.5-Math-1.5B on MATH: SFT 60.66, DFT 64.35, GRPO 65.97, GFT 70.50.
    """
    p = logp.exp()
    return advantage * p.where(p < threshold, 1.0)


@objective
def luffy(logp: Tensor, advantage: Tensor, *, gamma: Positive = 0.1) -> Tensor:
    r"""LUFFY's policy shaping: $w_t = A \, \gamma p_t / (p_t + \gamma)^2$.

    Why: the gradient of $A \, p / (p + \gamma)$: off-policy data with the behaviour's probability taken as 1, shaped
    so that improbable but crucial tokens of a demonstration count.
    Limits: $\gamma \to \infty$: $\gamma w \to A p$, rescaled DFT; largest at $p = \gamma$, A/4.
    Negative rewards: bounded: the weight vanishes as $p \to 0$.
    Reference: arXiv 2504.14945; gamma 0.1.
    """
    p = logp.exp()
    return advantage * gamma * p / (p + gamma).square()


def future(quality: Tensor, after_end: float, horizon: int, discount: float) -> Tensor:
    r"""`(b t) -> (b t)`: $\sum_{k=0}^{K} \gamma^k f_{t+k}$, with `after_end` in place of what lies beyond the row."""
    steps = torch.arange(horizon + 1, dtype=quality.dtype, device=quality.device)
    ahead = torch.nn.functional.pad(quality, (0, horizon), value=after_end).unfold(1, horizon + 1, 1)
    return (ahead * discount**steps).sum(dim=-1)


def to_go(reward: Tensor, mask: Tensor, discount: float) -> Tensor:
    r"""`(b t), (b t) -> (b t)`: $\sum_{j \ge t} \gamma^{j-t} r_j$ over trained tokens, which alone are counted.

    By doubling: sums over 1, 2, 4, ... positions, each with the discount of the positions that it spans.
    """
    trained = mask > 0
    total, decay = reward.where(trained, 0.0), torch.ones_like(reward).where(~trained, discount)
    for span in (2**power for power in range(reward.shape[1].bit_length())):
        total = total + decay * torch.nn.functional.pad(total, (0, span))[:, span:]
        decay = decay * torch.nn.functional.pad(decay, (0, span))[:, span:]
    return total


@objective
def implicit_reward(
    aux_logp: Tensor, ref_logp: Tensor, mask: Tensor, *, beta: Positive = 0.05, discount: Fraction = 1.0
) -> Tensor:
    r"""Rewards of a preference-trained model: $w_t = \sum_{j \ge t} \gamma^{j-t} \beta \log (\pi_\phi / \pi_{ref})_j$.

    Why: a model trained by DPO from a reference is a reward model, $\beta \log \pi_\phi / \pi_{ref}$ up to a number per
    prompt, and the sum over tokens says what each adds. The weight of a token is the discounted return of those
    rewards from it on: a policy gradient with dense credit from two frozen models, and no verdict on the data.
    Limits: discount 0 is the token's own reward; the auxiliary model equal to the reference trains nothing; at
    discount 1 the first token's weight is DPO's implicit reward of the completion.
    Negative rewards: wherever $\pi_\phi$ likes the rest less than the reference does, it pushes away without bound;
    [dft, implicit_reward] does not, and [tis, implicit_reward] corrects for who wrote the data.
    Reference: DPO, arXiv 2305.18290 (the reward); PRIME, arXiv 2502.01456 (per token; beta 0.05 as in its code).
    `auxiliary:` is the trained model, `reference:` the one that its training started from.
    Warning: PRIME adds the outcome's leave-one-out advantage, divides by the batch's largest return and trains
    $\pi_\phi$ beside the policy; here it is frozen, and the weight is the return alone.
    """
    return to_go(beta * (aux_logp - ref_logp), mask, discount)


@objective
def gold_s(
    old_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    floor: Fraction = 0.1,
    horizon: Count = 5,
    discount: Fraction = 1.0,
) -> Tensor:
    r"""GOLD with summed probabilities: $w_t = \max(\pi_{old}, u) \sum_{k=0}^{5} \gamma^k p_{MLE}(y_{t+k})$.

    Why: demonstrations as off-policy data. The policy's own probability stands in for the importance ratio,
    four years before DFT; the return asks how probable the future is under a maximum-likelihood model.
    Limits: horizon 0 would leave $p_{MLE}(y_t)$ alone; with a floor of 0, a return of 1 and a snapshot at every
    step, DFT.
    Negative rewards: not read. [gold_s, reinforce] uses them, tapered down to the floor.
    Reference: arXiv 2009.07839 (GOLD-s); the MLE model is `reference:`, the lagged policy the snapshot.
    Warning: the return is cut at 5 tokens as in the authors' code (the paper sums to the end); the default discount of
    1 is ours (what their scripts set was not found); tokens past the end
    or not trained count as p = 1. The code's smoothing term is not weighted; there is none here. TRL's GOLD
    is another method.
    """
    quality = ref_logp.where(mask > 0, 0.0).exp()
    return old_logp.exp().clamp(floor, 1) * future(quality, 1.0, horizon, discount)


@objective
def gold_p(
    old_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    baseline: float = -10.0,
    low: NonNegative = 1.0,
    floor: Fraction = 0.0,
    horizon: Count = 5,
    discount: Fraction = 1.0,
) -> Tensor:
    r"""GOLD with log-probabilities: $w_t = \max(\pi_{old}, u) \sum_{k=0}^{5} \gamma^k \max(\log p_{t+k} - b, c)$.

    Why: gold_s whose return is the product of the future's probabilities, in the log, above a baseline b. $p$ is
    $p_{MLE}(y)$ here.
    Limits: gold_s's; a return of 1 with a snapshot at every step is DFT.
    Negative rewards: not read; the return is at least c per token.
    Reference: arXiv 2009.07839 (GOLD-p); b = -10 and c = 1 as in the authors' code.
    Warning: as for gold_s.
    """
    quality = (ref_logp.where(mask > 0, 0.0) - baseline).clamp(min=low)
    return old_logp.exp().clamp(floor, 1) * future(quality, max(-baseline, low), horizon, discount)


@objective
def r_gold(logp: Tensor, reward: Tensor, *, floor: Fraction = 0.1) -> Tensor:
    r"""GOLD with a sequence reward: $w_t = r \max(p_t, u)$.

    Why: DFT with rewards and a floor.
    Limits: floor 0 is DFT times the reward; floor 1 the raw reward.
    Negative rewards: not tapered below the floor: they push without bound.
    Reference: the baseline R-GOLD of arXiv 2305.14718.
    """
    return reward * logp.exp().clamp(min=floor)


@objective
def a_lol(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, *, clip: Fraction = 0.9) -> Tensor:
    r"""Advantage-leftover-lunch: $w = \max(A, 0) \, \mathrm{clamp}(\pi(y) / \pi_{ref}(y), 1 - \epsilon, 1 + \epsilon)$.

    Why: one action per completion: its advantage, if positive, times the clipped importance weight of the whole
    sequence, K, against the reference.
    Limits: clip 0, or the policy at its start, is a_lol_ref_free.
    Negative rewards: rows with a negative advantage are dropped.
    Reference: arXiv 2305.14718; epsilon 0.9 as in its code; with normalize: sequence_sum.
    Warning: the advantage should be the reward less a value of the prompt under the reference: a column of the data
    and `credit: {baseline: value}`, or the mean of the prompt's completions. Sampling rows by
    their advantage as well, as the code can, would weigh them by its square.
    Failures: for long completions K is at one of its bounds nearly always.
    """
    return advantage.clamp(min=0) * bounded_exp(sequence_log_ratio(logp, ref_logp, mask), 1 + clip, 1 - clip)


@objective
def a_lol_token(logp: Tensor, ref_logp: Tensor, advantage: Tensor, *, clip: Fraction = 0.9) -> Tensor:
    r"""A-LoL sequence: $w_t = \max(A, 0) \, \mathrm{clamp}(\pi / \pi_{ref}, 1 - \epsilon, 1 + \epsilon)$.

    Why: a_lol with the ratio of each token. The paper's name for it is A-LoL sequence.
    Limits: clip 0, or the policy at its start, is a_lol_ref_free.
    Negative rewards: rows with a negative advantage are dropped.
    Reference: arXiv 2305.14718, A-LoL seq.
    """
    return advantage.clamp(min=0) * bounded_exp(logp - ref_logp, 1 + clip, 1 - clip)


@objective
def a_lol_ref_free(advantage: Tensor) -> Tensor:
    r"""A-LoL without a reference: $w = \max(A, 0)$.

    Why: the positive part of the policy gradient; the paper's ablation without an importance weight.
    Limits: raft with an advantage in place of the reward.
    Negative rewards: rows with a negative advantage are dropped.
    Reference: arXiv 2305.14718, A-LoL ref-free.
    """
    return advantage.clamp(min=0)


@objective
def a_lol_kl(advantage: Tensor, *, beta: NonNegative = 0.0) -> Tensor:
    r"""A-LoL with its KL penalty: $w = (A - \beta) \, 1[A > 0]$.

    Why: the penalty $\beta (\log \pi - \log \pi_{ref})$ has the gradient of a constant: a shift of the advantage. It
    does not pull toward the reference.
    Limits: beta = 0 is a_lol_ref_free; where $A > \beta$ it is a_lol_ref_free with a larger baseline.
    Negative rewards: dropped; but rows with $0 < A < \beta$ get a negative weight.
    Reference: arXiv 2305.14718, A-LoL KL; beta 0 as in its code's default.
    """
    return (advantage - beta) * (advantage > 0)
