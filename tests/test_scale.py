"""What must not grow with the data: rows stay in their file, log-probabilities come in parts that outlive a crash."""

from __future__ import annotations

import bisect
import itertools
import json
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rwft.config import CreditConfig, DataConfig
from rwft.data import columns, logprobs
from rwft.data import rows as rows_module
from rwft.data.batching import Batch, Plan
from rwft.data.characters import character_tokenizer
from rwft.data.credit import fit
from rwft.data.logprobs import by_length, length_batches, parts, row_logp
from rwft.data.prepare import prepare, split
from rwft.data.rows import BLOCK, Rows, open_rows, write_rows
from rwft.loop import train
from rwft.policy import load_policy
from rwft.progress import Display
from tests.tiny import tiny


def rows(folder: Path, number: int = 2 * BLOCK + 100) -> Rows:
    """Row i: ids i, i+1, ...; 1 to 5 targets, all but the first trained; groups of three; each seventh has weights."""

    def record(i: int) -> dict[str, Any]:
        t = 1 + i % 5
        given: dict[str, Any] = dict.fromkeys(("value", "behavior_logp", "step_position", "step_reward", "answer"))
        given |= {"ids": list(range(i, i + t + 1)), "mask": [j > 0 or t == 1 for j in range(t)]}
        given |= {"weight": [2.0] * t if i % 7 == 0 else None, "reward": float(i), "group": f"g{i // 3}"}
        return given | {"file": "f.jsonl", "row": i, "prompt": ""}

    write_rows(map(record, range(number)), folder / "rows.arrow")
    return open_rows(folder / "rows.arrow", "key")


def test_rows_are_taken_from_their_blocks_in_the_order_asked_for(tmp_path: Path) -> None:
    whole = rows(tmp_path)
    asked = [BLOCK, 0, 2 * BLOCK + 99, BLOCK - 1, 0]
    taken = whole.take(asked)
    assert taken["row"] == asked
    assert taken["ids"] == [list(range(i, i + i % 5 + 2)) for i in asked]
    assert whole.source(BLOCK).row == BLOCK


