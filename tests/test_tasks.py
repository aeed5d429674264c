"""The embedded task: what its logs hold, against sums over all answers and numbers worked by hand."""

from __future__ import annotations

import itertools
import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwft.data import tasks
from rwft.data.tasks import Behavior, answer, load_task, task_files, write_task
from rwft.errors import ConfigError, DataError, ObjectiveError

ABC = string.ascii_lowercase


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def success_rate(name: str, prompts: list[str], skill: float) -> float:
    """Expected reward of the behaviour policy over `prompts`."""
    return float(np.mean([Behavior(skill).success(answer(name, prompt)) for prompt in prompts]))


@pytest.mark.parametrize(
    ("name", "prompt", "right"),
    [("caesar", "hal>", "ibm"), ("caesar", "xyz>", "yza"), ("reverse", "abcz>", "zcba"), ("reverse", "a>", "a")],
)
def test_answers(name: str, prompt: str, right: str) -> None:
    assert answer(name, prompt) == right


@pytest.mark.parametrize("prompt", ["abc", ">", "ab>c", "aB>", "a b>", ">>", "abc>\n", ""])
def test_what_is_no_prompt(prompt: str) -> None:
    with pytest.raises(DataError, match="expected small letters"):
        answer("caesar", prompt)


def test_hardness_rises_from_a_to_z() -> None:
    behavior = Behavior(0.9)
    assert behavior.right("a") == 1.0
    assert behavior.right("z") == pytest.approx(0.81, rel=1e-12)  # 0.9 ** 2
    assert behavior.right("f") == pytest.approx(0.9**0.4, rel=1e-12)  # sixth letter: 2 * 5 / 25
    chances = [behavior.right(letter) for letter in ABC]
    assert np.exp(np.mean(np.log(chances))) == pytest.approx(0.9, rel=1e-12)  # skill: the geometric mean


def test_logp_by_hand() -> None:
    """Answer `zf` written as `af`: z slips to its neighbour on the circle, f is right, and it stops for sure."""
    got = Behavior(0.9).logp("af", "zf")
    assert got == pytest.approx([math.log((1 - 0.81) / 2), 0.4 * math.log(0.9), 0.0], rel=1e-12)
    assert Behavior(0.9).logp("bf", "zf")[0] == -math.inf
    assert Behavior(0.9).logp("b", "a")[0] == -math.inf  # it never slips on `a`
    assert Behavior(1.0).logp("y", "z")[0] == -math.inf


@pytest.mark.parametrize("skill", [0.6, 0.9, 1.0])
@pytest.mark.parametrize("right", ["zy", "gz", "mn"])
def test_success_and_entropy_against_all_answers(skill: float, right: str) -> None:
    behavior = Behavior(skill)
    chance = {"".join(w): math.exp(sum(behavior.logp("".join(w), right))) for w in itertools.product(ABC, repeat=2)}
    assert sum(chance.values()) == pytest.approx(1.0, abs=1e-12)
    assert behavior.success(right) == pytest.approx(chance[right], rel=1e-12)
    entropy = -sum(p * math.log(p) for p in chance.values() if p > 0)
    assert behavior.entropy(right) == pytest.approx(entropy, abs=1e-12)
    assert max(chance, key=lambda text: chance[text]) == right


def test_logs_are_what_the_behaviour_policy_would_write(tmp_path: Path) -> None:
    """Rewards and log-probabilities recomputed from the text alone; frequencies within 4.5 standard errors."""
    files = write_task("caesar", tmp_path, rows=1500, completions=4, heldout=50, length=5, skill=0.85, seed=3)
    seen = np.zeros((26, 3))
    for row in rows_of(files.train):
        text = row["prompt"][:-1]
        assert row["answer"] == "".join(ABC[(ABC.index(c) + 1) % 26] for c in text)
        for written, reward, logprobs in zip(row["completions"], row["rewards"], row["logprobs"], strict=True):
            assert reward == float(written == row["answer"])
            assert len(logprobs) == 6
            assert logprobs[-1] == 0.0
            for w, r, logp in zip(written, row["answer"], logprobs, strict=False):
                p, off = 0.85 ** (2 * ABC.index(r) / 25), (ABC.index(w) - ABC.index(r) + 1) % 26
                assert off in (0, 1, 2)
                assert logp == pytest.approx(math.log(p if off == 1 else (1 - p) / 2), abs=1e-12)
                seen[ABC.index(r), off] += 1
    for index, counts in enumerate(seen):
        p = 0.85 ** (2 * index / 25)
        for share, expected in zip(counts / counts.sum(), [(1 - p) / 2, p, (1 - p) / 2], strict=True):
            assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / counts.sum()) + 1e-12


