"""Means that a reward equals but for rounding become that reward.

Else the sign of its advantage, which is all that some objectives read, would be that of the rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP = 4 * np.finfo(np.float64).eps  # of a mean, by the number of rewards, added in turn, and the largest of them
PAIRWISE = 16 * GROUP  # by the largest, however many there are: numpy adds in pairs of pairs

Floats = NDArray[np.float64]


def meet_members(mean: Floats, reward: Floats, index: NDArray[Any], size: NDArray[Any]) -> None:
    """`(g), (n), (n), (g)`: in place, means of groups; `index`: each reward's group, `size`: how many it has."""
    largest = np.zeros(len(mean))
    np.maximum.at(largest, index, np.abs(reward))
    at = np.abs(reward - mean[index]) <= GROUP * (size * largest)[index]
    mean[index[at]] = reward[at]


def meet_level(mean: float, level: Floats) -> float:
    """The mean of all rewards, whose distinct values, ascending, are `level (k)`."""
    place = int(np.searchsorted(level, mean))
    slack = PAIRWISE * max(abs(level[0]), abs(level[-1]))
    return next((float(near) for near in level[max(place - 1, 0) : place + 1] if abs(near - mean) <= slack), mean)
