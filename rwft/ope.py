r"""Off-policy evaluation: what a policy would earn, from held-out logs of another one, without sampling.

A logged completion of prompt `x` gets the importance ratio :math:`w = \pi(y|x) / \mu(y|x)`, with `mu`
the behaviour policy, whose log-probabilities are in the data. Prompts count alike, however many completions
were logged for them. Intervals delete one prompt at a time (the jackknife), with the quantile of Student's t
for as many prompts as are effective. Where the logs say too little about the policy there is no estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwft.errors import DataError
from rwft.fitted_q import Steps, explained, fitted_values

MIN_ROWS, MIN_PROMPTS = 30.0, 10.0  # effective ones, below which the intervals were found to cover too rarely
MEAN_RATIO = (0.5, 2.0)  # with 30 effective rows its standard error is below 0.19
Z = 1.959963984540054  # 97.5% quantile of the normal distribution

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Logged:
    """Held-out logs as two policies see them; `n` rows.

    `reward (n)`, `prompt (n)` the number of each row's prompt, `log_ratio (n)` = log pi(y|x) - log mu(y|x).
    With per-step rewards also `step_reward (n k)` and `step_log_ratio (n k)`, the latter of the tokens up to
    the step's end; behind a row's last step the reward is 0 and the ratio that of the whole row, end token and all.
    For fitted values also `state (n k d)`, features of the history before each step, and `alive (n k)`, whether the
    row had not ended by then.
    """

    reward: Floats
    prompt: NDArray[np.int64]
    log_ratio: Floats
    step_reward: Floats | None = None
    step_log_ratio: Floats | None = None
    state: Floats | None = None
    alive: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Fitted:
    """What the fitted values are worth. `direct` is their mean over prompts, with no correction and so no interval.

    `explained` is the share of the spread of rewards to come that they foresaw in rows of other prompts; at 0 or
    below, `refused` says that they add nothing to `per_decision`.
    """

    direct: float
    explained: float
    refused: str | None = None


@dataclass(frozen=True)
class OffPolicy:
    """Estimates by name, or `refused` (why there are none), and how far the logs cover the policy.

    `ess` and `ess_prompts` are effective sample sizes of the ratios, in rows and in prompts; `mean_ratio` is 1
    where the logs cover the policy, and 1 less its lower bound in `mean_ratio_interval` is how much of what the
    policy writes the logs may never hold, for which no estimate speaks (`caution`, where that interval leaves 1
    out); `largest` is the share of the weight that one row carries. `behavior` is the value of the behaviour
    policy itself, on the same prompts.

    `self_normalized` weighs rewards by their ratios. `doubly_robust` adds, as a control variate, the mean
    reward of the prompt's other rows. `per_decision` is of the sum of step rewards instead, each weighed by
    the ratio up to its own step; `behavior_steps` is that sum under the behaviour policy. `fitted_q` is the doubly
    robust form of it, with the values of `rwft.fitted_q` as control variate; `fitted` says what those are worth.
    """

    rows: int
    prompts: int
    ess: float
    ess_prompts: float
    mean_ratio: float
    largest: float
    behavior: Estimate
    behavior_steps: Estimate | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    refused: str | None = None
    fitted: Fitted | None = None
    mean_ratio_interval: tuple[float, float] | None = None
    caution: str | None = None


def estimate(logged: Logged) -> OffPolicy:
    """The value of the policy from logs of another. Raises DataError for fewer than ten prompts."""
    prompts = len(np.unique(logged.prompt))
    if prompts < MIN_PROMPTS:
        raise DataError(
            f"evaluate.off_policy: found {prompts} held-out prompts, expected at least {MIN_PROMPTS:g}; hold out more "
            "(data.eval_fraction, data.eval_path)"
        )
    scaled = [np.exp(column - column.max()) for column in _log_ratios(logged)]
    per_prompt = [_prompt_means(w, logged.prompt) for w in scaled]
    share = _row_share(logged.prompt)
    ess = min(_effective(share * w) for w in scaled)
    ess_prompts = min(map(_effective, per_prompt))
    log_mean = float(logged.log_ratio.max() + np.log(per_prompt[0].mean()))
    mean_ratio = math.exp(min(log_mean, 600.0))  # beyond, it would not be a number
    spread = _mean(per_prompt[0] / per_prompt[0].mean(), max(ess_prompts, 2.0))
    out = OffPolicy(
        rows=len(logged.reward),
        prompts=prompts,
        ess=ess,
        ess_prompts=ess_prompts,
        mean_ratio=mean_ratio,
        mean_ratio_interval=(mean_ratio * spread.low, mean_ratio * spread.high),
        largest=float((share * scaled[0]).max() / (share * scaled[0]).sum()),
        behavior=_self_normalized(np.ones_like(logged.reward), logged.reward, logged.prompt, prompts),
        behavior_steps=None if logged.step_reward is None else _behavior_steps(logged, prompts),
    )
    reason = _too_little(out)
    if reason is not None:
        return replace(out, refused=reason)
    estimates, fitted = _estimates(logged, scaled, ess_prompts), None
    if logged.state is not None:
        fitted, robust = _fitted_q(logged, scaled, ess_prompts)
        estimates |= {} if fitted.refused else {"fitted_q": robust}
    return replace(out, estimates=estimates, fitted=fitted, caution=_caution(out))


def _log_ratios(logged: Logged) -> list[Floats]:
    """`(n)` each: of whole completions, then up to each step."""
    return [logged.log_ratio, *([] if logged.step_log_ratio is None else logged.step_log_ratio.T)]


def _too_little(found: OffPolicy) -> str | None:
    """Why these logs cannot tell the value of the policy, if so."""
    size = f"effective sample size {found.ess:.1f} of {found.rows} rows"
    size += f", {found.ess_prompts:.1f} of {found.prompts} prompts; mean ratio {found.mean_ratio:.3g}"
    if found.ess < MIN_ROWS or found.ess_prompts < MIN_PROMPTS:
        return (
            f"{size}; expected at least {MIN_ROWS:g} rows and {MIN_PROMPTS:g} prompts: hold out more, "
            "or evaluate a policy nearer to the one that wrote the logs"
        )
    if not MEAN_RATIO[0] <= found.mean_ratio <= MEAN_RATIO[1]:
        return (
            f"{size}, expected about 1: the policy writes what the logs do not "
            "hold, or the logged log-probabilities are not those of what wrote them"
        )
    return None


def _caution(found: OffPolicy) -> str | None:
    """What a mean ratio says that is surely not 1, though near enough to estimate."""
    assert found.mean_ratio_interval is not None
    low, high = found.mean_ratio_interval
    if high < 1:
        return (
            f"about {1 - found.mean_ratio:.2g} of what the policy writes is not in the logs: no estimate speaks for it"
        )
    if low > 1:
        return "ratios average above 1: are the logged log-probabilities those of what wrote the rows?"
    return None


def _estimates(logged: Logged, scaled: Sequence[Floats], effective: float) -> dict[str, Estimate]:
    w, reward, prompt = scaled[0], logged.reward, logged.prompt
    out = {
        "self_normalized": _self_normalized(w, reward, prompt, effective),
        "doubly_robust": _doubly_robust(w, reward, prompt, effective),
    }
    if logged.step_reward is not None:
        out["per_decision"] = _per_decision(np.stack(scaled[1:], axis=1), logged.step_reward, prompt, effective)
    return out


def _self_normalized(w: Floats, reward: Floats, prompt: NDArray[np.int64], effective: float) -> Estimate:
    """`(n), (n), (n)`: sum of w r over sum of w."""
    top, bottom = _prompt_means(w * reward, prompt), _prompt_means(w, prompt)
    return _sum_of_ratios(np.zeros_like(top), top[:, None], bottom[:, None], effective)


def _doubly_robust(w: Floats, reward: Floats, prompt: NDArray[np.int64], effective: float) -> Estimate:
    """`(n), (n), (n)`: mean of b, plus sum of w (r - b) over sum of w (Dudik et al. 2011; weighted: 1604.00923)."""
    baseline = others_mean(reward, prompt)
    top, bottom = _prompt_means(w * (reward - baseline), prompt), _prompt_means(w, prompt)
    return _sum_of_ratios(_prompt_means(baseline, prompt), top[:, None], bottom[:, None], effective)


def _per_decision(w: Floats, reward: Floats, prompt: NDArray[np.int64], effective: float) -> Estimate:
    """`(n k), (n k), (n)`: over steps, sum of w_k r_k over sum of w_k (Precup et al. 2000; weighted: Thomas 2015)."""
    top = np.stack([_prompt_means(column, prompt) for column in (w * reward).T], axis=1)
    bottom = np.stack([_prompt_means(column, prompt) for column in w.T], axis=1)
    return _sum_of_ratios(np.zeros(len(top)), top, bottom, effective)


def _fitted_q(logged: Logged, scaled: Sequence[Floats], effective: float) -> tuple[Fitted, Estimate]:
    """What fitted values are worth, and the doubly robust estimate with them.

    mean of V_1, plus over steps the sum of w_k (r_k + V_{k+1} - V_k) over the sum of w_k: the weighted doubly robust
    estimator (Jiang and Li 2016; Thomas and Brunskill 2016) with the value of a history in place of that of its step.
    """
    reward, log_ratio, state, alive = logged.step_reward, logged.step_log_ratio, logged.state, logged.alive
    assert reward is not None
    assert log_ratio is not None
    assert state is not None
    assert alive is not None
    steps, prompt = Steps(reward, log_ratio, state, alive, logged.prompt), logged.prompt
    values, w = fitted_values(steps), np.stack(scaled[1:], axis=1)
    error = w * (reward + values[:, 1:] - values[:, :-1])
    top, bottom = (np.stack([_prompt_means(c, prompt) for c in of.T], axis=1) for of in (error, w))
    first = _prompt_means(values[:, 0], prompt)
    share = explained(steps, values, _row_share(prompt) * scaled[0])
    reason = None if share > 0 else f"the fitted values foresee {share:.2g} of what is to come, expected more than 0"
    return Fitted(float(first.mean()), share, reason), _sum_of_ratios(first, top, bottom, effective)


def _behavior_steps(logged: Logged, prompts: int) -> Estimate:
    assert logged.step_reward is not None
    return _self_normalized(np.ones_like(logged.reward), logged.step_reward.sum(axis=1), logged.prompt, prompts)


def others_mean(reward: Floats, prompt: NDArray[np.int64]) -> Floats:
    """`(n), (n) -> (n)`: mean reward of the prompt's other rows; of the other prompts, where there are none.

    No row's own reward is in its baseline: with it, the correction would be biased.
    """
    _, index, size = np.unique(prompt, return_inverse=True, return_counts=True)
    total = np.bincount(index, reward)
    means = total / size
    elsewhere = (means.sum() - means) / (len(means) - 1)
    within = (total[index] - reward) / np.maximum(size[index] - 1, 1)
    return np.where(size[index] > 1, within, elsewhere[index])


def _sum_of_ratios(constant: Floats, top: Floats, bottom: Floats, effective: float) -> Estimate:
    """`(p), (p k), (p k)`: mean of `constant` plus, over k, sum of `top` by sum of `bottom`; prompts jackknifed."""
    p, tops, bottoms = len(constant), top.sum(axis=0), bottom.sum(axis=0)
    value = float(constant.mean() + (tops / bottoms).sum())
    without = (constant.sum() - constant) / (p - 1) + ((tops - top) / (bottoms - bottom)).sum(axis=1)
    error = math.sqrt((p - 1) / p * float(np.square(without - without.mean()).sum()))
    half = student_quantile(effective - 1) * error
    return Estimate(value, value - half, value + half)


def _mean(values: Floats, effective: float) -> Estimate:
    """`(p)`: mean over prompts."""
    nothing = np.zeros((len(values), 0))
    return _sum_of_ratios(values, nothing, nothing, effective)


def student_quantile(freedom: float) -> float:
    """97.5% quantile of Student's t: the expansion 26.7.5 of Abramowitz and Stegun, good to 1e-3 from 9 on."""
    one = (Z**3 + Z) / 4
    two = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    three = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + one / freedom + two / freedom**2 + three / freedom**3


