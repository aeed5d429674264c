"""What the data alone decide of the weights: rows of weight zero, and functions that tell no two rows apart."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rwft.data.columns import spans
from rwft.data.prepare import Prepared
from rwft.errors import ConfigError
from rwft.temperature import data_weights
from rwft.weighting import Factor, Objective

PAIRWISE = "rwft.objectives.preference"  # of its functions, those that read the group see pairs alone


def zero_weight_rows(objective: Objective, data: Prepared) -> NDArray[np.bool_]:
    """`(n)`: rows whose weight is zero whatever the policy: a factor that reads row-level data, or pairs, says so."""
    zero = np.zeros(len(data.train), dtype=bool)
    if any(map(sees_pairs, objective.factors)):
        zero |= unpaired(data.train.reward, data.train.group)
    if data.credit is None or data.credit.config.steps != "none":
        return zero
    known = data.known(data.train)
    signals = {
        name: torch.as_tensor(value)[:, None] if value.ndim else torch.as_tensor(value) for name, value in known.items()
    }
    for factor in objective.factors:
        if factor.entry.reads and set(factor.entry.reads) <= signals.keys():
            for part in spans(len(zero)):
                here = {name: value[part] if value.ndim else value for name, value in signals.items()}
                zero[part] |= (Objective((factor,))(here) == 0).expand(len(zero[part]), 1).squeeze(1).numpy()
    return zero


def sees_pairs(factor: Factor) -> bool:
    """Whether a row that no row of its group is preferred to, or preferred over, weighs zero under it."""
    return factor.entry.function.__module__ == PAIRWISE and "group" in factor.entry.reads


def unpaired(reward: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`(n), (n) -> (n)`: rows without another of their group that has a different reward."""
    _, number = np.unique(group, return_inverse=True)
    low, high = np.full(len(group), np.inf), np.full(len(group), -np.inf)
    np.minimum.at(low, number, reward)
    np.maximum.at(high, number, reward)
    return (low == high)[number]


def refuse_all_zero(objective: Objective, data: Prepared) -> NDArray[np.bool_]:
    """`zero_weight_rows`. Raises ConfigError if they are all there are."""
    zero = zero_weight_rows(objective, data)
    if zero.all():
        pairs = any(map(sees_pairs, objective.factors)) and unpaired(data.train.reward, data.train.group).all()
        why = " (no two rows of a group differ in reward, so there is no pair)" if pairs else ""
        raise ConfigError(
            f"objective '{objective}': every one of the {len(zero)} rows has weight zero{why}; nothing to learn"
        )
    return zero


def undistinguished(objective: Objective, data: Prepared) -> list[str]:
    """A line for each factor that reads data and yet gives every row one weight, or has every row on one side."""
    lines: list[str] = []
    for factor in objective.factors:
        weights = data_weights(Objective((factor,)), data) if factor.entry.reads else None
        if weights is not None and len(weights) > 1 and weights[0] != 0 and (weights == weights[0]).all():
            sft = "this is sft" if len(objective.factors) == 1 else "it changes nothing"
            times = "" if weights[0] == 1 else f" times {weights[0]:.4g}"
            lines.append(f"note: all weights of '{factor}' are equal, by data alone: {sft}{times}")
        if weights is None and factor.entry.origin == "built in" and {"reward", "threshold"} <= names(factor):
            lines += _one_side(factor, data.train.reward)
    return lines


def names(factor: Factor) -> set[str]:
    """What it reads, and its settings."""
    return {*factor.entry.reads, *factor.settings}


def _one_side(factor: Factor, reward: NDArray[np.float64]) -> list[str]:
    """A line if the threshold of kto or unlikelihood, which count rewards above it as good, parts no rows."""
    threshold = factor.settings["threshold"]
    above = int((reward > threshold).sum())
    if 0 < above < len(reward):
        return []
    side = "above" if above else "at or below"
    return [
        f"note: the rewards of all {len(reward)} rows lie {side} the threshold {threshold:g} of '{factor}' "
        f"({reward.min():.4g} to {reward.max():.4g}), so that all count as {'good' if above else 'bad'}"
    ]
