"""Differences between objectives whose runs share their seeds and their prompts: intervals, Holm, seeds needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
POWER = 0.8
ROUNDING = 1e-9
MOST = 10_000  # seeds or prompts beyond which an estimate of how many are needed says nothing


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95% interval, over `n` seeds (or, with one seed, over its prompts).

    `p` is two-sided, for "there is none"; `deviation` the standard deviation of one seed's (or prompt's)
    difference. With several seeds and known prompts `p` is the larger of the two that seeds and prompts
    give: a difference must hold for other seeds on these prompts, and for other prompts, of which a single
    prompt says nothing. Seeds without any spread leave everything to the prompts.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    deviation: float
    over: str  # seeds | prompts


def difference(
    ours: Sequence[float], theirs: Sequence[float], prompts: tuple[Floats, Floats] | None = None
) -> Difference | None:
    """Paired by seed, `(n), (n)`; `prompts` are scores by prompt, each the mean over seeds, `(m), (m)`.

    None where nothing varies that could tell noise from difference: one seed, and no prompts.
    """
    seeds = over_seeds(ours, theirs)
    by_prompt = None if prompts is None else over_prompts(*prompts)
    if seeds is None or prompts is None:
        return seeds or by_prompt
    if by_prompt is None:
        return replace(seeds, p=1.0)
    return replace(seeds, p=max(seeds.p, by_prompt.p)) if seeds.deviation else by_prompt


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Difference | None:
    """`(n), (n)`: paired by seed, whatever the prompts; None for one seed."""
    return _mean_of(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64), "seeds")


def over_prompts(ours: Floats, theirs: Floats) -> Difference | None:
    """`(m), (m)`: paired by prompt, whatever the seeds; None for one prompt."""
    return _mean_of(ours - theirs, "prompts")


def _mean_of(gaps: Floats, over: str) -> Difference | None:
    """Student's t on differences `(n)`; None for a single one. What rounding leaves is no spread."""
    n = len(gaps)
    if n < 2:
        return None
    mean, deviation = float(gaps.mean()), float(gaps.std(ddof=1))
    deviation = deviation if deviation > ROUNDING * float(np.abs(gaps).max()) else 0.0
    half = quantile(n - 1, LEVEL) * deviation / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, p_value(mean, deviation, n), n, deviation, over)


def p_value(mean: float, deviation: float, n: int) -> float:
    """Two-sided p of a mean of `n` differences under "there is none"; without spread, what signs alone can say."""
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 2.0 ** (1 - n)
    return 1.0 - inside(abs(mean) / deviation * math.sqrt(n), n - 1)


def inside(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t, by the finite series 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    steps = np.arange(2 + odd, freedom - 1, 2)  # each factor of the coefficients is (k - 1) / k
    terms = np.cumprod(np.concatenate([[math.cos(angle) ** odd], (steps - 1) / steps * math.cos(angle) ** 2]))
    series = math.sin(angle) * float(terms.sum()) if freedom > 1 else 0.0
    return 2 / math.pi * (angle + series) if odd else series


@cache
def quantile(freedom: int, level: float) -> float:
    """The t with P(|T| < t) = `level`."""
    low, high = 0.0, 1.0
    while inside(high, freedom) < level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if inside(middle, freedom) < level else (low, middle)
    return high


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979): the i-th smallest of m, times m - i + 1, never falling."""
    out: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, p[name] * (len(p) - place)))
        out[name] = largest
    return out


def needed(found: Difference, comparisons: int = 1) -> int | None:
    """How many seeds (or prompts) would show a difference of this size, with 80% power at 5% over all comparisons.

    By the t approximation, with the spread that was seen; None beyond 10,000, and without a difference.
    """
    if found.mean == 0.0:
        return None
    level = 1.0 - (1.0 - LEVEL) / comparisons
    effect = abs(found.mean) / found.deviation if found.deviation else math.inf

    def enough(n: int) -> bool:
        return quantile(n - 1, level) + quantile(n - 1, 2 * POWER - 1) <= effect * math.sqrt(n)

    if not enough(MOST):
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
