"""The vocabulary that an objective may read, and the two reductions over time.

Axes: `b` sequences, `t` target positions (the prediction of token t+1 of the input). Every
signal reaches an objective detached, in float32 or better. A signal is provided only when
an objective in use names it. A new signal is one row here and the function that provides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["data", "credit", "head", "frozen model", "loop"]


@dataclass(frozen=True)
class Signal:
    """One row of the vocabulary: axes (alternatives separated by `|`), who provides it, what it is."""

    axes: str
    source: Source
    doc: str


SIGNALS: dict[str, Signal] = {
    "logp": Signal("b t", "head", "log-probability of the target token under the policy, in nats"),
    "mask": Signal("b t", "data", "1 where the target is trained, else 0; reading it means aggregating over time"),
    "entropy": Signal("b t", "head", "entropy of the policy's distribution at the position, in nats"),
    "concentration": Signal("b t", "head", "sum of the squared probabilities of the whole vocabulary at the position"),
    "topk_entropy": Signal("b t", "head", "entropy, in nats, of the 20 most probable tokens renormalised to sum 1"),
    "log_vocab": Signal("", "head", "log of the size of the vocabulary: the largest entropy there is, in nats"),
    "reward": Signal("b 1", "data", "raw reward of the sequence"),
    "token_weight": Signal("b t", "data", "weights that the data give to messages or spans (1 where they give none)"),
    "behavior_logp": Signal("b t", "data", "log-probability under the behaviour policy that wrote the completion"),
    "advantage": Signal("b 1 | b t", "credit", "what credit assignment made of the reward"),
    "group_mean": Signal("b 1", "credit", "mean reward of the prompt's group"),
    "group_std": Signal("b 1", "credit", "standard deviation (over n) of the rewards of the prompt's group"),
    "group_above": Signal("b 1", "credit", "fraction of the prompt's group with a greater reward; 0 for the best"),
    "reward_above": Signal("b 1", "credit", "fraction of the dataset with a greater reward; 0 for the best"),
    "reward_max": Signal("", "credit", "greatest reward of the dataset"),
    "group": Signal("b", "data", "integer id of the prompt's group; reading it puts whole groups in a micro-batch"),
    "ref_logp": Signal("b t", "frozen model", "log-probability under the reference policy"),
    "aux_logp": Signal("b t", "frozen model", "log-probability under a second frozen model"),
    "ref_nll_median": Signal("", "frozen model", "median over the dataset of sequence-mean NLL under the reference"),
    "ref_nll_z": Signal("b 1", "frozen model", "z-score over the dataset of sequence-mean NLL under the reference"),
    "old_logp": Signal("b t", "loop", "log-probability under the policy at its last snapshot"),
    "kl_running": Signal("", "loop", "running mean of a sequence's log ratio of the policy to the reference, in nats"),
    "progress": Signal("", "loop", "fraction of the run that is done, 0 to 1"),
}
"""Name -> signal. The order is the order of the documentation."""


def seq_sum(x: Tensor, mask: Tensor) -> Tensor:
    """`(b t), (b t) -> (b 1)`: sum over trained positions; anything under mask 0 is ignored."""
    return x.where(mask > 0, 0.0).sum(dim=1, keepdim=True)


def seq_mean(x: Tensor, mask: Tensor) -> Tensor:
    """`(b t), (b t) -> (b 1)`: mean over trained positions; 0 for a sequence that has none."""
    return seq_sum(x, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1)
