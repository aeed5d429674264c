r"""Fitted evaluation of a policy over logged steps: what is still to come, predicted from the policy's own states.

Text does not repeat its states, so nothing is tabulated: the value of a history is linear in the policy's
hidden state behind it and in the return of the prompt's other completions. It is fitted backwards over the
steps (Le et al. 2019), each regressed on the step's reward plus the next value, ridge chosen by generalised
cross-validation. The logs hold one continuation of each history, so importance ratios up to the step's end stand
for what the policy would meet and do. Values of a row come from fits to other prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOLDS = 5
PENALTIES = tuple(10.0**e for e in np.arange(-4, 4.5, 0.5))  # by the effective rows of the fit
MIN_FIT = 20.0  # effective rows, below which a step's value is one number

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Value = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Steps:
    """Logged steps, `n` rows of at most `k`.

    `reward (n k)`, `log_ratio (n k)` of the tokens up to each step's end, `state (n k d)` features of the history
    before each step, `alive (n k)` whether the row had not ended before it, `prompt (n)` the number of its prompt.
    """

    reward: Floats
    log_ratio: Floats
    state: Floats
    alive: Bools
    prompt: NDArray[np.int64]


def fitted_values(steps: Steps) -> Floats:
    """`(n k+1)`: the value of each history before a step, fitted to the rows of other prompts; 0 behind the end."""
    peers = peers_return(steps.reward.sum(axis=1), steps.prompt)
    _, number = np.unique(steps.prompt, return_inverse=True)
    out = np.zeros((len(number), steps.reward.shape[1] + 1))
    for fold in range(FOLDS):
        held = number % FOLDS == fold
        if held.any():
            out[held] = _fit_fold(steps, peers, ~held)[held]
    return out


def _fit_fold(steps: Steps, peers: Floats, train: Bools) -> Floats:
    """`(n k+1)`: values of all rows from a fit to those of `train`, from the last step to the first."""
    n, most = steps.reward.shape
    values = np.zeros((n, most + 1))
    known = np.isfinite(peers)
    usual = peers[known & train].mean() if (known & train).any() else 0.0
    shared = np.where(known, peers, usual)[:, None]
    for k in reversed(range(most)):
        alive = steps.alive[:, k]
        used = train & alive
        if not used.any():
            continue
        features = np.concatenate([steps.state[:, k], shared], axis=1)
        target = steps.reward[used, k] + values[used, k + 1]
        weight = np.exp(steps.log_ratio[used, k] - steps.log_ratio[used, k].max())
        values[alive, k] = fit_value(features[used], target, weight)(features[alive])
    return values


def fit_value(x: Floats, y: Floats, weight: Floats) -> Value:
    """`(n d), (n), (n)`: a weighted ridge regression as a function `(m d) -> (m)`.

    Its penalty is chosen by generalised cross-validation (Golub et al. 1979) over the effective rows. Predictions
    stay within the targets seen; where too few rows are effective all are their weighted mean.
    """
    weight = weight / weight.sum()
    effective = 1.0 / float(np.square(weight).sum())
    middle, level = weight @ x, float(weight @ y)
    if effective < MIN_FIT:
        return lambda new: np.full(len(new), level)
    spread = np.sqrt(weight @ np.square(x - middle))
    spread = np.where(spread > 1e-12 * (1 + np.abs(middle)), spread, np.inf)  # a constant feature says nothing
    slope = _ridge((x - middle) / spread, y - level, weight, effective)
    low, high = float(y.min()), float(y.max())
    return lambda new: np.clip(level + (new - middle) / spread @ slope, low, high)


def _ridge(x: Floats, y: Floats, weight: Floats, effective: float) -> Floats:
    """`(n d), (n), (n) -> (d)`: slopes at the penalty with the least generalised cross-validation error."""
    size, axes = np.linalg.eigh((x * weight[:, None]).T @ x)
    size = np.maximum(size, 0.0)
    along, total = axes.T @ ((x * weight[:, None]).T @ y), float(weight @ np.square(y))
    best, slope = np.inf, np.zeros_like(along)
    for penalty in PENALTIES:
        shrunk = along / (size + penalty)
        residual = max(total - float(shrunk @ (2 * along - size * shrunk)), 0.0)
        free = effective - 1 - float((size / (size + penalty)).sum())
        error = residual / free**2 if free > 0 else np.inf
        if error < best:
            best, slope = error, shrunk
    return axes @ slope


def peers_return(returns: Floats, prompt: NDArray[np.int64]) -> Floats:
    """`(n), (n) -> (n)`: mean return of the prompt's other rows; NaN for a row alone with its prompt."""
    _, index, size = np.unique(prompt, return_inverse=True, return_counts=True)
    others = size[index] - 1
    return np.where(others > 0, (np.bincount(index, returns)[index] - returns) / np.maximum(others, 1), np.nan)


def explained(steps: Steps, values: Floats, weight: Floats) -> float:
    """Share of the spread of what was still to come that the values foresaw, `weight (n)` being that of the rows.

    1 - sum w (G - V)^2 / sum w (G - mean G)^2 over steps, G the rewards from the step on. 0 or less: one number a
    step would do as well.
    """
    togo = np.flip(np.cumsum(np.flip(steps.reward, axis=1), axis=1), axis=1)
    w = weight[:, None] * steps.alive
    mean = (w * togo).sum(axis=0) / np.maximum(w.sum(axis=0), 1e-300)
    spread = float((w * np.square(togo - mean)).sum())
    return 1.0 - float((w * np.square(togo - values[:, :-1])).sum()) / spread if spread > 0 else 0.0
