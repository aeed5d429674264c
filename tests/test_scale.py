"""What must not grow with the data: rows stay in their file, log-probabilities come in parts that outlive a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rwft.data import logprobs
from rwft.data.batching import Batch
from rwft.data.logprobs import by_length, length_batches, parts, row_logp
from rwft.data.prepare import split
from rwft.data.rows import BLOCK, Rows, open_rows, write_rows
from rwft.loop import train
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
    assert half.table is whole.table
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


def test_rows_reach_the_model_in_batches_of_the_devices_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "TOKENS_AT_ONCE", {"cpu": 8})
    sizes: list[int] = []

    class Model:
        training = True

        def eval(self) -> None: ...

        def train(self, mode: bool) -> None: ...

        def __call__(self, ids: Any, mask: Any, shared: Any) -> dict[str, torch.Tensor]:
            sizes.append(ids.shape[0] * mask.shape[1])
            return {"logp": ids[:, 1:][mask > 0].double()}

    def collate(indices: Any) -> Batch:
        return Batch(torch.tensor([[0, i, i] for i in indices]), torch.ones(len(indices), 2), indices, {})

    out = row_logp(Model(), collate, np.full(9, 2), np.arange(9), device=torch.device("cpu"), tick=lambda _: None)
    assert sizes == [8, 8, 2]
    assert {index: values.tolist() for index, values in out.items()} == {i: [i, i] for i in range(9)}
