r"""From rewards to advantages, by statistics that are fitted once over the training rows.

.. math:: A = \mathrm{clip}\left((R - b) \, s + \mathrm{shift}\right)

The baseline `b` and the scale `s` are fitted over the data set, where offline data make them
exact, so no row's advantage depends on its batch; or the data bring `b` along, a value for each
row that a critic or other samples gave. All arrays are float64, one number per row; where a
`folder` is given, long ones are files there (see `rwft.data.columns`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rwft.config import CreditConfig
from rwft.data.columns import empty, ranges, spans, stack
from rwft.data.rounding import meet_level, meet_members
from rwft.errors import CheckpointError, ConfigError, DataError

GROUP_EPSILON = 1e-6  # added to a group's standard deviation, as in GRPO
OF_GROUPS = ("group_mean", "leave_one_out", "length_weighted")
LARGEST = 1e100  # of a reward: far beyond it a variance would overflow
SHARED = ("none", "mean")  # baselines that are one number for all rows, besides a number itself
LISTED = 1 << 13  # numbers that are made text at once
VALUE = "value"  # the baseline that the data give, row by row

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Groups:
    """Statistics of groups, one value per group (ids ascending) or, taken for rows, one per row."""

    id: Integers
    size: Integers
    mean: Floats
    std: Floats  # unbiased, over size - 1; 0 for a group of one
    length_mean: Floats  # of the rewards, weighted by the completions' lengths

    def take(self, index: Integers) -> Groups:
        """The statistics of the groups at `index`."""
        return Groups(*(getattr(self, field.name)[index] for field in fields(self)))


class Terms(NamedTuple):
    """What turns the return `R` of each row into `(R - baseline) * gain`: `(n), (n)`."""

    baseline: Floats
    gain: Floats


@dataclass(frozen=True, eq=False)
class Credit:
    """Fitted credit: the settings, the data set's statistics and its groups'.

    `level` are the distinct rewards, ascending; `above` the fraction of rows with a greater one.
    Rows of a fitted group are taken for the very rows it was fitted on. Groups that were not
    fitted (held-out prompts) have their statistics computed among the rows given, so give a
    held-out split whole. Statistics of the data set are always the fitted ones.
    """

    config: CreditConfig
    mean: float
    std: float  # unbiased; 0 for a single row
    level: Floats
    above: Floats
    groups: Groups

    def advantage(
        self,
        reward: ArrayLike,
        group: ArrayLike,
        lengths: ArrayLike,
        value: ArrayLike | None = None,
        *,
        folder: Path | None = None,
    ) -> Floats:
        """`(n), (n), (n), (n) -> (n)`: one advantage a row; `value` is the baseline under `baseline: value`.

        Raises DataError for a reward (or value, where it is the baseline) that is missing or not
        finite, and if all fitted rewards are equal but are to be scaled by their standard deviation.
        """
        return self.of_terms(reward, self.terms(reward, group, lengths, value, folder=folder), folder=folder)

    def of_terms(self, reward: ArrayLike, terms: Terms, *, folder: Path | None = None) -> Floats:
        """`(n), ((n), (n)) -> (n)`: the advantage of each row that has these terms."""
        rewards = _rewards(reward)
        out = empty(len(rewards), np.float64, folder)
        for part in spans(len(rewards)):
            out[part] = self._finish((rewards[part] - terms.baseline[part]) * terms.gain[part])
        return out

    def terms(
        self,
        reward: ArrayLike,
        group: ArrayLike,
        lengths: ArrayLike,
        value: ArrayLike | None = None,
        *,
        folder: Path | None = None,
    ) -> Terms:
        """`(n), (n), (n), (n) -> (n), (n)`: baseline and gain of each row.

        A row alone in its group gets (0, 0) or (0, 1), by the setting `singleton`, wherever its
        group is asked for. A group whose rewards are all equal has its very reward as baseline;
        under `group_std` its gain is 0.
        """
        rewards, ids, sizes = _rewards(reward), _integers(group), _lengths(lengths)
        values = _values(value, len(rewards)) if self.config.baseline == VALUE else None
        out = Terms(*(empty(len(rewards), np.float64, folder) for _ in Terms._fields))
        for rows in ranges(ids, folder):
            here = self.of_rows(rewards[rows], ids[rows], sizes[rows])
            baseline = self._baseline(rewards[rows], here) if values is None else values[rows]
            out.baseline[rows], out.gain[rows] = self._alone(here, baseline, self._gain(here))
        return out

    def _alone(self, here: Groups, baseline: Floats, gain: Floats) -> Terms:
        if self.config.baseline not in OF_GROUPS and self.config.scale != "group_std":
            return Terms(baseline, gain)
        alone = here.size == 1
        return Terms(np.where(alone, 0.0, baseline), np.where(alone, float(self.config.singleton == "reward"), gain))

    def token_advantage(
        self, steps: Sequence[tuple[int, float]], targets: int, baseline: float | None = None, gain: float | None = None
    ) -> Floats:
        """`k steps -> (t)`: advantages of one row with per-step rewards, `steps` being (last target position, reward).

        A step's targets are those behind the previous step's last one, through its own; what
        follows the last step (the end token) belongs to it. Under `reward_to_go` a step's return is
        its reward plus `discount` times the next one's return, under `own` its reward alone.
        `baseline` and `gain` are the row's terms, needed where they differ from row to row.
        """
        positions, values = _steps(steps, targets)
        if self.config.steps == "none":
            raise ConfigError(
                "data.credit.steps: none, so there are no per-step advantages; choose reward_to_go or own"
            )
        if self.config.steps == "reward_to_go":
            values = _returns(values, self.config.discount)
        if baseline is None or gain is None:
            baseline, gain = self._shared_terms()
        step = np.searchsorted(positions, np.arange(targets), side="left").clip(max=len(positions) - 1)
        return self._finish((values - baseline) * gain)[step]

    def signals(
        self, reward: ArrayLike, group: ArrayLike, lengths: ArrayLike, *, folder: Path | None = None
    ) -> dict[str, Floats]:
        """What objectives may read of a whole split's rewards, by signal name: `(n)` each, `reward_max ()`.

        `group_std` is over n, as in NFT. `group_above` counts among the rows given, the rest as fitted.
        """
        rewards, ids, sizes = _rewards(reward), _integers(group), _lengths(lengths)
        names = ("group_mean", "group_std", "group_above", "reward_above")
        out = {name: empty(len(rewards), np.float64, folder) for name in names}
        for rows in ranges(ids, folder):
            here = self.of_rows(rewards[rows], ids[rows], sizes[rows])
            level, rank = np.unique(rewards[rows], return_inverse=True)
            out["group_mean"][rows] = here.mean
            out["group_std"][rows] = here.std * np.sqrt((here.size - 1) / here.size)
            out["group_above"][rows] = _group_above(rank, ids[rows])
            out["reward_above"][rows] = self._above(level)[rank]
        return out | {"reward_max": self.level[-1]}

    def _above(self, level: Floats) -> Floats:
        """`(k)` ascending rewards -> the fraction of fitted rows above each."""
        below = np.searchsorted(self.level, level, side="right") - 1  # the greatest fitted reward that is no greater
        return np.where(below < 0, 1.0, self.above[below])

    def of_rows(self, reward: ArrayLike, group: ArrayLike, lengths: ArrayLike) -> Groups:
        """`(n), (n), (n)`: the statistics of each row's group, `(n)` each."""
        rewards, ids, sizes = _rewards(reward), _integers(group), _lengths(lengths)
        place = np.searchsorted(self.groups.id, ids).clip(max=len(self.groups.id) - 1)
        new = self.groups.id[place] != ids
        out = self.groups.take(place)
        if new.any():
            fresh, index = group_statistics(rewards[new], ids[new], sizes[new])
            for field in fields(Groups):
                getattr(out, field.name)[new] = getattr(fresh, field.name)[index]
        return out

    def _baseline(self, reward: Floats, here: Groups) -> Floats:
        name = self.config.baseline
        if name == "group_mean":
            return here.mean
        if name == "length_weighted":
            return here.length_mean
        if name == "leave_one_out":  # (sum - R) / (n - 1), written so that it is exact where all rewards are equal
            return here.mean - (reward - here.mean) / np.maximum(here.size - 1, 1)
        return np.full(len(reward), self._shared_baseline())

    def _gain(self, here: Groups) -> Floats:
        if self.config.scale == "group_std":
            return np.where(here.std > 0, 1 / (here.std + GROUP_EPSILON), 0.0)
        return np.full(len(here.std), self._shared_gain())

    def _shared_gain(self) -> float:
        if self.config.scale != "std":
            return 1.0
        if self.std == 0:
            raise DataError(f"data.credit.scale: std, but all rewards are {self.mean:g}; use scale: none")
        return 1 / self.std

    def _shared_baseline(self) -> float:
        if self.config.baseline in SHARED:
            return self.mean if self.config.baseline == "mean" else 0.0
        return float(self.config.baseline)

    def _shared_terms(self) -> tuple[float, float]:
        if self.config.baseline in (VALUE, *OF_GROUPS) or self.config.scale == "group_std":
            raise ConfigError(
                f"data.credit: baseline {self.config.baseline} with scale {self.config.scale} differs from row to row; "
                "per-step advantages need the row's own terms"
            )
        return self._shared_baseline(), self._shared_gain()

    def _finish(self, advantage: Floats) -> Floats:
        shifted = advantage + self.config.shift
        return shifted if self.config.clip is None else shifted.clip(-self.config.clip, self.config.clip)

    def to_json(self) -> str:
        """Everything as JSON; floats come back exactly."""
        return "".join(self.json_parts())

    def json_parts(self) -> Iterator[str]:
        """The text of `to_json` in parts, each of a few thousand numbers, however many groups there are."""
        numbers = {"config": asdict(self.config), "mean": self.mean, "std": self.std}
        yield json.dumps(numbers, allow_nan=False).removesuffix("}")
        for name in ("level", "above"):
            yield from _listed(f', "{name}": ', getattr(self, name))
        for number, field in enumerate(fields(Groups)):
            yield from _listed(
                f', "{field.name}": ' if number else f', "groups": {{"{field.name}": ', getattr(self.groups, field.name)
            )
        yield "}}"

    @classmethod
    def from_json(cls, text: str) -> Credit:
        """What `to_json` wrote. Raises CheckpointError for anything else."""
        try:
            content = json.loads(text)
            level, above = _floats(content["level"]), _floats(content["above"])
            config, groups = CreditConfig(**content["config"]), content["groups"]
            ids, size = _integers(groups["id"]), _integers(groups["size"])
            columns = [_floats(groups[name]) for name in ("mean", "std", "length_mean")]
            return cls(config, float(content["mean"]), float(content["std"]), level, above, Groups(ids, size, *columns))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"credit: not what was saved by a run: {type(error).__name__}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Credit) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]  # equal by value, and holds arrays


