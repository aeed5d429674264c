"""What scores of sampled completions say: means with intervals, pass@k, and whether a gain is more than sharpening.

Prompts are what was drawn at random, so intervals are over prompts, and a policy is compared with
another one prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwft.errors import DataError
from rwft.ope import student_quantile

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
RESAMPLES = 2000
FEW = 5  # prompts, below which nothing can be said of a difference
UNKNOWN = "sample at temperature 1 and below it, as in evaluate.temperature=[0.3,1.0], to tell a gain from sharpening"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """Scores of completions sampled at one temperature. `mean` is over prompts, with its 95% interval.

    `pass_at[k]`: chance that one of k samples succeeds, unbiased over the samples drawn, with its 95%
    interval in `pass_at_interval`; only for scores that are all 0 or 1. `unfinished`: share of samples
    that ran into max_new_tokens.
    """

    verifier: str
    prompts: int
    samples: int
    temperature: float
    seed: int
    mean: float
    low: float
    high: float
    unfinished: float
    pass_at: dict[int, float] = field(default_factory=dict)
    per_prompt: tuple[float, ...] = ()
    pass_at_interval: dict[int, tuple[float, float]] = field(default_factory=dict)


def sampled_from_json(stored: Mapping[str, Any]) -> Sampled:
    """The reverse of `dataclasses.asdict` and a JSON file, in which keys are text and tuples lists."""
    return Sampled(
        **{
            **stored,
            "pass_at": {int(k): v for k, v in stored["pass_at"].items()},
            "per_prompt": tuple(stored["per_prompt"]),
            "pass_at_interval": {int(k): (v[0], v[1]) for k, v in stored.get("pass_at_interval", {}).items()},
        }
    )


@dataclass(frozen=True)
class Gain:
    """Mean score of a policy above another's on the same prompts, at one temperature, with its 95% interval."""

    temperature: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sharpening:
    """Whether a gain at temperature 1 is there at lower ones too. `statement` says it in one sentence.

    `verdict`: `holds`, `partly` (a gain that is smaller there), `sharpening` (none there), `unclear`, `none` (no gain
    at temperature 1), `worse`, or `unknown` (not sampled at temperature 1 and below it). `lost` is the gain at
    temperature 1 above that at the lowest, None if unknown.
    """

    verdict: str
    statement: str
    gains: tuple[Gain, ...]
    lost: Gain | None = None


def sharpening(policy: Sequence[Sampled], baseline: Sequence[Sampled]) -> Sharpening:
    """Is the policy better than the baseline, or only surer? Each sampled at the same temperatures.

    Sampling at a lower temperature makes any policy surer. A policy that has only become surer beats its
    baseline at temperature 1 and no longer where both are sampled at a low one; so the lowest decides.
    Raises DataError if the two were not sampled alike.
    """
    pairs = _pairs(policy, baseline)
    if len(policy[0].per_prompt) < FEW:
        raise DataError(f"sharpening: found {len(policy[0].per_prompt)} prompts, expected at least {FEW}")
    grain = _grain((*policy, *baseline))
    gains = tuple(_gain(t, difference, *grain) for t, difference in pairs.items())
    lowest = min(pairs)
    if 1.0 not in pairs or lowest == 1.0:
        return Sharpening("unknown", UNKNOWN, gains)
    at = {gain.temperature: gain for gain in gains}
    lost = _gain(lowest, pairs[1.0] - pairs[lowest], *grain)
    verdict = _verdict(at[1.0], at[lowest], lost)
    return Sharpening(verdict, _statement(verdict, at[1.0], at[lowest]), gains, lost)


def _pairs(policy: Sequence[Sampled], baseline: Sequence[Sampled]) -> dict[float, Floats]:
    """`(prompts)` by temperature, lowest first: score of the policy less that of the baseline."""
    ours, theirs = ({one.temperature: one for one in side} for side in (policy, baseline))
    if not ours or set(ours) != set(theirs):
        raise DataError(f"sharpening: found temperatures {sorted(ours)} and {sorted(theirs)}, expected the same ones")
    for t in ours:
        a, b = ours[t], theirs[t]
        if a.verifier != b.verifier or len(a.per_prompt) != len(b.per_prompt) or not a.per_prompt:
            raise DataError(
                f"sharpening: found {a.verifier} on {len(a.per_prompt)} prompts and {b.verifier} on "
                f"{len(b.per_prompt)}, expected the same verifier and prompts"
            )
    return {t: np.array(ours[t].per_prompt) - np.array(theirs[t].per_prompt) for t in sorted(ours)}