def test_a_subset_copies_nothing_and_keeps_its_rows(tmp_path: Path) -> None:
    whole = rows(tmp_path)
    keep = np.arange(len(whole)) % 2 == 1
    half = whole.subset(keep, "odd").subset(np.arange(len(whole) // 2) >= 11, "later")
    assert half.reader is whole.reader
    assert len(half) == len(whole) // 2 - 11
    expected = np.arange(23, len(whole), 2)
    assert half.reward.tolist() == expected.tolist()
    assert half.length.tolist() == (1 + expected % 5).tolist()
    assert half.trained.tolist() == np.maximum(expected % 5, 1).tolist()
    assert half.take([0, 700])["row"] == [23, 1423]
    assert half.source(700).row == 1423
    assert half.missing("weight").tolist() == (expected % 7 != 0).tolist()
    assert len({whole.fingerprint, whole.subset(keep, "odd").fingerprint, half.fingerprint}) == 3
    assert whole.has("reward")
    assert not whole.has("weight")


def test_a_split_holds_out_whole_groups_whatever_the_order(tmp_path: Path) -> None:
    whole = rows(tmp_path)
    train_rows, held = split(whole, 0.25)
    assert len(train_rows) + len(held) == len(whole)
    assert not set(train_rows.group) & set(held.group)
    assert 0.2 < len(held) / len(whole) < 0.3
    kept = whole.subset(whole.reward >= 600, "some")
    assert set(split(kept, 0.25)[1].reward) == {r for r in held.reward if r >= 600}


def test_batches_of_similar_length_keep_groups_together() -> None:
    length, group = np.array([5, 1, 9, 2, 9, 3]), np.array([7, 8, 7, 8, 9, 9])
    every = np.arange(6)
    assert by_length(length, every, None).tolist() == [1, 3, 5, 0, 2, 4]
    assert by_length(length, every, group).tolist() == [1, 3, 0, 2, 5, 4]  # by longest: 8, then 7 and 9
    batches = [part.tolist() for part in length_batches(length, every, group, most=18)]
    assert batches == [[1, 3, 0], [2, 5], [4]]  # 3 x 5, 2 x 9, 1 x 9
    narrower = [part.tolist() for part in length_batches(length, every, group, most=17)]
    assert narrower == [[1, 3, 0], [2], [5], [4]]  # beside a row of 9 targets one of 3 takes 9 as well


def test_parts_are_consecutive_rows_of_about_as_many_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "PART", 100)
    whole = rows(tmp_path)
    cut = parts(whole)
    assert np.concatenate(cut).tolist() == list(range(len(whole)))
    assert all(95 <= whole.length[part].sum() <= 105 for part in cut[:-1])


def test_an_interrupted_reference_goes_on_with_the_next_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft import frozen

    train(tiny(tmp_path, objective="iw_sft", name="whole"))
    monkeypatch.setattr(logprobs, "PART", 60)
    seen: list[int] = []

    def dies(*args: Any, **settings: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        return row_logp(*args, **settings)

    cache = f"cache={tmp_path}/other"
    monkeypatch.setattr(frozen, "row_logp", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(tmp_path, cache, objective="iw_sft", name="parts"))
    folder = tmp_path / "other" / "logprobs"
    assert sorted(file.name.split(".", 1)[1] for file in folder.iterdir()) == ["part0.npy", "part1.npy"]
    computed: list[int] = []

    def counts(policy: Any, collate: Any, length: Any, indices: Any, **settings: Any) -> Any:
        computed.extend(indices.tolist())
        return row_logp(policy, collate, length, indices, **settings)

    monkeypatch.setattr(frozen, "row_logp", counts)
    train(tiny(tmp_path, cache, objective="iw_sft", name="parts"))
    assert min(computed) > 0
    assert len(computed) == len(set(computed))
    assert [file.suffixes for file in folder.iterdir()] == [[".npy"]]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(float((one[name] - two[name]).abs().max()) < 1e-9 for name in one)


@pytest.mark.parametrize("others_have_it", [True, False])
def test_a_part_is_taken_if_every_rank_has_it(
    others_have_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks on another disk would wait for ever for the one that goes on without computing."""
    from rwft import frozen

    class Rank:
        num_processes, process_index, is_main_process, device = 2, 0, True, torch.device("cpu")

        def reduce(self, value: torch.Tensor, _how: str) -> torch.Tensor:
            return value + float(others_have_it)

    config, whole = tiny(tmp_path, "data.share_prompts=never", "data.pack=never"), rows(tmp_path)
    policy, mine, file = load_policy(config.model, 0), np.arange(7), tmp_path / "part.npy"
    number = int(whole.trained[mine].sum())
    logprobs.write_cached(file, np.full(number, -1.0))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: found)
    monkeypatch.setattr(frozen, "row_logp", lambda *_, **__: {i: np.full(whole.trained[i], -2.0) for i in mine})
    models = frozen.FrozenModels(config, policy, Rank(), Display(None, True))
    found = models._part(policy, whole, mine, file, lambda _: None)
    assert found.tolist() == [-1.0 if others_have_it else -2.0] * number


def test_values_that_another_run_takes_away_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logprobs.write_cached(tmp_path / "part.npy", np.zeros(3))
    right = np.load

    def late(path: Path, **settings: Any) -> Any:
        path.unlink()
        return right(path, **settings)

    monkeypatch.setattr(np, "load", late)
    assert logprobs.read_values(tmp_path / "part.npy", 3) is None


def test_rows_reach_the_model_in_batches_of_the_devices_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "TOKENS_AT_ONCE", {"cpu": 8})
    sizes: list[int] = []

    class Model:
        training = True

        def eval(self) -> None: ...

        def train(self, mode: bool) -> None: ...

        def __call__(self, ids: Any, mask: Any, layout: Any) -> dict[str, torch.Tensor]:
            sizes.append(ids.shape[0] * mask.shape[1])
            return {"logp": ids[:, 1:][mask > 0].double()}

    def collate(indices: Any) -> Batch:
        return Batch(torch.tensor([[0, i, i] for i in indices]), torch.ones(len(indices), 2), indices, {})

    out = row_logp(Model(), collate, np.full(9, 2), np.arange(9), device=torch.device("cpu"), tick=lambda _: None)
    assert sizes == [8, 8, 2]
    assert {index: values.tolist() for index, values in out.items()} == {i: [i, i] for i in range(9)}


def small_parts(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Columns of more than `part` numbers are files, and are worked on in such parts."""
    monkeypatch.setattr(columns, "PART", part)
    monkeypatch.setattr(columns, "SAMPLE", 4 * part)


def on_disk(column: np.ndarray) -> bool:
    while column.base is not None and not isinstance(column, np.memmap):
        column = column.base
    return isinstance(column, np.memmap)


def test_long_columns_are_files_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 10)
    long, short = columns.empty(11, np.int64, tmp_path), columns.empty(10, np.int64, tmp_path)
    long[:], short[:] = np.arange(11), 7
    stacked = columns.stack([(long[:6], short[:1]), (long[6:], short[:1])], tmp_path)
    assert [on_disk(column) for column in (long, short, *stacked)] == [True, False, True, False]
    assert [column.tolist() for column in (long, *stacked)] == [list(range(11)), list(range(11)), [7, 7]]
    assert [path for path in tmp_path.iterdir() if path.name != "home"] == []
    assert not on_disk(columns.empty(11, np.int64, None))


@pytest.mark.parametrize("kind", ["random", "few", "one", "sorted", "skewed"])
def test_ranges_hold_every_row_once_and_never_part_equals(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, 50)
    draw = np.random.default_rng(3)
    values = {
        "random": draw.integers(0, 1 << 62, 1000),
        "few": draw.integers(0, 3, 1000),
        "one": np.zeros(1000, dtype=np.int64),
        "sorted": np.arange(1000),
        "skewed": np.exp(draw.normal(size=1000) * 9),
    }[kind]
    found = list(columns.ranges(values, tmp_path))
    assert sorted(np.concatenate(found).tolist()) == list(range(1000))
    assert all((np.diff(rows) > 0).all() for rows in found)
    filled = [values[rows] for rows in found if len(rows)]
    assert all(low.max() < high.min() for low, high in itertools.pairwise(filled))
    if kind in ("random", "sorted", "skewed"):
        assert max(map(len, found)) <= 100  # about a part


def expected_baseline(name: str, row: int, here: list[int], reward: list[Fraction], length: list[int]) -> Fraction:
    """By the definitions, in fractions; `here` are the rows of the row's group."""
    others = [i for i in here if i != row]
    if name == "length_weighted":
        return sum((reward[i] * length[i] for i in here), Fraction(0)) / sum(length[i] for i in here)
    of = {"mean": list(range(len(reward))), "group_mean": here, "leave_one_out": others}[name]
    return sum((reward[i] for i in of), Fraction(0)) / len(of)


def loops(
    reward: list[float], group: list[int], length: list[int], baseline: str
) -> tuple[list[float], dict[str, list[float]]]:
    """Advantages and signals by a pass over the members of the group for each row."""
    exact, ascending = [Fraction(r) for r in reward], sorted(reward)
    advantage: list[float] = []
    signals: dict[str, list[float]] = {"group_mean": [], "group_above": [], "reward_above": []}
    for row, name in enumerate(group):
        here = [i for i in range(len(group)) if group[i] == name]
        alone = baseline != "mean" and len(here) == 1
        advantage.append(0.0 if alone else float(exact[row] - expected_baseline(baseline, row, here, exact, length)))
        signals["group_mean"].append(float(expected_baseline("group_mean", row, here, exact, length)))
        signals["group_above"].append(sum(reward[i] > reward[row] for i in here) / len(here))
        signals["reward_above"].append((len(reward) - bisect.bisect_right(ascending, reward[row])) / len(reward))
    return advantage, signals


@pytest.mark.parametrize("baseline", ["mean", "group_mean", "leave_one_out", "length_weighted"])
@pytest.mark.parametrize("continuous", [True, False])
def test_credit_in_parts_is_that_of_plain_loops(
    baseline: str, continuous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, 64)
    draw = np.random.default_rng(5)
    reward = draw.integers(-1000, 1000, 700) / 64 if continuous else draw.integers(0, 3, 700).astype(float)
    group, length = draw.integers(0, 200, 700) * 10**15, draw.integers(1, 50, 700)
    given = (reward, group, length)
    credit = fit(CreditConfig(baseline=baseline), *given, folder=tmp_path)
    expected, signals = loops(reward.tolist(), group.tolist(), length.tolist(), baseline)
    out = credit.advantage(*given, folder=tmp_path)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    found = credit.signals(*given, folder=tmp_path)
    for name, values in signals.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-15, err_msg=name)
    assert on_disk(out)
    assert on_disk(credit.groups.mean)
    assert credit.std == pytest.approx(statistics.stdev(reward), rel=1e-12)
    assert credit.level.tolist() == sorted(set(reward.tolist()))


@pytest.mark.parametrize("scale", ["none", "group_std"])
def test_parts_change_no_bit_of_what_a_group_gets(scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(6)
    given = (draw.normal(size=3000), draw.integers(0, 1 << 60, 400)[draw.integers(0, 400, 3000)], np.ones(3000))
    config = CreditConfig(baseline="leave_one_out", scale=scale)
    whole = fit(config, *given)
    expected = whole.advantage(*given), whole.signals(*given)
    small_parts(monkeypatch, 100)
    parted = fit(config, *given, folder=tmp_path)
    assert np.array_equal(parted.advantage(*given, folder=tmp_path), expected[0])
    assert all(np.array_equal(values, expected[1][name]) for name, values in parted.signals(*given).items())
    some = draw.permutation(3000)[:2000]  # rows of fitted groups and of others, where half of them were fitted
    fitted = given[1] < 1 << 59
    half = fit(config, given[0][fitted], given[1][fitted], given[2][fitted], folder=tmp_path)
    new = tuple(x[some] for x in given)
    in_parts = half.advantage(*new, folder=tmp_path)
    monkeypatch.setattr(columns, "PART", 1 << 18)
    assert np.array_equal(in_parts, half.advantage(*new))


def test_the_order_and_the_groups_of_a_long_epoch_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length, group = np.ones(500, dtype=np.int64), np.random.default_rng(0).integers(0, 1 << 60, 120).repeat(5)[:500]
    kinds: dict[str, Any] = {"rows": {}, "groups": {"group": group}}
    steps = {
        name: [Plan(length, batch_size=8, accumulate=2, world=1, seed=3, **kind).window(s).tolist() for s in range(40)]
        for name, kind in kinds.items()
    }
    assert sorted(itertools.chain.from_iterable(steps["rows"][:32])) == list(range(500))
    small_parts(monkeypatch, 40)
    for name, kind in kinds.items():
        plan = Plan(length, batch_size=8, accumulate=2, world=1, seed=3, folder=tmp_path, **kind)
        assert [plan.window(s).tolist() for s in range(40)] == steps[name]
    groups = Plan(length, batch_size=8, accumulate=1, world=1, seed=3, folder=tmp_path, group=group).units
    assert groups is not None
    assert [len(set(group[groups[unit]])) for unit in range(len(groups))] == [1] * len(set(group.tolist()))
    assert on_disk(groups[3])


def test_rows_on_disk_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = rows(tmp_path, 300)
    small_parts(monkeypatch, 64)
    filed = open_rows(tmp_path / "rows.arrow", "key")
    keep = np.arange(300) % 3 > 0
    names = ("where", "reward", "value", "group", "length", "trained")
    for one, other in ((held, filed), (held.subset(keep, "some"), filed.subset(keep, "some"))):
        for name in names:
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
            assert on_disk(getattr(other, name)), name
    assert filed.reward.tolist() == list(range(300))
    assert filed.subset(keep, "some").where.tolist() == [i for i in range(300) if i % 3]


def test_blocks_end_where_tokens_weigh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "TOKENS", 10)
    whole = rows(tmp_path, 50)
    assert max(map(len, rows_module._blocks(whole.reader))) <= 5  # rows of 2 to 6 ids
    assert whole.take([49, 0, 7])["ids"] == [list(range(i, i + i % 5 + 2)) for i in (49, 0, 7)]
    assert whole.source(33).row == 33


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from rwft.config import CreditConfig
from rwft.data import columns
from rwft.data.credit import fit
columns.PART = 1 << 14
rows, folder = int(sys.argv[1]), Path(sys.argv[2])
own = lambda: int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
reward, group, length = (columns.empty(rows, kind, folder) for kind in (float, int, int))
draw = np.random.default_rng(0)
for part in columns.spans(rows):
    size = part.stop - part.start
    reward[part], length[part] = draw.normal(size=size), 1
    group[part] = draw.integers(0, 1 << 60, size // 4)[np.arange(size) % (size // 4)]
before = own()
credit = fit(CreditConfig(baseline="leave_one_out"), reward, group, length, folder=folder)
held = [credit.advantage(reward, group, length, folder=folder), credit.signals(reward, group, length, folder=folder)]
print(own() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_memory_of_credit_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def grown(number: int) -> int:
        command = [sys.executable, "-c", MEMORY, str(number), str(tmp_path)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # KiB

    more = (grown(400_000) - grown(100_000)) * 1024 / 300_000
    assert more < 8  # bytes a row; what is kept are twelve numbers of eight bytes


def test_a_second_start_neither_parses_nor_tokenises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"prompt": f"p{i // 2}", "completion": "ab", "reward": i % 3}) for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.2)
    tokenizer, reads = character_tokenizer(), frozenset({"reward"})
    first = prepare(data, tokenizer, reads, tmp_path / "cache")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work of the first start was done again")

    monkeypatch.setattr("rwft.data.prepare.read_examples", never)
    monkeypatch.setattr("rwft.data.tokenize.Tokenize.batch", never)
    second = prepare(data, tokenizer, reads, tmp_path / "cache")
    assert second.train.take(range(len(first.train))) == first.train.take(range(len(first.train)))
    assert second.train.fingerprint == first.train.fingerprint
    assert second.report.lines() == first.report.lines()