def _listed(before: str, values: NDArray[Any]) -> Iterator[str]:
    """`before`, then the values as a JSON list."""
    yield f"{before}["
    for start in range(0, len(values), LISTED):
        text = json.dumps(values[start : start + LISTED].tolist(), allow_nan=False)
        yield (", " if start else "") + text[1:-1]
    yield "]"


def fit(
    config: CreditConfig,
    reward: ArrayLike,
    group: ArrayLike,
    lengths: ArrayLike,
    sources: Sequence[Any] = (),
    *,
    folder: Path | None = None,
) -> Credit:
    """`(n), (n), (n)`: the statistics of the training rows: rewards, integer group ids, trained tokens of each.

    Raises DataError, naming the row (by `sources`, if given), for a reward that is missing or not
    finite; ConfigError for `steps: own` with a baseline or scale made for whole sequences.
    """
    _require_step_units(config)
    rewards, ids, sizes = _rewards(reward, sources), _integers(group), _lengths(lengths)
    if len(rewards) == 0:
        raise DataError("credit: found no rows to fit on, expected at least one")
    parts = (group_statistics(rewards[rows], ids[rows], sizes[rows])[0] for rows in ranges(ids, folder))
    columns = stack(([getattr(part, field.name) for field in fields(Groups)] for part in parts), folder)
    level, above = stack(_levels(rewards, folder), folder)
    return Credit(config, *_mean_and_std(rewards, level), level, above, Groups(*columns))