def _grain(sampled: Sequence[Sampled]) -> tuple[float, bool]:
    """By how much one sample can move its prompt's score at most, as far as scores go; and whether they are 0 or 1."""
    samples = min(one.samples for one in sampled)
    scores = np.array([score for one in sampled for score in one.per_prompt])
    single = samples == 1 and bool(np.isin(scores, (0.0, 1.0)).all())
    if single or all(one.pass_at for one in sampled):
        return 1 / samples, True
    return float(np.ptp(scores)) / samples, False


def _gain(temperature: float, difference: Floats, grain: float, binary: bool) -> Gain:
    joined = grain if binary or np.ptp(difference) == 0 else None
    return Gain(temperature, float(difference.mean()), *difference_interval(difference, joined))


def _verdict(gain: Gain, low: Gain, lost: Gain) -> str:
    """From the gain at temperature 1, that at the lowest temperature, and the first above the second."""
    if gain.low <= 0:
        return "worse" if gain.high < 0 else "none"
    if low.low > 0:
        return "partly" if lost.low > 0 else "holds"
    return "sharpening" if lost.low > 0 else "unclear"


def _statement(verdict: str, gain: Gain, low: Gain) -> str:
    one, cold = (f"{g.value:+.3g} [{g.low:.3g}, {g.high:.3g}]" for g in (gain, low))
    t, surer = f"temperature {low.temperature:g}", 1 - low.value / gain.value if gain.value else 0.0
    return {
        "none": f"no gain at temperature 1: {one}",
        "worse": f"worse than the baseline at temperature 1: {one}",
        "holds": f"the gain at temperature 1, {one}, holds at {t}: {cold}; it is more than sharpening",
        "partly": f"the gain at temperature 1, {one}, is smaller at {t}: {cold}; {surer:.0%} of it is sharpening",
        "sharpening": f"the gain at temperature 1, {one}, vanishes at {t}: {cold}; it is sharpening",
        "unclear": f"gain at temperature 1 {one}, at {t} {cold}: too few prompts to tell a gain from sharpening",
    }[verdict]


def difference_interval(values: Floats, grain: float | None = None) -> tuple[float, float]:
    """`(n) -> low, high`: 95% interval of the mean of paired differences, by Student's t.

    They are joined by one of +`grain` and one of -`grain`, so that prompts which all agree do not claim
    certainty. For single samples scored 0 or 1, whose grain is 1, that is the interval of Bonett and Price
    (2012). Without a grain the differences stand as they are.
    """
    if grain is not None:
        values = np.concatenate([values, [grain, -grain]])
    half = student_quantile(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def mean_interval(values: Floats, seed: int) -> tuple[float, float]:
    """`(n) -> low, high`: 95% interval of the mean over prompts.

    Wilson's where every value is 0 or 1, since it stays honest at 0% and 100%; else the
    percentile bootstrap over prompts.
    """
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(float(values.mean()), len(values))
    rng = np.random.Generator(np.random.Philox(key=[seed, 95]))
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (Wilson 1927)."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return 0.0 if share == 0 else max(0.0, centre - half), 1.0 if share == 1 else min(1.0, centre + half)


def pass_at(scores: Floats) -> dict[int, float]:
    """`(prompts samples) -> {k: ...}` for k = 1, 2, 4, ..., n: mean of 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    return {k: float(chances.mean()) for k, chances in _pass_chances(scores).items()}


def pass_at_intervals(scores: Floats, seed: int) -> dict[int, tuple[float, float]]:
    """`(prompts samples) -> {k: (low, high)}`: 95% intervals of `pass_at` over prompts, as `mean_interval`."""
    return {k: mean_interval(chances, seed) for k, chances in _pass_chances(scores).items()}


def _pass_chances(scores: Floats) -> dict[int, Floats]:
    """`(prompts samples) -> {k: (prompts)}`; empty for one sample, or scores that are not all 0 or 1."""
    n = scores.shape[1]
    if n == 1 or not np.isin(scores, (0.0, 1.0)).all():
        return {}
    right = scores.sum(axis=1).astype(int)
    sizes = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    return {k: np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in right]) for k in sizes}
