"""Held-out logs as a policy sees them: importance ratios, and its states before each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rwft.config import Config
from rwft.data.logprobs import ACCELERATOR_TOKENS_AT_ONCE, TOKENS_AT_ONCE, length_batches, row_logp
from rwft.data.prepare import Prepared, prepare
from rwft.data.rows import Rows
from rwft.errors import DataError
from rwft.ope import Logged, OffPolicy, estimate
from rwft.policy import Policy
from rwft.progress import Display

STATE = 64  # features of a history: a projection of the hidden state, which may have thousands

Places = list[NDArray[np.int64]]


def off_policy(policy: Policy, tokenizer: Any, config: Config, accelerator: Any, display: Display) -> OffPolicy:
    """`estimate` of the policy from the held-out rows of `config.data`; with step rewards a second pass for its states.

    Raises DataError, naming a row, if one has no reward or no log-probabilities of the behaviour policy.
    """
    from rwft.setup import make_collate

    data, rows = _logged_rows(tokenizer, config, display)
    collate = make_collate(data, rows, frozenset(), policy)
    tick, every = display.ticker("off-policy evaluation", len(rows)), np.arange(len(rows))
    logp = row_logp(policy, collate, rows.length, every, device=accelerator.device, tick=tick)
    logged = logged_under(rows, [logp[i] for i in range(len(rows))])
    if logged.alive is None:
        return estimate(logged)
    places, tick = step_starts(rows, logged.alive), display.ticker("states before each step", len(rows))
    states = row_states(policy, collate, rows.length, places, device=accelerator.device, tick=tick)
    return estimate(replace(logged, state=padded(states, logged.alive.shape[1])))


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
        np.cumsum([0.0, *(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)[np.asarray(mask, bool)])])
        for ours, theirs, mask in zip(logp, columns["behavior_logp"], columns["mask"], strict=True)
    ]  # behind each trained token, from 0 before the first
    whole = np.array([gap[-1] for gap in gaps])
    if not all(columns["step_position"]):
        return Logged(rows.reward, rows.group, whole)
    reached = _reached(columns)
    shape = len(rows), max(map(len, reached))
    step_reward, step_gap, alive = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=bool)
    for i, (tokens, gap) in enumerate(zip(reached, gaps, strict=True)):
        steps = len(tokens)
        step_reward[i, :steps] = columns["step_reward"][i]
        step_gap[i, :steps], step_gap[i, steps:] = gap[tokens], gap[-1]
        alive[i, : steps + (tokens[-1] < len(gap) - 1)] = True  # what follows the last step is a step without reward
    return Logged(rows.reward, rows.group, whole, step_reward, step_gap, alive=alive)


def _reached(columns: dict[str, list[Any]]) -> Places:
    """Of each row, how many of its trained tokens lie up to the end of each step."""
    return [np.cumsum(mask)[places] for mask, places in zip(columns["mask"], columns["step_position"], strict=True)]


def step_starts(rows: Rows, alive: NDArray[np.bool_]) -> Places:
    """Of each row, which of its trained tokens is the first of each step; one array of its `alive (k)` steps a row."""
    columns = rows.take(np.arange(len(rows)))
    starts = [np.concatenate([[0], tokens]) for tokens in _reached(columns)]
    steps = alive.sum(axis=1)
    return [np.minimum(s[:k], n - 1) for s, k, n in zip(starts, steps, rows.trained, strict=True)]


def row_states(
    policy: Policy,
    collate: Callable[[NDArray[np.int64]], Any],
    length: NDArray[np.int64],
    places: Places,
    *,
    device: torch.device,
    tick: Callable[[int], None] = lambda _: None,
) -> list[NDArray[np.float64]]:
    """`(k d)` a row: the policy's last hidden states before the trained tokens at `places`, dropout off.

    States of more than `STATE` numbers are projected at random, always alike: what is fitted to them
    must not depend on the rows.
    """
    was_training = policy.training
    policy.eval()
    out: list[NDArray[np.float64]] = [np.zeros(0)] * len(places)
    most = TOKENS_AT_ONCE.get(device.type, ACCELERATOR_TOKENS_AT_ONCE)
    for part in length_batches(length, np.arange(len(places)), most=most):
        batch = collate(part).to(device)
        cast = torch.autocast(device.type, torch.bfloat16) if policy.autocast else nullcontext()
        with torch.no_grad(), cast:
            hidden = policy.hidden(batch.ids, batch.mask)
        for index, states in zip(part, hidden.double().cpu().split(batch.sequence_lengths), strict=True):
            out[int(index)] = _project(states.numpy()[places[int(index)]])
        tick(len(part))
    policy.train(was_training)
    return out


def _project(states: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(k h) -> (k d)`, `d` at most `STATE`."""
    width = states.shape[1]
    if width <= STATE:
        return states
    return states @ np.random.Generator(np.random.Philox(key=[width, STATE])).normal(size=(width, STATE))


def padded(states: Sequence[NDArray[np.float64]], most: int) -> NDArray[np.float64]:
    """`(n k d)`: states of all rows, 0 behind a row's last."""
    out = np.zeros((len(states), most, states[0].shape[1]))
    for row, state in zip(out, states, strict=True):
        row[: len(state)] = state
    return out
