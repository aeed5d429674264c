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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rwft.config import Config
from rwft.data.logprobs import row_logp
from rwft.data.prepare import Prepared, prepare
from rwft.data.rows import Rows
from rwft.errors import DataError
from rwft.policy import Policy
from rwft.progress import Display

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
    the step's end; behind a row's last step the reward is 0 and the ratio stays as it was.
    """

    reward: Floats
    prompt: NDArray[np.int64]
    log_ratio: Floats
    step_reward: Floats | None = None
    step_log_ratio: Floats | None = None


@dataclass(frozen=True)
class OffPolicy:
    """Estimates by name, or `refused` (why there are none), and how far the logs cover the policy.

    `ess` and `ess_prompts` are effective sample sizes of the ratios, in rows and in prompts; `mean_ratio` is 1
    where the logs cover the policy; `largest` is the share of the weight that one row carries. `behavior` is
    the value of the behaviour policy itself, on the same prompts.

    `self_normalized` weighs rewards by their ratios. `doubly_robust` adds, as a control variate, the mean
    reward of the prompt's other rows. `per_decision` is of the sum of step rewards instead, each weighed by
    the ratio up to its own step; `behavior_steps` is that sum under the behaviour policy.
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
    out = OffPolicy(
        rows=len(logged.reward),
        prompts=prompts,
        ess=ess,
        ess_prompts=ess_prompts,
        mean_ratio=math.exp(min(log_mean, 700.0)),  # beyond, it would not be a number
        largest=float((share * scaled[0]).max() / (share * scaled[0]).sum()),
        behavior=_self_normalized(np.ones_like(logged.reward), logged.reward, logged.prompt, prompts),
        behavior_steps=None if logged.step_reward is None else _behavior_steps(logged, prompts),
    )
    reason = _too_little(out)
    return replace(out, refused=reason) if reason else replace(out, estimates=_estimates(logged, scaled, ess_prompts))


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


def off_policy(policy: Policy, tokenizer: Any, config: Config, accelerator: Any, display: Display) -> OffPolicy:
    """`estimate` of the policy from the held-out rows of `config.data`.

    Raises DataError, naming a row, if one has no reward or no log-probabilities of the behaviour policy.
    """
    from rwft.setup import make_collate

    data, rows = _logged_rows(tokenizer, config, display)
    collate = make_collate(data, rows, frozenset(), tokenizer, policy)
    tick, every = display.ticker("off-policy evaluation", len(rows)), np.arange(len(rows))
    logp = row_logp(policy, collate, rows.length, every, device=accelerator.device, tick=tick)
    return estimate(logged_under(rows, [logp[i] for i in range(len(rows))]))


def _logged_rows(tokenizer: Any, config: Config, display: Display) -> tuple[Prepared, Rows]:
    """Held-out rows with behaviour log-probabilities; rows to train on need none if they are files of their own."""
    settings, apart = config.data, config.data.eval_path is not None
    if apart:
        settings = replace(settings, path=settings.eval_path, task=None, eval_path=None, eval_fraction=0.0)
    cache, tick = Path(config.cache).expanduser(), display.ticker("reading logged rows")
    data = prepare(settings, tokenizer, frozenset({"behavior_logp"}), cache, tick)
    rows = data.train if apart else data.held_out
    if rows is None:
        raise DataError("evaluate.off_policy: no held-out row is left with log-probabilities of the behaviour policy")
    missing = np.flatnonzero(np.isnan(rows.reward))
    if len(missing):
        raise DataError(
            f"{rows.source(int(missing[0]))}: no reward, which evaluate.off_policy needs of every held-out row"
        )
    return data, rows


def logged_under(rows: Rows, logp: Sequence[NDArray[Any]]) -> Logged:
    """Rows with the policy's log-probabilities of their trained tokens, one array a row."""
    columns = rows.take(np.arange(len(rows)))
    gaps = [
        np.cumsum(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)[np.asarray(mask, bool)])
        for ours, theirs, mask in zip(logp, columns["behavior_logp"], columns["mask"], strict=True)
    ]
    whole = np.array([gap[-1] for gap in gaps])
    if not all(columns["step_position"]):
        return Logged(rows.reward, rows.group, whole)
    most = max(map(len, columns["step_position"]))
    step_reward, step_gap = np.zeros((len(rows), most)), np.zeros((len(rows), most))
    for i, (places, rewards) in enumerate(zip(columns["step_position"], columns["step_reward"], strict=True)):
        tokens = np.cumsum(columns["mask"][i])[places]  # trained ones up to each step's last
        step_reward[i, : len(rewards)] = rewards
        step_gap[i] = np.concatenate([gaps[i][tokens - 1], np.full(most - len(places), gaps[i][tokens[-1] - 1])])
    return Logged(rows.reward, rows.group, whole, step_reward, step_gap)


def off_policy_figures(found: OffPolicy) -> list[tuple[str, Any]]:
    """What a table shows: label and value, intervals in brackets."""
    out: list[tuple[str, Any]] = [("off-policy: reward of what wrote the rows", _interval(found.behavior))]
    if found.behavior_steps is not None:
        out.append(("off-policy: its sum of step rewards", _interval(found.behavior_steps)))
    out += [(f"off-policy: {name}", _interval(estimate)) for name, estimate in found.estimates.items()]
    if found.refused is not None:
        out.append(("off-policy: no estimate", found.refused))
    out.append(("off-policy: effective sample size", f"{found.ess:.1f} of {found.rows} rows"))
    return [*out, ("off-policy: mean ratio (1 if covered)", found.mean_ratio)]


def _interval(found: Estimate) -> str:
    return f"{found.value:.4g}  [{found.low:.4g}, {found.high:.4g}]"
