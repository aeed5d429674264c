"""The order of rows, and the shapes of batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwft.data.batching import Plan, permutation
from rwft.errors import ConfigError, DataError


def plan(rows: int = 22, batch_size: int = 4, accumulate: int = 1, world: int = 1, **more: object) -> Plan:
    length = np.random.default_rng(0).integers(1, 60, rows)
    return Plan(length, batch_size=batch_size, accumulate=accumulate, world=world, seed=3, **more)  # type: ignore[arg-type]


def step_rows(p: Plan, step: int) -> list[int]:
    return sorted(int(i) for rank in range(p.world) for part in p.micro_batches(step, rank) for i in part)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_each_row_comes_once_per_epoch(rows: int, batch_size: int, accumulate: int, world: int) -> None:
    p = plan(rows, batch_size, accumulate, world)
    for epoch in range(2):
        first = epoch * p.steps_per_epoch
        seen = [i for step in range(first, first + p.steps_per_epoch) for i in step_rows(p, step)]
        assert sorted(seen) == list(range(rows))


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))
def test_every_rank_has_as_many_micro_batches(rows: int, batch_size: int, accumulate: int, world: int) -> None:
    p = plan(rows, batch_size, accumulate, world)
    for step in range(p.steps_per_epoch):
        counts = [len(p.micro_batches(step, rank)) for rank in range(world)]
        assert len(set(counts)) == 1
        assert counts[0] >= 1
        assert max(len(part) for rank in range(world) for part in p.micro_batches(step, rank)) <= batch_size


def test_a_step_has_the_same_rows_however_it_is_cut() -> None:
    cuts = [plan(64, 16, 1, 1), plan(64, 1, 16, 1), plan(64, 4, 4, 1), plan(64, 4, 2, 2), plan(64, 2, 2, 4)]
    for step in range(8):
        assert len({tuple(step_rows(p, step)) for p in cuts}) == 1


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    assert (permutation(100, 1, 0) == permutation(100, 1, 0)).all()
    assert (permutation(100, 1, 0) != permutation(100, 1, 1)).any()
    assert (permutation(100, 1, 0) != permutation(100, 2, 0)).any()
    forwards, backwards = plan(), plan()
    there = [step_rows(forwards, s) for s in range(12)]
    back = [step_rows(backwards, s) for s in reversed(range(12))][::-1]
    assert there == back


def test_rows_of_a_step_are_cut_by_length() -> None:
    p = plan(64, 4, 4)
    lengths = [p.length[i] for part in p.micro_batches(0, 0) for i in part]
    assert lengths == sorted(lengths, reverse=True)


def test_groups_stay_whole() -> None:
    group = np.repeat(np.arange(10), [2, 4, 1, 3, 2, 4, 2, 2, 1, 3])
    np.random.default_rng(1).shuffle(group)
    p = plan(24, 4, 2, 2, group=group)
    seen: list[int] = []
    for step in range(p.steps_per_epoch):
        for rank in range(2):
            for part in p.micro_batches(step, rank):
                assert len(part) <= 4
                for g in np.unique(group[part]):
                    assert (group[part] == g).sum() == (group == g).sum()
                seen += part.tolist()
    assert sorted(seen) == list(range(24))


def test_a_group_larger_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"largest group \(5 rows\).*train.batch_size=5"):
        plan(5, 4, group=np.zeros(5, dtype=np.int64))


def test_rows_without_weight_are_not_forwarded_but_keep_their_place() -> None:
    alive = np.arange(22) % 3 > 0
    with_all, without = plan(), plan(alive=alive)
    for step in range(with_all.steps_per_epoch):
        assert step_rows(without, step) == [i for i in step_rows(with_all, step) if alive[i]]
        assert sorted(without.window(step)) == sorted(with_all.window(step))


def test_a_step_whose_rows_all_weigh_nothing_still_has_a_micro_batch_on_every_rank() -> None:
    p = plan(8, 2, 1, 2, alive=np.zeros(8, dtype=bool))
    assert [[len(part) for part in p.micro_batches(0, rank)] for rank in range(2)] == [[0], [0]]


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        plan(0)


def cost(p: Plan, parts: list[np.ndarray], pass_tokens: float) -> float:
    """Padded tokens, and what the passes but the first cost."""
    return sum(len(part) * p.length[part].max() for part in parts) + (len(parts) - 1) * pass_tokens


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 40))
def test_a_micro_batch_is_cut_where_that_costs_least(lengths: list[int], pass_tokens: int) -> None:
    n = len(lengths)
    p = Plan(np.array(lengths), batch_size=n, accumulate=1, world=1, seed=3, pass_tokens=float(pass_tokens))
    parts = p.micro_batches(0, 0)
    order = np.concatenate(parts)
    assert p.length[order].tolist() == sorted(lengths, reverse=True)
    every_cut = [np.split(order, [k for k in range(1, n) if number >> (k - 1) & 1]) for number in range(1 << (n - 1))]
    assert cost(p, parts, pass_tokens) == min(cost(p, cut, pass_tokens) for cut in every_cut)


def test_rows_of_a_prompt_are_not_cut_apart_and_passes_do_not_change_a_step() -> None:
    length, prompt = np.array([50, 2, 45, 2, 3, 40]), np.array([0, 0, 1, 1, 2, 3])
    more = {"batch_size": 6, "accumulate": 1, "world": 1, "seed": 0}
    beside = Plan(length, prompt=prompt, pass_tokens=0.0, **more).micro_batches(0, 0)
    assert [part.tolist() for part in beside] == [[0, 1], [2, 3], [5], [4]]
    apart = Plan(length, pass_tokens=0.0, **more).micro_batches(0, 0)
    assert [sorted(length[part]) for part in apart] == [[50], [45], [40], [3], [2, 2]]
    whole = Plan(length, **more).micro_batches(0, 0)
    assert [sorted(part.tolist()) for part in whole] == [[0, 1, 2, 3, 4, 5]]