def _levels(rewards: Floats, folder: Path | None) -> Iterator[tuple[Floats, Floats]]:
    """The distinct rewards, ascending, and the fraction of rows above each, in parts."""
    seen = 0
    for rows in ranges(rewards, folder):
        level, counts = np.unique(rewards[rows], return_counts=True)
        yield level, (len(rewards) - seen - counts.cumsum()) / len(rewards)
        seen += len(rows)


def _mean_and_std(rewards: Floats, level: Floats) -> tuple[float, float]:
    """Mean and unbiased standard deviation, exact where all are equal."""
    if len(level) == 1:
        return float(rewards[0]), 0.0
    mean = meet_level(float(rewards.mean()), level)
    squares = sum(float(np.square(rewards[part] - mean).sum()) for part in spans(len(rewards)))
    return mean, float(np.sqrt(squares / (len(rewards) - 1)))


def group_statistics(reward: Floats, group: Integers, lengths: NDArray[Any]) -> tuple[Groups, Integers]:
    """`(n), (n), (n) -> g groups, (n)`: statistics of each group, and which of them each row belongs to."""
    ids, index, size = np.unique(group, return_inverse=True, return_counts=True)
    some = np.empty(len(ids))
    some[index] = reward  # some member's reward: if no other differs, the means are exactly it
    equal = np.bincount(index, reward != some[index]) == 0
    mean = np.where(equal, some, np.bincount(index, reward) / size)
    length_mean = np.where(equal, some, np.bincount(index, reward * lengths) / np.bincount(index, lengths))
    meet_members(mean, reward, index, size)
    meet_members(length_mean, reward, index, size)
    squares = np.bincount(index, (reward - mean[index]) ** 2)
    return Groups(ids, size.astype(np.int64), mean, np.sqrt(squares / np.maximum(size - 1, 1)), length_mean), index


