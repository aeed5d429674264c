r"""Residuals as weights: regression of the log ratio on rewards, signed and self-correcting.

Each weight is what a squared error leaves to explain, so it changes sign when the policy has gone far
enough: negative rewards need no clip here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwft.bounds import NonNegative, Positive
from rwft.objectives.logspace import sequence_log_ratio
from rwft.weighting import objective


def suffix_residual(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, beta: float) -> Tensor:
    r"""`(b t), (b t), (b 1 | b t), (b t) -> (b t)`: $A_t - \beta \sum_{j \ge t} \log k_j$ over trained tokens."""
    log_ratio = (logp - ref_logp).where(mask > 0, 0.0)
    return advantage - beta * log_ratio.flip(1).cumsum(1).flip(1)


@objective
def dro(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    r"""Direct reward optimisation: $w = \tau (A - \tau \log K)$, $\log K = \log \pi(y) - \log \pi_{ref}(y)$.

    Why: the best policy under a KL penalty satisfies $r = V + \tau \log K$ for every completion; the
    weight is the gradient of half the squared residual of that equation. Any data will do.
    Limits: zero on every completion exactly when $\pi = \pi_{ref} e^{(r - V)/\tau}$; at $\pi = \pi_{ref}$ it is
    reinforce times the temperature.
    Negative rewards: pushed until the log ratio accounts for them, then held.
    Reference: arXiv 2405.19107 (DRO-V), the policy's loss.
    Warning: the paper trains V beside the policy; here $A = r - V$ is the advantage, with the baseline of
    `data.credit` for V: `value`, if the data bring one per row, or a mean (the optimum's is a soft maximum, a
    little above it). Other methods are called DRO too; verl's is dro_token.
    """
    return temperature * (advantage - temperature * sequence_log_ratio(logp, ref_logp, mask))


@objective
def dro_token(logp: Tensor, behavior_logp: Tensor, advantage: Tensor, *, beta: NonNegative = 0.1) -> Tensor:
    r"""DRO by tokens: $w_t = A - \beta \log \rho_t$, $\rho_t = \pi / \mu$.

    Why: the gradient of $A \log \pi - \frac{\beta}{2} (\log \rho)^2$: reinforce with a spring on every token's log
    ratio to the behaviour policy, in place of a clip.
    Limits: beta = 0, or $\pi = \mu$, is reinforce; for one token, and the reference for $\mu$, it is dro at
    temperature beta, over beta.
    Negative rewards: pushed until $\log \rho = A / \beta$, then held.
    Reference: the loss `dro` of verl, which is not arXiv 2405.19107's (dro here).
    Warning: the default of beta is ours.
    """
    return advantage - beta * (logp - behavior_logp)


@objective
def a_star_po(
    logp: Tensor,
    ref_logp: Tensor,
    reward: Tensor,
    group: Tensor,
    mask: Tensor,
    *,
    value_temperature: Positive = 0.5,
    temperature: Positive = 1e-3,
) -> Tensor:
    r"""A*-PO: $w = 2 \beta_2 (r - V^* - \beta_2 \log K)$, $V^* = \beta_1 \log \mathrm{mean}_g e^{r/\beta_1}$.

    Why: dro whose value is the soft maximum of rewards over a prompt's completions, taken as samples of the
    reference.
    Limits: $\beta_1 \to \infty$: the group's mean; $\beta_1 \to 0$: its best reward. A lone row at $\pi = \pi_{ref}$
    weighs 0.
    Negative rewards: as in dro.
    Reference: arXiv 2505.20686.
    Warning: exact only if the group's completions were sampled from the reference. The temperatures are ours.
    """
    same = group[:, None] == group[None, :]
    scores = (reward / value_temperature).transpose(0, 1).where(same, -torch.inf)
    log_mean = scores.logsumexp(dim=1, keepdim=True) - same.sum(dim=1, keepdim=True).to(reward.dtype).log()
    residual = reward - value_temperature * log_mean - temperature * sequence_log_ratio(logp, ref_logp, mask)
    return 2 * temperature * residual


@objective
def oreo(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, *, beta: NonNegative = 0.03) -> Tensor:
    r"""OREO: $w_i = 2 \beta \sum_{t \le i} \delta_t$, $\delta_t = A_t - \beta \sum_{j \ge t} \log k_j$.

    Why: the soft Bellman equation of a KL-penalised policy, from every position to the end; $\log k_j$ is the log
    ratio of a token to the reference. A token's weight gathers the residuals of all suffixes it is in.
    Limits: for one token it is twice dro at temperature beta; beta = 0 trains nothing.
    Negative rewards: pushed until the log ratio accounts for them, then held.
    Reference: arXiv 2412.16145; its mean over positions is normalize: sequence.
    Warning: the paper trains $V_t$ beside the policy; here $A_t = r - V_t$ is the advantage: of the sequence (`credit:
    {baseline: value}` takes V from the data), or of positions if the data give step rewards (`{steps: own}`).
    """
    return 2 * beta * suffix_residual(logp, ref_logp, advantage, mask, beta).where(mask > 0, 0.0).cumsum(1)


@objective
def oreo_token(logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, *, beta: NonNegative = 0.03) -> Tensor:
    r"""OREO's DRO variant: $w_t = 2 \beta \delta_t$, $\delta_t = A_t - \beta \sum_{j \ge t} \log k_j$.

    Why: oreo with each residual credited to its own token alone; the rest of the suffix is held constant.
    Limits: for one token it is oreo; at $\pi = \pi_{ref}$ it is reinforce times twice beta.
    Negative rewards: pushed until the log ratio of the rest accounts for them, then held.
    Reference: arXiv 2412.16145, a variant in its code; its mean over positions is normalize: sequence.
    Warning: as for oreo, whose values the data must give.
    """
    return 2 * beta * suffix_residual(logp, ref_logp, advantage, mask, beta)
