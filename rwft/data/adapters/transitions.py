"""Episodes of control -> one example per step: the observation as the prompt, the action as the completion.

Each number becomes one printable character, so that a small policy with the character tokenizer learns
`pi(a|s)` in the same loop as a language model, weighted by what the episode returned.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, NamedTuple

from rwft.bounds import Count, Fraction
from rwft.data.adapters.contract import Coerced, Dropped, Holds, Row, Yield, adapter
from rwft.data.adapters.conversation import group_of
from rwft.data.adapters.values import DECIMAL, boolean, column, items, number, optional, parallel, wrong
from rwft.data.example import Example, Source
from rwft.errors import DataError

Series = Annotated[str, Holds(("lists of numbers", "numbers"))]
Rewards = Annotated[str, Holds(("numbers",))]
Flags = Annotated[str, Holds(("booleans", "numbers"))]
Earns = Literal["return", "return_to_go"]
Cut = Literal["keep", "drop"]
Interval = tuple[float, float]

FIRST, SYMBOLS = ord("!"), 94  # the printable characters but the space

CUT_OFF = "step of an episode that was cut off: what would have come is not in its return"
DROPPED = "step of an episode that was cut off"
CLIPPED = "number outside of its bounds, taken as the nearest"


class Scale(NamedTuple):
    """How numbers become characters: in `bins` between bounds, or as they are where there are none (whole numbers)."""

    bounds: tuple[Interval, ...]
    bins: int
    setting: str


class Settings(NamedTuple):
    """What both formats have in common."""

    observation: Scale
    action: Scale
    earns: str
    discount: float
    cut_off: str


@adapter
def minari(
    row: Row,
    source: Source,
    *,
    observations: Series = "observations",
    actions: Series = "actions",
    rewards: Rewards = "rewards",
    terminations: Flags = "terminations",
    truncations: Flags = "truncations",
    observation_bounds: str | None = None,
    action_bounds: str | None = None,
    bins: Count = 32,
    reward: Earns = "return",
    discount: Fraction = 1.0,
    cut_off: Cut = "keep",
) -> Iterator[Yield]:
    """Minari's EpisodeData, an episode per row: one observation more than actions, the last one unused.

    `observation_bounds` and `action_bounds` are text such as "-1:1", or one interval per dimension,
    "-2.4:2.4,-3:3"; without them the numbers are whole, 0 to 93. The reward of a step is the return of its
    episode, or what was still to come (`return_to_go`), discounted. With a time limit it is less than it would
    have been: such steps are counted, or dropped (`cut_off`).
    """
    acted = items(column(row, actions), actions)
    seen = _seen(row, observations, actions, len(acted) + 1, " and the state after the last")
    ends = [_flags(row, name, actions, len(acted)) for name in (terminations, truncations)]
    early = next((i for i in range(len(acted) - 1) if ends[0][i] or ends[1][i]), None)
    if early is not None:
        raise DataError(f"{terminations}: found an end at step {early} of {len(acted)}, expected one at the last alone")
    earned = _numbers(row, rewards, actions, len(acted))
    settings = _settings(observation_bounds, action_bounds, bins, reward, discount, cut_off)
    yield from _episode(source, seen[:-1], acted, earned, ends[0][-1], settings, (observations, actions))


@adapter
def d4rl(
    row: Row,
    source: Source,
    *,
    observations: Series = "observations",
    actions: Series = "actions",
    rewards: Rewards = "rewards",
    terminals: Flags = "terminals",
    timeouts: Flags | None = None,
    observation_bounds: str | None = None,
    action_bounds: str | None = None,
    bins: Count = 32,
    reward: Earns = "return",
    discount: Fraction = 1.0,
    cut_off: Cut = "keep",
) -> Iterator[Yield]:
    """D4RL's and d3rlpy's flat arrays, many episodes in one row: as many observations as actions.

    An episode ends at a terminal or a timeout, the last one also with the data; only a terminal is an end of
    its own. Settings as in `minari`.
    """
    acted = items(column(row, actions), actions)
    seen = _seen(row, observations, actions, len(acted))
    earned = _numbers(row, rewards, actions, len(acted))
    over = _flags(row, terminals, actions, len(acted))
    stopped = [False] * len(acted) if optional(row, timeouts) is None else _flags(row, timeouts, actions, len(acted))
    settings = _settings(observation_bounds, action_bounds, bins, reward, discount, cut_off)
    last = len(acted) - 1
    ends = [i + 1 for i in range(len(acted)) if over[i] or stopped[i] or i == last]
    for start, end in zip([0, *ends], ends, strict=False):
        part = slice(start, end)
        yield from _episode(
            source, seen[part], acted[part], earned[part], over[end - 1], settings, (observations, actions)
        )


@functools.lru_cache
def _settings(
    observation: str | None, action: str | None, bins: int, earns: str, discount: float, cut_off: str
) -> Settings:
    if bins > SYMBOLS:
        raise DataError(f"bins: found {bins}, expected at most {SYMBOLS}, the printable characters")
    seen = Scale(_intervals(observation, "observation_bounds"), bins, "observation_bounds")
    acted = Scale(_intervals(action, "action_bounds"), bins, "action_bounds")
    return Settings(seen, acted, earns, discount, cut_off)


def _intervals(given: str | None, field: str) -> tuple[Interval, ...]:
    """`"-1:1,0:8"` as intervals; none if there is no text."""
    out: list[Interval] = []
    for part in [] if given is None else given.split(","):
        low, colon, high = part.partition(":")
        good = colon and DECIMAL.fullmatch(low) and DECIMAL.fullmatch(high)
        if not good or not float(low) < float(high):
            raise DataError(f"{field}: found {part!r} in {given!r}, expected low:high, such as -1:1, in each dimension")
        out.append((float(low), float(high)))
    return tuple(out)


def _episode(
    source: Source,
    seen: Sequence[Any],
    acted: Sequence[Any],
    earned: Sequence[float],
    terminal: bool,
    settings: Settings,
    fields: tuple[str, str],
) -> Iterator[Yield]:
    """One example per step, all of an episode; dropped if it was cut off and that is asked for."""
    to_go = returns(earned, settings.discount)
    for i, (state, action) in enumerate(zip(seen, acted, strict=True)):
        if not terminal and settings.cut_off == "drop":
            yield Dropped(DROPPED)
            continue
        prompt, far = _symbols(state, settings.observation, f"{fields[0]}[{i}]")
        completion, off = _symbols(action, settings.action, f"{fields[1]}[{i}]")
        if not terminal:
            yield Coerced(CUT_OFF)
        if far or off:
            yield Coerced(CLIPPED)
        value = to_go[i if settings.earns == "return_to_go" else 0]
        yield Example(prompt, completion, source, reward=number(value, "reward"), group=group_of(prompt))


def returns(rewards: Sequence[float], discount: float) -> list[float]:
    """The discounted sum of each reward and those after it."""
    return list(accumulate(reversed(rewards), lambda later, now: now + discount * later))[::-1]


def _symbols(value: Any, scale: Scale, field: str) -> tuple[str, bool]:
    """One character per dimension, and whether any number lay outside of its bounds."""
    values = items(value, field) if isinstance(value, list) else [value]
    if not scale.bounds:
        return "".join(chr(FIRST + _whole(item, scale.setting, field)) for item in values), False
    bounds = scale.bounds * len(values) if len(scale.bounds) == 1 else scale.bounds
    if len(bounds) != len(values):
        raise DataError(
            f"{scale.setting}: found {len(bounds)} intervals, expected {len(values)}, one for each of {field}"
        )
    numbers = [number(item, field) for item in values]
    near = [min(max(x, low), high) for x, (low, high) in zip(numbers, bounds, strict=True)]
    places = [int((x - low) / (high - low) * scale.bins) for x, (low, high) in zip(near, bounds, strict=True)]
    return "".join(chr(FIRST + min(place, scale.bins - 1)) for place in places), near != numbers


def _whole(value: Any, setting: str, field: str) -> int:
    whole = number(value, field)
    if whole not in range(SYMBOLS):
        raise wrong(value, field, f"a whole number from 0 to {SYMBOLS - 1}, or {setting} such as -1:1")
    return int(whole)


def _seen(row: Row, name: str, other: str, length: int, more: str = "") -> list[Any]:
    value = items(column(row, name), name)
    if len(value) != length:
        raise DataError(f"{name}: found {len(value)} items, expected {length}, one for each of {other}{more}")
    return value


def _numbers(row: Row, name: str, other: str, length: int) -> list[float]:
    return [number(item, f"{name}[{i}]") for i, item in enumerate(parallel(column(row, name), name, length, other))]


def _flags(row: Row, name: str | None, other: str, length: int) -> list[bool]:
    """True or false, or 0 or 1, as arrays become on their way to disk."""
    values = parallel(column(row, str(name)), str(name), length, other)
    return [value == 1 if value in (0, 1) else boolean(value, f"{name}[{i}]") for i, value in enumerate(values)]
