"""Credit: hand-worked tables, invariances, and references written as plain loops in float64."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwft.config import CreditConfig
from rwft.data.credit import Credit, fit
from rwft.errors import CheckpointError, ConfigError, DataError

# Two groups and one row alone; group 7: mean 1, unbiased variance (1 + 1 + 4) / 2 = 3
REWARD = [2.0, 0.0, 5.0, 1.0, 3.0, 0.0]
GROUP = [7, 7, 2, -4, 2, 7]
LENGTH = [1, 2, 3, 9, 1, 2]
# group 7: rewards 2, 0, 0 (mean 2/3, variance ((4/3)^2 + 2 (2/3)^2) / 2 = 4/3); group 2: 5, 3 (mean 4, variance 2)
# all: sum 11, mean 11/6; squares 4 + 25 + 1 + 9 = 39, variance (39 - 121/6) / 5 = 113/30
STD = math.sqrt(113 / 30)
S7, S2 = math.sqrt(4 / 3) + 1e-6, math.sqrt(2) + 1e-6


VALUE = [1.5, 0.25, 4.0, 0.5, 5.0, -1.0]  # what a critic expected of each row


def advantage(reward: Any = REWARD, group: Any = GROUP, length: Any = LENGTH, **settings: Any) -> np.ndarray:
    value = VALUE if settings.get("baseline") == "value" else None
    return fit(CreditConfig(**settings), reward, group, length).advantage(reward, group, length, value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, REWARD),
        ({"baseline": "mean"}, [r - 11 / 6 for r in REWARD]),
        ({"baseline": "1.5"}, [0.5, -1.5, 3.5, -0.5, 1.5, -1.5]),
        ({"baseline": "-1"}, [3.0, 1.0, 6.0, 2.0, 4.0, 1.0]),
        ({"baseline": "group_mean"}, [4 / 3, -2 / 3, 1.0, 0.0, -1.0, -2 / 3]),
        ({"baseline": "group_mean", "singleton": "reward"}, [4 / 3, -2 / 3, 1.0, 1.0, -1.0, -2 / 3]),
        # the others' mean: 0, 1, 3, -, 5, 1
        ({"baseline": "leave_one_out"}, [2.0, -1.0, 2.0, 0.0, -2.0, -1.0]),
        ({"baseline": "leave_one_out", "singleton": "reward"}, [2.0, -1.0, 2.0, 1.0, -2.0, -1.0]),
        # group 7: (2*1 + 0 + 0) / 5 = 0.4; group 2: (5*3 + 3*1) / 4 = 4.5
        ({"baseline": "length_weighted"}, [1.6, -0.4, 0.5, 0.0, -1.5, -0.4]),
        # each row's own: 2 - 1.5, 0 - 0.25, 5 - 4, 1 - 0.5 (alone, and yet it has one), 3 - 5, 0 + 1
        ({"baseline": "value"}, [0.5, -0.25, 1.0, 0.5, -2.0, 1.0]),
        ({"baseline": "value", "scale": "std", "shift": 1.0}, [a / STD + 1 for a in (0.5, -0.25, 1.0, 0.5, -2.0, 1.0)]),
        ({"baseline": "value", "clip": 0.75}, [0.5, -0.25, 0.75, 0.5, -0.75, 0.75]),
        ({"baseline": "value", "scale": "group_std"}, [0.5 / S7, -0.25 / S7, 1 / S2, 0.0, -2 / S2, 1 / S7]),
        ({"scale": "std"}, [r / STD for r in REWARD]),
        ({"baseline": "mean", "scale": "std"}, [(r - 11 / 6) / STD for r in REWARD]),
        (
            {"baseline": "group_mean", "scale": "group_std"},
            [4 / 3 / S7, -2 / 3 / S7, 1 / S2, 0.0, -1 / S2, -2 / 3 / S7],
        ),
        ({"scale": "group_std"}, [2 / S7, 0.0, 5 / S2, 0.0, 3 / S2, 0.0]),
        (
            {"baseline": "0.5", "scale": "group_std", "singleton": "reward"},
            [1.5 / S7, -0.5 / S7, 4.5 / S2, 1.0, 2.5 / S2, -0.5 / S7],
        ),
        ({"baseline": "group_mean", "shift": 0.1}, [4 / 3 + 0.1, -2 / 3 + 0.1, 1.1, 0.1, -0.9, -2 / 3 + 0.1]),
        # the shift comes before the clip and after the scale
        ({"baseline": "group_mean", "shift": -0.5, "clip": 0.75}, [0.75, -0.75, 0.5, -0.5, -0.75, -0.75]),
        ({"scale": "std", "shift": 1.0}, [r / STD + 1 for r in REWARD]),
    ],
)  # fmt: skip
def test_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    out = advantage(**settings)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("scale", ["none", "group_std"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "length_weighted"])
def test_a_group_of_equal_rewards_has_advantage_zero_exactly(baseline: str, scale: str) -> None:
    # in floating point the mean of three times 0.1 is not 0.1, nor that of 0.9 and 0.9 with lengths 7 and 2
    reward = [0.1, 0.1, 0.1, 1.0, 0.0, *[1e99] * 7, 0.9, 0.9]
    group, length = [0, 0, 0, 1, 1, *[2] * 7, 3, 3], [3, 1, 7, 1, 1, *range(1, 8), 7, 2]
    out = advantage(reward, group, length, baseline=baseline, scale=scale)
    assert out[:3].tolist() == [0.0] * 3
    assert out[5:].tolist() == [0.0] * 9
    assert out[3] > 0 > out[4]
    assert advantage([0.1] * 3, [0, 1, 1], [1] * 3, baseline="mean").tolist() == [0.0] * 3


def test_a_group_without_spread_says_nothing_under_group_std() -> None:
    assert advantage([3.0, 3.0, 1.0, 0.0], [0, 0, 1, 1], [1] * 4, scale="group_std").tolist()[:2] == [0.0, 0.0]


rewards = st.lists(st.integers(-8, 8).map(float), min_size=2, max_size=24)


@given(rewards, st.integers(1, 4), st.floats(0.5, 4), st.floats(-50, 50))
def test_invariances(reward: list[float], groups: int, factor: float, offset: float) -> None:
    r, g, n = np.array(reward), np.arange(len(reward)) % groups, np.ones(len(reward))
    moved = factor * r + offset
    for baseline in ("mean", "group_mean", "leave_one_out", "length_weighted"):  # Dr.GRPO and its kin: shifts
        np.testing.assert_allclose(
            advantage(r + offset, g, n, baseline=baseline), advantage(r, g, n, baseline=baseline), atol=1e-12
        )
        np.testing.assert_allclose(
            advantage(moved, g, n, baseline=baseline), factor * advantage(r, g, n, baseline=baseline), atol=1e-11
        )
    grpo = {"baseline": "group_mean", "scale": "group_std"}
    # exactly affine but for the constant added to the standard deviation, which is 0 or at least 1/5 here
    np.testing.assert_allclose(advantage(moved, g, n, **grpo), advantage(r, g, n, **grpo), rtol=2e-5, atol=1e-10)
    if len(set(reward)) > 1:
        z = {"baseline": "mean", "scale": "std"}
        np.testing.assert_allclose(advantage(moved, g, n, **z), advantage(r, g, n, **z), rtol=1e-10, atol=1e-10)


@given(rewards, st.integers(1, 4))
def test_sums_over_groups_vanish_and_leaving_one_out_stretches(reward: list[float], groups: int) -> None:
    g = np.arange(len(reward)) % groups
    n = np.arange(1, len(reward) + 1)
    mean, out = advantage(reward, g, n, baseline="group_mean"), advantage(reward, g, n, baseline="leave_one_out")
    weighted = advantage(reward, g, n, baseline="length_weighted")
    for group in range(groups):
        here = g == group
        assert abs(mean[here].sum()) < 1e-12
        assert abs((weighted * n)[here].sum()) < 1e-10
        if (size := int(here.sum())) > 1:
            np.testing.assert_allclose(out[here], size / (size - 1) * mean[here], atol=1e-12)


@pytest.mark.parametrize("discrete", [False, True])
def test_against_plain_loops(discrete: bool) -> None:
    rng = np.random.default_rng(1)
    reward = rng.integers(0, 3, 500).astype(float) if discrete else rng.normal(size=500)
    group, length = rng.integers(-50, 50, 500) * 10**12, rng.integers(1, 99, 500)
    credit = fit(CreditConfig(baseline="leave_one_out", scale="group_std"), reward, group, length)
    out, signals = credit.advantage(reward, group, length), credit.signals(reward, group, length)
    for i in range(500):
        members = [j for j in range(500) if group[j] == group[i]]
        others = [float(reward[j]) for j in members if j != i]
        here = [float(reward[j]) for j in members]
        expected = (reward[i] - statistics.fmean(others)) / (statistics.stdev(here) + 1e-6) if others else 0.0
        assert out[i] == pytest.approx(expected, rel=1e-11)
        assert signals["group_mean"][i] == pytest.approx(statistics.fmean(here), rel=1e-12)
        assert signals["group_std"][i] == pytest.approx(statistics.pstdev(here), rel=1e-12, abs=1e-15)
        assert signals["group_above"][i] == sum(r > reward[i] for r in here) / len(here)
        assert signals["reward_above"][i] == sum(r > reward[i] for r in reward) / 500
    assert signals["reward_max"] == max(reward)


def test_statistics_of_groups() -> None:
    credit = fit(CreditConfig(), REWARD, GROUP, LENGTH)
    assert credit.mean == pytest.approx(11 / 6, rel=1e-15)
    assert credit.std == pytest.approx(STD, rel=1e-15)
    rows = credit.of_rows(REWARD, GROUP, LENGTH)
    assert rows.size.tolist() == [3, 3, 2, 1, 2, 3]
    np.testing.assert_allclose(rows.std, [math.sqrt(4 / 3)] * 2 + [math.sqrt(2), 0, math.sqrt(2), math.sqrt(4 / 3)])
    signals = credit.signals(REWARD, GROUP, LENGTH)
    np.testing.assert_allclose(signals["group_std"], [math.sqrt(8 / 9)] * 2 + [1, 0, 1, math.sqrt(8 / 9)])
    assert signals["group_above"].tolist() == [0, 1 / 3, 0, 0, 1 / 2, 1 / 3]
    assert signals["reward_above"].tolist() == [2 / 6, 4 / 6, 0, 3 / 6, 1 / 6, 4 / 6]
    assert signals["reward_max"].tolist() == 5.0


def test_held_out_rows_use_what_was_fitted_and_new_groups_themselves() -> None:
    reward, group, length = [10.0, 20.0, 30.0, 40.0], [5, 5, 2, 99], [1, 3, 1, 1]

    def held_out(**settings: Any) -> list[float]:
        return fit(CreditConfig(**settings), REWARD, GROUP, LENGTH).advantage(reward, group, length).tolist()

    assert held_out(baseline="mean") == pytest.approx([r - 11 / 6 for r in reward])
    assert held_out(scale="std") == pytest.approx([r / STD for r in reward])
    assert held_out(baseline="group_mean") == pytest.approx([-5.0, 5.0, 26.0, 0.0])  # group 2 was fitted: mean 4
    assert held_out(baseline="length_weighted") == pytest.approx([-7.5, 2.5, 25.5, 0.0])
    signals = fit(CreditConfig(), REWARD, GROUP, LENGTH).signals([5.5, 5.0, -1.0, 2.5], group, length)
    assert signals["reward_above"].tolist() == [0.0, 0.0, 1.0, 2 / 6]
    assert signals["reward_max"] == 5.0


def test_the_order_of_rows_does_not_matter() -> None:
    order = [3, 5, 0, 4, 2, 1]
    plain = advantage(baseline="leave_one_out", scale="group_std")
    mixed = advantage(
        *(np.array(x)[order] for x in (REWARD, GROUP, LENGTH)), baseline="leave_one_out", scale="group_std"
    )
    np.testing.assert_allclose(mixed, plain[order], rtol=1e-14)


# Steps: 8 targets, steps that end on targets 2, 4 and 5; labels good, neutral, bad
STEPS = [(2, 1.0), (4, 0.0), (5, -1.0)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"steps": "own"}, [1.0, 0.0, -1.0]),
        ({"steps": "own", "baseline": "0.25", "shift": 0.5, "clip": 1.0}, [1.0, 0.25, -0.75]),
        ({"steps": "reward_to_go"}, [0.0, -1.0, -1.0]),
        ({"steps": "reward_to_go", "discount": 0.5}, [0.75, -0.5, -1.0]),
        ({"steps": "reward_to_go", "discount": 0.0}, [1.0, 0.0, -1.0]),
        ({"steps": "reward_to_go", "discount": 0.5, "baseline": "0.25"}, [0.5, -0.75, -1.25]),
        ({"steps": "reward_to_go", "baseline": "mean"}, [-11 / 6, -17 / 6, -17 / 6]),
        ({"steps": "reward_to_go", "baseline": "mean", "scale": "std"}, [-11 / 6 / STD, -17 / 6 / STD, -17 / 6 / STD]),
    ],
)
def test_steps_by_hand(settings: dict[str, Any], steps: list[float]) -> None:
    credit = fit(CreditConfig(**settings), REWARD, GROUP, LENGTH)
    first, second, third = steps
    expected = [first] * 3 + [second] * 2 + [third] * 3  # the targets behind the last step belong to it
    np.testing.assert_allclose(credit.token_advantage(STEPS, 8), expected, rtol=1e-14)


def test_steps_of_one_equal_the_sequence() -> None:
    for settings in (
        {"baseline": "leave_one_out"},
        {"baseline": "group_mean", "scale": "group_std", "singleton": "reward"},
    ):
        credit = fit(CreditConfig(steps="reward_to_go", **settings), REWARD, GROUP, LENGTH)  # type: ignore[arg-type]
        whole, terms = credit.advantage(REWARD, GROUP, LENGTH), credit.terms(REWARD, GROUP, LENGTH)
        for i, reward in enumerate(REWARD):
            row = credit.token_advantage([(1, reward)], 3, terms.baseline[i], terms.gain[i])
            assert row.tolist() == [whole[i]] * 3
        with pytest.raises(ConfigError, match=r"^data\.credit: baseline .* differs from row to row"):
            credit.token_advantage(STEPS, 8)


def test_steps_less_the_rows_value() -> None:
    """Returns 0, -1, -1 less the row's 0.25; where the terms are not given, there is no common one."""
    credit = fit(CreditConfig(baseline="value", steps="reward_to_go"), REWARD, GROUP, LENGTH)
    terms = credit.terms(REWARD, GROUP, LENGTH, VALUE)
    assert terms.baseline.tolist() == VALUE
    row = credit.token_advantage(STEPS, 8, terms.baseline[1], terms.gain[1])
    assert row.tolist() == [-0.25] * 3 + [-1.25] * 5
    with pytest.raises(ConfigError, match=r"^data\.credit: baseline value .* differs from row to row"):
        credit.token_advantage(STEPS, 8)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, ConfigError, r"^data\.credit\.baseline: value, but no values were given"),
        ([0.0, math.nan, 0, 0, 0, 0], DataError, r"^row 1 of 6: value: found nan, expected a finite number"),
        ([0.0, 1.0], DataError, r"^value: found shape \(2,\), expected \(6,\)"),
    ],
)
def test_values_that_are_missing_are_refused(value: Any, error: type[Exception], message: str) -> None:
    credit = fit(CreditConfig(baseline="value"), REWARD, GROUP, LENGTH)
    with pytest.raises(error, match=message):
        credit.advantage(REWARD, GROUP, LENGTH, value)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], r"found positions \[\], expected ascending ones in \[0, 8\)"),
        ([(8, 1.0)], r"found positions \[8\]"),
        ([(-1, 1.0)], r"found positions \[-1\]"),
        ([(3, 1.0), (3, 1.0)], r"found positions \[3, 3\]"),
        ([(3, 1.0), (2, 1.0)], r"found positions \[3, 2\]"),
        ([(3, math.nan)], r"found rewards \[nan\], expected finite"),
    ],
)
def test_steps_that_are_wrong(steps: list[tuple[int, float]], message: str) -> None:
    with pytest.raises(DataError, match=rf"^steps: {message}"):
        fit(CreditConfig(steps="own"), REWARD, GROUP, LENGTH).token_advantage(steps, 8)