def _effective(w: Floats) -> float:
    return float(w.sum()) ** 2 / float(np.square(w).sum())


def _prompt_means(values: Floats, prompt: NDArray[np.int64]) -> Floats:
    """`(n), (n) -> (p)`: mean over each prompt's rows."""
    _, index, size = np.unique(prompt, return_inverse=True, return_counts=True)
    return np.bincount(index, values) / size


def _row_share(prompt: NDArray[np.int64]) -> Floats:
    """`(n) -> (n)`: one over how many rows the row's prompt has."""
    _, index, size = np.unique(prompt, return_inverse=True, return_counts=True)
    return 1.0 / size[index]


def off_policy_figures(found: OffPolicy) -> list[tuple[str, Any]]:
    """What a table shows: label and value, intervals in brackets."""
    out: list[tuple[str, Any]] = [("off-policy: reward of what wrote the rows", _interval(found.behavior))]
    if found.behavior_steps is not None:
        out.append(("off-policy: its sum of step rewards", _interval(found.behavior_steps)))
    out += [(f"off-policy: {name}", _interval(estimate)) for name, estimate in found.estimates.items()]
    if found.fitted is not None:
        worth = found.fitted.refused or f"foresee {found.fitted.explained:.2g} of what is to come"
        out.append(("off-policy: fitted values", worth))
    if found.refused is not None:
        out.append(("off-policy: no estimate", found.refused))
    if found.caution is not None:
        out.append(("off-policy: caution", found.caution))
    out.append(("off-policy: effective sample size", f"{found.ess:.1f} of {found.rows} rows"))
    covered = found.mean_ratio_interval
    ratio = found.mean_ratio if covered is None else _interval(Estimate(found.mean_ratio, *covered))
    return [*out, ("off-policy: mean ratio (1 if covered)", ratio)]


def _interval(found: Estimate) -> str:
    return f"{found.value:.4g}  [{found.low:.4g}, {found.high:.4g}]"