def _group_above(rank: Integers, group: Integers) -> Floats:
    """`(n), (n) -> (n)`: the fraction of each row's group that has a greater rank."""
    _, index, size = np.unique(group, return_inverse=True, return_counts=True)
    key = index * (rank.max() + 1) + (rank.max() - rank)  # by group, greatest rank first; equal keys are ties
    order = np.argsort(key)
    new_key = np.diff(key[order], prepend=-1) != 0
    ahead = np.maximum.accumulate(np.where(new_key, np.arange(len(key)), 0))  # rows before the ties, in all groups
    out = np.empty(len(key))
    out[order] = (ahead - (np.cumsum(size) - size)[index[order]]) / size[index[order]]
    return out


def _returns(rewards: Floats, discount: float) -> Floats:
    """`(k) -> (k)`: each step's reward plus the discounted return of the next."""
    out = rewards.copy()
    for k in range(len(out) - 2, -1, -1):
        out[k] += discount * out[k + 1]
    return out


def _steps(steps: Sequence[tuple[int, float]], targets: int) -> tuple[Integers, Floats]:
    positions = np.array([position for position, _ in steps], np.int64)
    rewards = np.array([reward for _, reward in steps], np.float64)
    if len(steps) == 0 or positions[0] < 0 or positions[-1] >= targets or (np.diff(positions) <= 0).any():
        raise DataError(f"steps: found positions {positions.tolist()}, expected ascending ones in [0, {targets})")
    if not np.isfinite(rewards).all():
        raise DataError(f"steps: found rewards {rewards.tolist()}, expected finite numbers")
    return positions, rewards


def _require_step_units(config: CreditConfig) -> None:
    """A step's own reward is not in the unit of a sequence's: only a number may be taken from it."""
    if config.steps == "own" and (config.baseline in ("mean", VALUE, *OF_GROUPS) or config.scale != "none"):
        raise ConfigError(
            f"data.credit: baseline {config.baseline} with scale {config.scale} measures whole sequences, but "
            "steps: own gives each step its own; use a baseline that is none or a number, or steps: reward_to_go"
        )


def _values(value: ArrayLike | None, rows: int) -> Floats:
    """What the data expected of each row. Raises ConfigError if there is none, DataError for one that is not finite."""
    if value is None:
        raise ConfigError("data.credit.baseline: value, but no values were given; give one for each row")
    values = _rewards(value, what="value")
    if values.shape != (rows,):
        raise DataError(f"value: found shape {values.shape}, expected ({rows},), one for each row")
    return values


def _rewards(reward: ArrayLike, sources: Sequence[Any] = (), what: str = "reward") -> Floats:
    values = np.asarray(reward, np.float64)
    finite = all(bool((np.abs(values[part]) <= LARGEST).all()) for part in spans(len(values)))
    if not finite:
        bad = np.flatnonzero(~(np.abs(values) <= LARGEST))
        place = sources[bad[0]] if len(sources) else f"row {bad[0]} of {len(values)}"
        more = f" (and in {len(bad) - 1} more rows)" if len(bad) > 1 else ""
        raise DataError(f"{place}: {what}: found {values[bad[0]]}{more}, expected a finite number within +-{LARGEST:g}")
    return values


def _integers(values: ArrayLike) -> Integers:
    return np.asarray(values, np.int64)


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, np.float64)


def _lengths(lengths: ArrayLike) -> NDArray[Any]:
    values = np.asarray(lengths)
    if len(values) and not values.min() > 0:
        raise DataError(f"credit: found a length of {values.min():g} tokens, expected at least 1 in every row")
    return values
