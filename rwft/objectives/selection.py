r"""Weights 0 or 1 on tokens, and weights that the data bring along."""

from __future__ import annotations

import torch
from torch import Tensor

from rwft.bounds import PositiveFraction
from rwft.objectives.logspace import mean_log_ratio
from rwft.weighting import objective


def top_tokens(score: Tensor, mask: Tensor, keep: float) -> Tensor:
    """`(b t), (b t) -> (b t)`: 1 at the share `keep` of each sequence's trained tokens with the highest score.

    The number is rounded, and at least 1; between equal scores the earlier token is taken.
    """
    trained = mask > 0
    order = score.where(trained, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    number = (keep * trained.sum(dim=1, keepdim=True)).round().clamp(min=1)
    return ((rank < number) & trained).to(score.dtype)


@objective
def rho1(logp: Tensor, ref_logp: Tensor, mask: Tensor, *, keep: PositiveFraction = 0.6) -> Tensor:
    r"""Selective language modelling: $w_t = 1[\log \pi_{ref} - \log \pi \text{ is in the sequence's top } k]$.

    Why: train the tokens that a reference model trained on clean data knows better than the policy does.
    Limits: keep = 1 is SFT. At the start, if the reference is the policy, all scores tie and the first
    tokens of a sequence are kept.
    Negative rewards: not read.
    Reference: arXiv 2404.07965.
    Warning: the paper takes the top k of the batch; ours is of each sequence, so that rows do not see each
    other. `reference:` must name the model trained on clean data.
    """
    return top_tokens(ref_logp - logp, mask, keep)


@objective
def token_cleaning(ref_logp: Tensor, aux_logp: Tensor, mask: Tensor, *, keep: PositiveFraction = 0.6) -> Tensor:
    r"""Token cleaning: $w_t = 1[\log \pi_{aux} - \log \pi_{ref} \text{ is in the sequence's top } k]$.

    Why: rho1 with the policy replaced by its fixed starting point: what training on clean data (aux) has
    made more probable than it was (ref). The selection never changes, so it can be cached.
    Limits: keep = 1 is SFT; rho1 with the policy frozen at its start.
    Negative rewards: not read.
    Reference: arXiv 2502.01968; per sequence as in the command line of its code.
    Warning: the paper's scripts take the top k of the whole dataset: write those 0/1 weights into the data
    and use critical_token.
    """
    return top_tokens(aux_logp - ref_logp, mask, keep)


@objective
def critical_token(token_weight: Tensor) -> Tensor:
    r"""Weights that the data give: $w_t = m_t$, of a message or span.

    Why: whatever an offline pass found, a verifier marked or a person wrote can be a weight. With 0 and 1
    it is critical-token fine-tuning: train a token only if replacing it breaks the answer.
    Limits: data without weights is SFT.
    Negative rewards: negative weights are used as they are, and push away without bound.
    Reference: arXiv 2510.10974 (the mask comes from generation, outside of this library).
    Results: Qwen2.5-3B on MATH: base 34.6, SFT with LoRA 41.9, on critical tokens alone 49.0.
    """
    return token_weight


@objective
def tail_sft(logp: Tensor, ref_logp: Tensor, mask: Tensor, *, max_gain: float = 0.5) -> Tensor:
    r"""TailSFT: $w = 1[\mathrm{mean}_t(\log \pi - \log \pi_{ref}) \le g]$.

    Why: stop training a sequence once it has gained g nats per token; effort goes to what lags behind. The
    opposite of iw_sft, which pulls harder on what has moved.
    Limits: g to infinity, or the policy at its start with g >= 0, is SFT.
    Negative rewards: not read.
    Reference: arXiv 2608.25756.
    Warning: the paper drops the quarter of the batch that gained most; ours is a threshold, so that rows do not
    see each other. Its default is ours.
    Failures: one independent try, in marin, found no gain after later reinforcement learning.
    """
    return (mean_log_ratio(logp, ref_logp, mask) <= max_gain).to(logp.dtype)
