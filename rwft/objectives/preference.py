r"""Preferences as weights: signed, and bounded by how far the pair is already apart.

Rows of a group answer one prompt; a row is preferred to every row of its group with a smaller reward. With
two rows that is the usual pair; with more, the mean over all pairs; ties and lone rows weigh 0. A row's
weight depends on its partners, so a group is never split over micro-batches. The losses of the papers are means
over pairs of sums over tokens: normalize: sequence_sum gives them (per sequence, half of it per pair).
"""

from __future__ import annotations

from torch import Tensor

from rwft.bounds import NonNegative, Positive
from rwft.objectives.logspace import by_sign, sequence_log_ratio
from rwft.weighting import objective


def preferred(reward: Tensor, group: Tensor) -> Tensor:
    """`(b 1), (b) -> (b b)`: whether row i is preferred to row j, within a group."""
    return (group[:, None] == group[None, :]) & (reward > reward.transpose(0, 1))


def pairs(wins: Tensor, group: Tensor) -> Tensor:
    """`(b b), (b) -> (b 1)`: the number of pairs in each row's group, at least 1."""
    same = (group[:, None] == group[None, :]).double()
    return (same @ wins.sum(dim=1, keepdim=True).double()).clamp(min=1)


def won_less_lost(strength: Tensor, wins: Tensor, group: Tensor) -> Tensor:
    """`(b b), (b b), (b) -> (b 1)`: strength of the pairs that a row wins less of those it loses, per pair."""
    kept = strength.where(wins, 0.0)
    return (kept.sum(dim=1, keepdim=True) - kept.sum(dim=0)[:, None]) / pairs(wins, group).to(strength.dtype)


def lead(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """`(b t), (b t), (b t) -> (b b)`: log ratio to the reference of row i less that of row j, in nats."""
    margin = sequence_log_ratio(logp, ref_logp, mask)
    return margin - margin.transpose(0, 1)


@objective
def dpo(logp: Tensor, ref_logp: Tensor, reward: Tensor, group: Tensor, mask: Tensor, *, beta: Positive = 0.1) -> Tensor:
    r"""Direct preference optimisation: $w = \pm \beta \sigma(-h)$, $h = \beta (\log K_w - \log K_l)$.

    Why: pulls the chosen completion and pushes the rejected one equally, as long as the implicit reward
    $\beta \log K = \beta \log \pi / \pi_{ref}$ does not rank them apart yet.
    Limits: the two weights sum to 0; $h \to \infty$: 0; $w / \beta \to \pm 1/2$ as beta goes to 0.
    Negative rewards: only their order counts. The rejected one is pushed without bound in its own
    likelihood, and the chosen one's may fall with it.
    Reference: arXiv 2305.18290, eq. 7 and the gradient after it.
    """
    wins = preferred(reward, group)
    return won_less_lost(beta * (-beta * lead(logp, ref_logp, mask)).sigmoid(), wins, group)


@objective
def ipo(logp: Tensor, ref_logp: Tensor, reward: Tensor, group: Tensor, mask: Tensor, *, beta: Positive = 0.1) -> Tensor:
    r"""Identity preference optimisation: $w = \pm 2 (1 / 2\beta - (\log K_w - \log K_l))$.

    Why: regresses the lead of the chosen completion to $1 / 2\beta$ nats instead of driving it to infinity.
    Limits: zero at that lead, and of the other sign beyond it.
    Negative rewards: only their order counts.
    Reference: arXiv 2310.12036, eq. 17.
    Warning: some codes use the mean log ratio per token; here it is the sum, as in the paper.
    """
    wins = preferred(reward, group)
    return won_less_lost(2 * (0.5 / beta - lead(logp, ref_logp, mask)), wins, group)


@objective
def rpo(
    logp: Tensor,
    ref_logp: Tensor,
    reward: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 1.0,
) -> Tensor:
    r"""Iterative reasoning preference optimisation: $w = w_{dpo} + 1[\text{chosen}] \, \alpha / |y|$.

    Why: the likelihood term keeps the chosen completion from losing probability along with the rejected one.
    Limits: alpha = 0 is dpo.
    Negative rewards: only their order counts.
    Reference: arXiv 2404.19733. Other papers call other losses RPO. The default alpha is ours.
    """
    wins = preferred(reward, group)
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    share = wins.sum(dim=1, keepdim=True) / pairs(wins, group).to(logp.dtype)
    return dpo(logp, ref_logp, reward, group, mask, beta=beta) + alpha * share / length


@objective
def treg(
    logp: Tensor,
    ref_logp: Tensor,
    reward: Tensor,
    advantage: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.25,
) -> Tensor:
    r"""T-REG, token rewards beside DPO: $w_t = w_{dpo} + \alpha \sigma(-h) \beta \hat r_t$ on both completions.

    Why: lets a signed token reward $\hat r_t$ say which tokens of a completion its preference is about.
    Limits: alpha = 0, or token rewards of 0, is dpo.
    Negative rewards: a negative token reward pushes its token away, in the chosen completion too.
    Reference: arXiv 2412.02685. There $\hat r_t$ is a sigmoid less 1/2 of the log ratio between the model prompted
    for a better and a worse answer; here it is the advantage, with `credit: {steps: own}` on span rewards.
    """
    wins = preferred(reward, group)
    doubt = (-beta * lead(logp, ref_logp, mask)).sigmoid().where(wins, 0.0)
    doubts = (doubt.sum(dim=1, keepdim=True) + doubt.sum(dim=0)[:, None]) / pairs(wins, group).to(logp.dtype)
    return dpo(logp, ref_logp, reward, group, mask, beta=beta) + alpha * beta * doubts * advantage


@objective
def kto(
    logp: Tensor,
    ref_logp: Tensor,
    reward: Tensor,
    kl_running: Tensor,
    mask: Tensor,
    *,
    beta: Positive = 0.1,
    threshold: float = 0.0,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Tensor:
    r"""Kahneman-Tversky optimisation: $w = \pm \lambda \beta \sigma(u) \sigma(-u)$, $u = \beta (\log K - z_0)$.

    Why: no pairs: a completion is desirable ($r > c$) or not, and gain or loss is felt against a reference
    point $z_0$, with the effect fading on both sides of it.
    Limits: largest at $u = 0$, $\beta \lambda / 4$; even in u.
    Negative rewards: pushed away, ever less as they fall below the reference point. Bounded.
    Reference: arXiv 2402.01306.
    Warning: the paper estimates $z_0$ on mismatched pairs of the batch; ours is the running mean log ratio of
    the run, so that rows do not see each other, and is never below 0, as in the paper.
    """
    u = beta * (sequence_log_ratio(logp, ref_logp, mask) - kl_running.clamp(min=0))
    side = by_sign(reward > threshold, desirable, -undesirable, u)
    return side * beta * u.sigmoid() * (-u).sigmoid()
