"""A value that the data bring along: from a column of a file to the advantage that an objective reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rwft
from rwft.config import Config
from rwft.data.batching import Collate
from rwft.data.prepare import Prepared, prepare
from rwft.errors import DataError
from rwft.loop import train
from rwft.policy import load_tokenizer
from tests.tiny import tiny

ROWS = [  # reward, value
    (1.0, 0.25),
    (0.0, 0.25),
    (2.0, 3.0),
    (-1.0, -1.5),
]
ADVANTAGE = [0.75, -0.25, -1.0, 0.5]


def write(folder: Path, values: list[Any] | None = None) -> None:
    values = [value for _, value in ROWS] if values is None else values
    rows = [
        {"prompt": f"{i}>", "completion": "ab", "reward": reward, "critic": value}
        for i, ((reward, _), value) in enumerate(zip(ROWS, values, strict=True))
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def valued(folder: Path, *overrides: str, objective: Any = "reinforce") -> Config:
    adapter = "data.adapter={name: scored, value: critic}"
    given = (adapter, "data.credit.baseline=value", "data.eval_fraction=0", "train.steps=2", *overrides)
    return tiny(folder, *given, objective=objective)


def prepared(config: Config, *reads: str) -> Prepared:
    return prepare(config.data, load_tokenizer(config.model), frozenset(reads), Path(config.cache))


def test_the_advantage_is_the_reward_less_the_rows_value(tmp_path: Path) -> None:
    write(tmp_path)
    config = valued(tmp_path)
    data = prepared(config, "advantage")
    assert data.train.value.tolist() == [value for _, value in ROWS]
    known = data.known(data.train)
    assert known["advantage"].tolist() == ADVANTAGE
    assert known["baseline"].tolist() == [value for _, value in ROWS]  # for advantages of steps
    again = prepared(config, "advantage")  # this time from the cache
    assert again.known(again.train)["advantage"].tolist() == ADVANTAGE


def test_values_stay_with_their_rows_in_a_subset(tmp_path: Path) -> None:
    write(tmp_path)
    rows = prepared(valued(tmp_path)).train.subset(np.array([False, True, False, True]), "odd")
    assert rows.value.tolist() == [0.25, -1.5]


@pytest.mark.parametrize("objective", ["awr", "dro", "oreo", "a_lol"])
def test_objectives_get_it_as_their_advantage(objective: str, tmp_path: Path) -> None:
    """The signals of a batch, and the weight at the reference: e^A; A; 2 beta n A at the n-th token; max(A, 0)."""
    write(tmp_path)
    config = valued(tmp_path)
    data = prepared(config, "advantage")
    collate = Collate(data.train, frozenset({"advantage"}), dtype=torch.float64, known=data.known(data.train))
    batch = collate(np.arange(4))
    advantage = torch.tensor(ADVANTAGE, dtype=torch.float64)[:, None]
    torch.testing.assert_close(batch.signals["advantage"], advantage, rtol=0, atol=0)
    zero = torch.zeros_like(batch.mask)
    weights = rwft.build_objective(objective)({**batch.signals, "logp": zero, "ref_logp": zero})
    nth = batch.mask * batch.mask.cumsum(1)
    expected = {
        "awr": advantage.exp() * batch.mask,
        "dro": advantage * batch.mask,
        "oreo": 0.06 * nth * advantage,
        "a_lol": advantage.clamp(min=0) * batch.mask,
    }
    torch.testing.assert_close(weights * batch.mask, expected[objective], rtol=1e-12, atol=0)


def test_a_row_without_a_value_is_named(tmp_path: Path) -> None:
    write(tmp_path, [0.25, 0.25, None, -1.5])
    with pytest.raises(DataError, match=r"rollouts\.jsonl:3: no value, but data\.credit\.baseline: value") as caught:
        train(valued(tmp_path))
    assert "adapter: {name: scored, value: <column>}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_objective_that_reads_no_advantage_needs_no_value(tmp_path: Path) -> None:
    """Comparisons share a config: the reward is still there for rwr."""
    write(tmp_path, [0.25, 0.25, None, -1.5])
    data = prepared(valued(tmp_path), "reward")
    known = data.known(data.train)
    assert known["reward"].tolist() == [1.0, 0.0, 2.0, -1.0]
    assert "advantage" not in known


def test_values_that_nothing_reads_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    train(valued(tmp_path, "data.credit.baseline=mean"))
    note = "the data give values, which only data.credit.baseline: value reads"
    assert note in " ".join(capsys.readouterr().err.split())
    train(valued(tmp_path, "output=" + str(tmp_path / "again")))
    assert note not in " ".join(capsys.readouterr().err.split())