def test_success_rate_is_exact_and_agrees_with_the_rewards(tmp_path: Path) -> None:
    files = write_task("reverse", tmp_path, rows=1500, heldout=200, skill=0.9, seed=1)
    held_out = rows_of(files.heldout)
    by_hand = np.mean([np.prod([0.9 ** (2 * ABC.index(c) / 25) for c in row["prompt"][:-1]]) for row in held_out])
    assert files.success == pytest.approx(by_hand, rel=1e-12)
    assert success_rate("reverse", [row["prompt"] for row in held_out], 0.9) == pytest.approx(by_hand, rel=1e-12)
    rows = rows_of(files.train)
    rate = success_rate("reverse", [row["prompt"] for row in rows], 0.9)
    rewards = np.array([row["rewards"] for row in rows])
    assert abs(rewards.mean() - rate) <= 4.5 * math.sqrt(rate * (1 - rate) / rewards.size)
    assert 0.5 < files.success < 0.6
    nll = -np.mean([logp for row in held_out for logprobs in row["logprobs"] for logp in logprobs])
    assert files.nll == pytest.approx(nll, abs=0.03)


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_task("caesar", tmp_path / n, rows=20, heldout=5, seed=7) for n in "ab")
    other = write_task("caesar", tmp_path / "c", rows=20, heldout=5, seed=8)
    assert one.train.read_bytes() == two.train.read_bytes()
    assert one.heldout.read_bytes() == two.heldout.read_bytes()
    assert one.train.read_bytes() != other.train.read_bytes()


def test_no_prompt_comes_twice(tmp_path: Path) -> None:
    files = write_task("caesar", tmp_path, rows=200, heldout=100, length=2)
    prompts = [row["prompt"] for file in (files.train, files.heldout) for row in rows_of(file)]
    assert len(prompts) == 300
    assert len(set(prompts)) == 300


def test_spec_writes_once_and_after_an_interruption_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "caesar", "rows": 10, "heldout": 4}
    real = tasks.write_atomic

    def dies_at_held_out(path: Path, data: Any) -> None:
        if path.name == "heldout.jsonl":
            raise OSError("disk full")
        real(path, data)

    monkeypatch.setattr(tasks, "write_atomic", dies_at_held_out)
    with pytest.raises(OSError, match="disk full"):
        task_files(spec, tmp_path)
    monkeypatch.setattr(tasks, "write_atomic", real)
    train, heldout = task_files(spec, tmp_path)
    assert (len(rows_of(train)), len(rows_of(heldout))) == (10, 4)

    def never(path: Path, data: Any) -> None:
        raise AssertionError(f"{path} was written again")

    monkeypatch.setattr(tasks, "write_atomic", never)
    assert task_files(spec, tmp_path) == (train, heldout)
    loaded = load_task(spec, tmp_path)
    assert loaded.success == pytest.approx(
        success_rate("caesar", [r["prompt"] for r in rows_of(heldout)], 0.9), rel=1e-12
    )


def test_other_settings_live_in_another_folder(tmp_path: Path) -> None:
    first = task_files({"name": "caesar", "rows": 10, "heldout": 4}, tmp_path)
    second = task_files({"name": "caesar", "rows": 10, "heldout": 4, "skill": 0.8}, tmp_path)
    assert first[0].parent != second[0].parent


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("cesar", ConfigError, r"data.task: 'cesar' is unknown; did you mean 'caesar'\?"),
        ({"name": "caesar", "row": 3}, ObjectiveError, r"'row' is no setting of it; did you mean 'rows'\?"),
        ({"name": "caesar", "skill": 0.3}, ObjectiveError, r"skill: found 0.3, expected a number in \[0.6, 1\]"),
        ({"name": "caesar", "rows": 0}, ObjectiveError, r"rows: found 0, expected a whole number >= 1"),
        ({"name": "caesar", "length": 2}, ConfigError, r"1256 prompts are more than half of the 676"),
        (3, ConfigError, r"data.task: found 3"),
    ],
)
def test_mistakes(spec: Any, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        task_files(spec, tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()
