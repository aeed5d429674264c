"""Rows of weight zero by data alone: which they are, by hand, and what is said of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from rwft.config import Config
from rwft.data.prepare import Prepared, prepare
from rwft.idle import idle_note, idle_rows
from rwft.inspection import inspect_config
from rwft.loop import train
from rwft.policy import load_tokenizer
from rwft.progress import Display
from rwft.registry import Entry
from rwft.signals import SIGNALS
from rwft.temperature import row_signals
from rwft.weighting import Objective, build_objective, objective
from tests.tiny import tiny

REWARD = " (reward 0; to push them away give them -1, e.g. adapter: {name: binary, label: <column>, bad: -1})"
ADVANTAGE = " (advantage 0; to push them away: data.credit.baseline=mean, or group_mean)"


def prepared(config: Config) -> Prepared:
    reads = build_objective(config.objective).reads
    return prepare(config.data, load_tokenizer(config.model), reads, Path(config.cache))


def nowhere(data: Prepared) -> NDArray[np.bool_]:
    return np.zeros(len(data.train), dtype=bool)


def reward_0(data: Prepared) -> NDArray[np.bool_]:
    return data.train.reward == 0


def as_its_group(data: Prepared) -> NDArray[np.bool_]:
    """The reward is the mean of the group's, which in a group of one it always is."""
    reward, group = data.train.reward, data.train.group
    return np.array([reward[i] == reward[group == group[i]].mean() for i in range(len(reward))])


def unpaired(data: Prepared) -> NDArray[np.bool_]:
    """No other row of the group has another reward."""
    reward, group = data.train.reward, data.train.group
    return np.array([len(set(reward[group == group[i]])) == 1 for i in range(len(reward))])


@pytest.mark.parametrize(
    ("spec", "overrides", "expected", "remedy"),
    [
        ("topr", (), reward_0, REWARD),
        (["topr", "dft"], (), reward_0, REWARD),
        ("reinforce", (), reward_0, ADVANTAGE),
        ("topr_geometric", (), reward_0, ADVANTAGE),
        ("ppo_clip", (), reward_0, ADVANTAGE),
        (["dft", "reinforce"], (), reward_0, ADVANTAGE),
        (["dft", "filtered_bc"], (), reward_0, ""),  # -1 would be filtered too
        (["topr", "filtered_bc"], (), reward_0, ""),
        ("filtered_bc", (), reward_0, ""),
        ("topr_geometric", ("data.credit.baseline=mean",), nowhere, None),
        ("topr_geometric", ("data.credit.baseline=group_mean",), as_its_group, ""),
        ("nft", (), nowhere, None),
        ("rwr", (), nowhere, None),
        ("sft", (), nowhere, None),
        ("dft", (), nowhere, None),
        ("dpo", (), unpaired, ""),
    ],
)
def test_rows_of_weight_zero_by_data_alone(
    spec: Any, overrides: tuple[str, ...], expected: Any, remedy: str | None, tmp_path: Path
) -> None:
    config = tiny(tmp_path, *overrides, objective=spec)
    data, built = prepared(config), build_objective(spec)
    idle = expected(data)
    assert idle_rows(built, data).tolist() == idle.tolist()
    note = f"note: {idle.sum()} of {len(idle)} rows have weight zero by data alone under '{built}'{remedy}"
    assert idle_note(built, data) == ([] if remedy is None else [note])
    console = Console(width=300, record=True, file=io.StringIO())
    with Display(console, main=True) as display:
        inspect_config(config, display)
    assert ("no row has weight zero by data alone" if remedy is None else note) + "\n" in console.export_text()


def test_rewards_below_0_need_no_advice(tmp_path: Path) -> None:
    """Rewards of 1, 0 and -1: those of 0 still weigh nothing."""
    config = tiny(tmp_path, objective="topr")
    file = Path(config.data.path)
    file.write_text(file.read_text().replace("[0.0, ", "[-1.0, "))
    data = prepared(config)
    assert (data.train.reward == -1).any()
    assert idle_rows(build_objective("topr"), data).tolist() == (data.train.reward == 0).tolist()
    assert idle_note(build_objective("topr"), data)[0].endswith("under 'topr'")


def test_a_run_says_so_in_its_first_lines(tmp_path: Path) -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    config = tiny(tmp_path, "train.steps=1", objective="topr")
    train(config, console=console)
    number = int(reward_0(prepared(config)).sum())
    assert f"note: {number} of 26 rows have weight zero by data alone under 'topr'{REWARD}\n" in console.export_text()


def alone(entry: Entry) -> bool:
    required = any(setting.required for setting in entry.settings.values())
    return "group" not in entry.reads and not required


@pytest.mark.parametrize("name", [name for name in objective if alone(objective.entry(name))])
@pytest.mark.parametrize("baseline", ["none", "group_mean"])
def test_what_is_called_idle_is_zero_at_other_policies_too(name: str, baseline: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, f"data.credit.baseline={baseline}", objective=name)
    data, built = prepared(config), build_objective(name)
    idle = idle_rows(built, data)
    draw, rows = torch.Generator().manual_seed(7), len(idle)
    for _ in range(20):
        signals = {}
        for signal, kind in SIGNALS.items():
            values = torch.rand(rows, 5 if kind.axes.startswith("b t") else 1, generator=draw, dtype=torch.float64)
            values = -4 * values if signal.endswith("logp") else values
            signals[signal] = values if kind.axes else values[0, 0]
        signals |= {"mask": torch.ones(rows, 5, dtype=torch.float64), **row_signals(data)}
        weights = Objective(built.factors)(signals).expand(rows, 5)
        assert not weights[torch.from_numpy(idle)].any()