def test_steps_must_be_asked_for_and_in_one_unit() -> None:
    with pytest.raises(ConfigError, match=r"^data\.credit\.steps: none"):
        fit(CreditConfig(), REWARD, GROUP, LENGTH).token_advantage(STEPS, 8)
    for settings in ({"baseline": "mean"}, {"baseline": "group_mean"}, {"baseline": "value"}, {"scale": "std"}):
        with pytest.raises(ConfigError, match=r"^data\.credit: baseline .* measures whole sequences"):
            fit(CreditConfig(steps="own", **settings), REWARD, GROUP, LENGTH)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e101, None])
def test_rewards_that_are_missing_are_refused(bad: Any) -> None:
    reward = [1.0, bad, bad]
    with pytest.raises(
        DataError, match=r"^row 1 of 3: reward: found (nan|inf|-1e\+101) \(and in 1 more rows\), expected a finite"
    ):
        fit(CreditConfig(), reward, [0, 0, 0], [1, 1, 1])
    with pytest.raises(DataError, match=r"^b\.jsonl:4: reward"):
        fit(CreditConfig(), reward, [0, 0, 0], [1, 1, 1], sources=["b.jsonl:3", "b.jsonl:4", "b.jsonl:5"])
    with pytest.raises(DataError, match=r"^row 0 of 1: reward"):
        fit(CreditConfig(), REWARD, GROUP, LENGTH).advantage([bad], [0], [1])


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(DataError, match="found no rows"):
        fit(CreditConfig(), [], [], [])
    with pytest.raises(DataError, match="found a length of 0 tokens"):
        fit(CreditConfig(), [1.0], [0], [0])
    for reward in ([0.1, 0.1, 0.1], [2.0]):
        n = len(reward)
        with pytest.raises(DataError, match=r"^data\.credit\.scale: std, but all rewards are"):
            advantage(reward, [0] * n, [1] * n, scale="std")


