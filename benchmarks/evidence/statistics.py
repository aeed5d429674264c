"""Means over seeds with 95% intervals, and differences seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, 97.5%, by number of seeds
Interval = tuple[float, float, float]  # mean, low, high


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and 95% interval by Student's t. Raises ValueError for one value, which has none."""
    if len(values) not in T95:
        raise ValueError(f"found {len(values)} seeds, expected {min(T95)} to {max(T95)}")
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = T95[len(values)] * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


def share(values: Sequence[float]) -> Interval:
    """As `over_seeds`, for shares: the interval is cut to 0..1."""
    mean, low, high = over_seeds(values)
    return mean, max(low, 0.0), min(high, 1.0)


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """First less second, by seed: what the seeds share (logs, start, order) drops out."""
    return over_seeds([first[seed] - second[seed] for seed in sorted(first)])


def percent(found: Interval) -> str:
    """`63.2 (58.0 to 68.4)`: shares as percentages."""
    mean, low, high = (100 * value for value in found)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def points(found: Interval) -> str:
    """`+5.1 (+1.0 to +9.2)`: differences in percentage points, bold where the interval excludes 0."""
    mean, low, high = (100 * value for value in found)
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text
