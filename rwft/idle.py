"""Rows that teach nothing: those whose weight is zero by data alone, whatever the policy, and what would change that.

Rows that a factor of row-level data alone puts at zero are known for certain, and are not forwarded
(`rwft.data_alone.zero_weight_rows`). Others have a weight of which one factor is the policy's, such as a reward of 0
times an importance ratio: these are found by trying at one policy that is every other one, and several that are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.data.columns import spans
from rwft.data.prepare import Prepared
from rwft.data_alone import zero_weight_rows
from rwft.signals import SIGNALS
from rwft.temperature import row_signals
from rwft.weighting import Factor, Objective

TRIED, POSITIONS = 5, 2  # policies, and positions of each row

Signals = Mapping[str, Tensor]


def idle_rows(objective: Objective, data: Prepared) -> NDArray[np.bool_]:
    """`(n)`: training rows of weight zero by data alone; factors that read `group` count as not zero."""
    idle, signals = zero_weight_rows(objective, data), row_signals(data)
    for factor in objective.factors:
        if not set(factor.entry.reads) <= signals.keys():
            idle |= _always_zero(factor, signals, len(idle))
    return idle


def idle_note(objective: Objective, data: Prepared) -> list[str]:
    """One line where there are such rows: how many, and the setting that would let them count, if it is plain."""
    idle = idle_rows(objective, data)
    if not idle.any():
        return []
    how = _remedy(objective, data, idle)
    return [f"note: {idle.sum()} of {len(idle)} rows have weight zero by data alone under '{objective}'{how}"]


def _remedy(objective: Objective, data: Prepared, idle: NDArray[np.bool_]) -> str:
    """What to write where rewards of 0 are the reason, and rows below 0 would be pushed away."""
    if not (data.train.reward[idle] == 0).all() or bool((data.train.reward < 0).any()):
        return ""
    below = {name: torch.full_like(v, -1.0) for name, v in row_signals(data).items() if name in ("reward", "advantage")}
    signals = {**row_signals(data), **below}
    if any(_always_zero(factor, signals, len(idle))[idle].any() for factor in objective.factors):
        return ""
    if "reward" in objective.reads:
        return " (reward 0; to push them away give them -1, e.g. adapter: {name: binary, label: <column>, bad: -1})"
    if "advantage" in objective.reads and data.credit is not None and data.credit.config.baseline == "none":
        return " (advantage 0; to push them away: data.credit.baseline=mean, or group_mean)"
    return ""


def _always_zero(factor: Factor, signals: Signals, rows: int) -> NDArray[np.bool_]:
    """`(n)`: whether the factor is zero at every policy tried; one that reads no row's data or whole groups is not."""
    if set(factor.entry.reads).isdisjoint(signals) or "group" in factor.entry.reads:
        return np.zeros(rows, dtype=bool)
    idle = np.ones(rows, dtype=bool)
    for part in spans(rows):
        here = {name: value[part] if value.ndim else value for name, value in signals.items()}
        idle[part] = _zero_throughout(factor, here, len(idle[part]))
    return idle


def _zero_throughout(factor: Factor, signals: Signals, rows: int) -> NDArray[np.bool_]:
    """The same for a part of the rows; those that were not zero once are not tried again."""
    left = torch.arange(rows)
    for policy in _policies(rows):
        known = {**policy, **signals}
        weights = Objective((factor,))({name: value[left] if value.ndim else value for name, value in known.items()})
        left = left[(weights == 0).expand(len(left), POSITIONS).all(dim=1)]
    idle = np.zeros(rows, dtype=bool)
    idle[left.numpy()] = True
    return idle


def _policies(rows: int) -> Iterator[dict[str, Tensor]]:
    """Every signal as a policy could have it: first all policies the same, then each on its own."""
    draw = torch.Generator().manual_seed(0)
    for number in range(TRIED):
        one = -3 * torch.rand(rows, POSITIONS, generator=draw, dtype=torch.float64)
        yield {name: _drawn(name, one, alike=number == 0, draw=draw) for name in SIGNALS if name != "group"}


def _drawn(name: str, one: Tensor, *, alike: bool, draw: torch.Generator) -> Tensor:
    """`logp` and its kin: log-probabilities down to -3; the mask and the data's weights: 1; all others: in (0, 1)."""
    if name in ("mask", "token_weight"):
        return torch.ones_like(one)
    if name.endswith("logp"):
        return one if alike else -3 * torch.rand(one.shape, generator=draw, dtype=one.dtype)
    axes = SIGNALS[name].axes
    shape = () if not axes else one.shape if axes.startswith("b t") else (len(one), 1)
    return torch.rand(shape, generator=draw, dtype=one.dtype)