def test_saved_and_read_again_it_is_the_same() -> None:
    rng = np.random.default_rng(0)
    reward, group, length = (
        rng.normal(size=99) * 10.0 ** rng.integers(-90, 90, 99),
        rng.integers(0, 20, 99),
        rng.integers(1, 9, 99),
    )
    credit = fit(
        CreditConfig(baseline="0.1", clip=3.0, scale="group_std", steps="reward_to_go", discount=0.9),
        reward,
        group,
        length,
    )
    again = Credit.from_json(credit.to_json())
    assert again == credit
    assert again.advantage(reward, group, length).tolist() == credit.advantage(reward, group, length).tolist()
    assert again.config == credit.config
    assert fit(CreditConfig(), reward, group, length) != credit
    assert fit(credit.config, -reward, group, length) != credit
    for text in ("", "{}", "[]", json.dumps({**json.loads(credit.to_json()), "mean": "x"})):
        with pytest.raises(CheckpointError, match=r"^credit: not what was saved"):
            Credit.from_json(text)


def test_the_text_comes_in_parts_that_do_not_grow_with_the_groups() -> None:
    """The text is that of one call on the plain values; no part of it has more than 8192 numbers of 25 characters."""
    for rows in (1, 8192, 8193, 40_000):
        draw = np.random.default_rng(rows)
        reward, length = draw.normal(size=rows), draw.integers(1, 9, rows)
        credit = fit(CreditConfig(baseline="group_mean"), reward, np.arange(rows), length)
        columns = {name: getattr(credit.groups, name).tolist() for name in ("id", "size", "mean", "std", "length_mean")}
        numbers = {"mean": credit.mean, "std": credit.std}
        levels = {"level": credit.level.tolist(), "above": credit.above.tolist()}
        parts = list(credit.json_parts())
        assert "".join(parts) == json.dumps({"config": asdict(credit.config), **numbers, **levels, "groups": columns})
        assert max(map(len, parts)) <= max(8192 * 25, 400)
    assert len(parts) > 7 * 4


@pytest.mark.parametrize("baseline", ["mean", "group_mean", "leave_one_out", "length_weighted"])
def test_a_reward_at_the_mean_has_advantage_zero_exactly(baseline: str) -> None:
    """Tenths are no binary fractions: the mean of -1.0, -0.7 and -0.4 comes out 1e-16 below -0.7."""
    tenths = [g for g in itertools.combinations_with_replacement(range(-10, 11), 3) if 3 * sorted(g)[1] == sum(g)]
    for group in [*tenths, (-3, 1, 2, 0)]:
        reward, same = np.array(group) / 10, np.zeros(len(group), dtype=np.int64)
        credit = fit(CreditConfig(baseline=baseline), reward, same, same + 1)
        advantage = credit.advantage(reward, same, same + 1)
        away = np.array(group) * len(group) - sum(group)
        assert (np.sign(advantage) == np.sign(away)).all(), group


@pytest.mark.parametrize("baseline", ["mean", "group_mean"])
def test_a_small_difference_is_no_rounding(baseline: str) -> None:
    reward, same = np.array([0.1, 0.7, 0.4 + 1e-12]), np.zeros(3, dtype=np.int64)
    assert fit(CreditConfig(baseline=baseline), reward, same, same + 1).advantage(reward, same, same + 1)[2] > 0
