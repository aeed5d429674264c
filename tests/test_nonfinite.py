"""Values that are not finite never reach a parameter, wherever they come from, and leave a trace that says where."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rwft import loop
from rwft.config import Config, to_yaml
from rwft.errors import ConfigError, DataError, NonFiniteError
from rwft.loop import train
from rwft.policy import Policy
from rwft.postmortem import Skipped, number
from tests.test_distributed import torchrun
from tests.tiny import tiny

BAD = """
import torch
def bad(logp, progress):
    step = round(float(progress) * {steps})
    return torch.full_like(logp, float("{value}")) if step in {at} else torch.ones_like(logp)
"""


def failing(folder: Path, at: list[int], *overrides: str, steps: int = 6, value: str = "nan") -> Config:
    """A run whose objective gives weights of `value` at the steps `at`."""
    (folder / "bad.py").write_text(BAD.format(at=at, steps=steps, value=value))
    return tiny(folder, f"train.steps={steps}", "train.save_every=1", *overrides, objective=f"{folder}/bad.py:bad")


def state(training: Any) -> str:
    """sha256 over every bit of parameters and optimiser."""
    digest = hashlib.sha256()
    for parameter in training.policy.parameters():
        digest.update(parameter.detach().numpy().tobytes())
        for name, value in sorted(training.optimizer.state.get(parameter, {}).items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """For each step: its index, whether it changed any bit of the state, whether a gradient was left."""
    seen: list[tuple[int, bool, bool]] = []
    right = loop.optimiser_step

    def watched(training: Any, step: int, meter: Any) -> None:
        before = state(training)
        try:
            right(training, step, meter)
        finally:
            left = any(p.grad is not None for p in training.policy.parameters())
            seen.append((step, state(training) != before, left))

    monkeypatch.setattr(loop, "optimiser_step", watched)
    return seen


def into_logits(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """From the third forward of training on, hidden states are multiplied by `factor`."""
    right, calls = Policy.hidden, iter(range(10**6))

    def hidden(self: Policy, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = right(self, *args, **kwargs)
        return out * factor if self.training and next(calls) >= 2 else out

    monkeypatch.setattr(Policy, "hidden", hidden)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_stops_the_run_and_moves_nothing(
    value: str, tmp_path: Path, around: list[tuple[int, bool, bool]]
) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2: objective 'bad' gave a weight that is not finite for row .*:\d"):
        train(failing(tmp_path, [2], value=value))
    assert around == [(0, True, False), (1, True, False), (2, False, False)]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_logits_stop_the_run_and_move_nothing(
    factor: float, tmp_path: Path, around: list[tuple[int, bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    into_logits(monkeypatch, factor)
    with pytest.raises(NonFiniteError, match=r"step 2: a log-probability of row .*rollouts\.jsonl:\d+.* is not finite"):
        train(tiny(tmp_path))
    assert around == [(0, True, False), (1, True, False), (2, False, False)]


def test_a_gradient_alone_stops_the_run(
    tmp_path: Path, around: list[tuple[int, bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwft.training import Training

    right = Training.clip

    def overflowing(self: Training, denominator: float) -> float:
        next(iter(self.policy.trained_parameters().values())).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        return right(self, denominator)

    monkeypatch.setattr(Training, "clip", overflowing)
    with pytest.raises(NonFiniteError, match=r"step 0: the gradient is not finite \(norm inf\)"):
        train(tiny(tmp_path))
    assert around == [(0, False, False)]


LOSS_ALONE = """
import os, torch
calls = iter(range(10**6))
def bad(logp_all):
    here = next(calls) >= 4 and os.environ.get("RANK", "1") == "1"
    return 0 * logp_all.sum(dim=-1) + (float("nan") if here else 0.0)
"""
"""A penalty without slope, from the fifth call on nan: the gradient stays finite, the loss does not."""


def test_a_loss_alone_stops_the_run(tmp_path: Path, around: list[tuple[int, bool, bool]]) -> None:
    (tmp_path / "alone.py").write_text(LOSS_ALONE)
    config = tiny(tmp_path, "train.steps=12")
    with pytest.raises(NonFiniteError, match="the loss is not finite, though its gradient is"):
        train(replace(config, regularize=[{"name": f"{tmp_path}/alone.py:bad", "coef": 1.0}]))
    assert [changed for _, changed, _ in around] == [True] * (len(around) - 1) + [False]
    assert len(around) > 1


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_reward_is_refused_by_the_reader(written: str, tmp_path: Path) -> None:
    rows = ['{"prompt": "a", "completion": "b", "reward": 1.0}'] * 6
    rows[4] = f'{{"prompt": "a", "completion": "b", "reward": {written}}}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"rows\.jsonl:5"):
        train(tiny(tmp_path, f"data.path={tmp_path}/rows.jsonl", objective="rwr"))
    assert not (tmp_path / "run").exists()


def test_the_dump_names_the_rows_and_holds_no_text(tmp_path: Path) -> None:
    """Two rows of eight have reward 2: the objective gives those inf, the others 0.5."""
    data = tmp_path / "rows.jsonl"
    rewards = [2.0 * (i in (2, 5)) for i in range(8)]
    rows = [{"prompt": f"secret{i}", "completion": "words"[: 1 + i % 4], "reward": r} for i, r in enumerate(rewards)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    weight = "(reward > 1).double() / (reward < 1).double() + 0.5"
    (tmp_path / "bad.py").write_text(f"def bad(reward):\n    return {weight}\n")
    overrides = (f"data.path={data}", "data.eval_fraction=0", "train.batch_size=3", "train.accumulate=3")
    with pytest.raises(NonFiniteError, match=r"see .*nonfinite\.json, or set train\.on_nonfinite=skip"):
        train(tiny(tmp_path, *overrides, objective=f"{tmp_path}/bad.py:bad"))
    text = (tmp_path / "run" / "nonfinite.json").read_text()
    dump = json.loads(text)
    assert (dump["step"], dump["objective"], dump["gradient_norm"]) == (0, "bad", "nan")
    assert [row["source"] for row in dump["rows"][:2]] in ([f"{data}:3", f"{data}:6"], [f"{data}:6", f"{data}:3"])
    by_line = {int(row["source"].rpartition(":")[2]): row for row in dump["rows"]}
    assert sorted(by_line) == list(range(1, 9))
    for line, row in by_line.items():
        bad = line in (3, 6)
        expected = ("inf", "inf") if bad else (0.5, 0.5)
        assert (row["weight_min"], row["weight_max"]) == expected
        assert (row["weights_finite"], row["logp_finite"], row["reward"]) == (not bad, True, 2.0 if bad else 0.0)
        assert row["tokens"] == 1 + (line - 1) % 4 + 1  # the letters, and the end of the sequence
        assert row["nll"] == pytest.approx(math.log(100), rel=0.05)  # random weights: uniform over 100 characters
    assert "secret" not in text
    assert "wor" not in text


def test_the_run_says_that_it_failed_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(failing(tmp_path, [2]))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
    assert status["error"].startswith("NonFiniteError: step 2: objective 'bad'")
    assert (tmp_path / "run" / status["checkpoint"] / "model.safetensors").is_file()


def test_the_command_line_ends_with_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rwft.cli import main

    (tmp_path / "c.yaml").write_text(to_yaml(failing(tmp_path, [0])))
    monkeypatch.setattr("sys.argv", ["rwft", "train", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 5
    assert "rwft: step 0: objective 'bad' gave a weight that is not finite" in capsys.readouterr().err


def skipping(folder: Path, at: list[int], steps: int = 6) -> Config:
    return failing(folder, at, "train.on_nonfinite=skip", steps=steps)


def logged(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "skipped/sum" in line}


def test_a_skipped_step_changes_no_bit_and_is_counted(tmp_path: Path, around: list[tuple[int, bool, bool]]) -> None:
    train(skipping(tmp_path, [1, 2, 4]))
    assert around == [(step, step not in (1, 2, 4), False) for step in range(6)]
    lines = logged(tmp_path)
    assert [lines[step]["skipped/sum"] for step in range(1, 7)] == [0, 1, 2, 2, 3, 3]
    assert [step for step in range(1, 7) if "nll/mean" in lines[step]] == [1, 4, 6]
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["step"] == 4


def test_three_in_a_row_are_too_many(tmp_path: Path, around: list[tuple[int, bool, bool]]) -> None:
    with pytest.raises(NonFiniteError, match=r"step 3: .*; it is the 3rd step in a row that is not finite"):
        train(skipping(tmp_path, [1, 2, 3]))
    assert [step for step, _, _ in around] == [0, 1, 2, 3]
    assert not any(changed for step, changed, _ in around if step > 0)


def test_ten_are_too_many(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 19: .*; it is the 10th step that is not finite"):
        train(skipping(tmp_path, list(range(1, 24, 2)), steps=24))


def test_what_was_skipped_is_remembered_by_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loop.optimiser_step

    def dies(training: Any, step: int, meter: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt
        right(training, step, meter)

    monkeypatch.setattr(loop, "optimiser_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(skipping(tmp_path, [1, 2, 3]))
    monkeypatch.setattr(loop, "optimiser_step", right)
    with pytest.raises(NonFiniteError, match=r"step 3: .*; it is the 3rd step in a row"):
        train(skipping(tmp_path, [1, 2, 3]))


def test_the_running_kl_does_not_take_what_was_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[float] = []
    right: Callable[..., Any] = loop.optimiser_step

    def watched(training: Any, step: int, meter: Any) -> None:
        right(training, step, meter)
        running.append(training.kl_running)

    monkeypatch.setattr(loop, "optimiser_step", watched)
    into_logits(monkeypatch, math.nan)  # steps 2 and 3
    train(tiny(tmp_path, "train.on_nonfinite=skip", objective="kto"))
    assert running[0] != running[1] == running[2] == running[3]


def test_the_limits() -> None:
    assert Skipped(2, 2).too_many() is None
    assert Skipped(9, 1).too_many() is None
    assert "3rd" in (Skipped(3, 3).too_many() or "")
    assert "10th" in (Skipped(10, 1).too_many() or "")
    assert [number(x) for x in (1.5, math.nan, math.inf, -math.inf)] == [1.5, "nan", "inf", "-inf"]


def test_another_policy_than_abort_and_skip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.on_nonfinite: 'skipp' is unknown; did you mean 'skip'"):
        tiny(tmp_path, "train.on_nonfinite=skipp")


ONE_RANK = """
import hashlib, json, os, sys
from accelerate import PartialState
import rwft.loop as loop
from rwft.config import load_config
from rwft.errors import NonFiniteError

world, folder = int(sys.argv[1]), sys.argv[2]
rank = PartialState(cpu=True).process_index
right, changed = loop.optimiser_step, []


def state(training):
    tensors = [p.detach() for p in training.policy.parameters()]
    tensors += [v for s in training.optimizer.state.values() for v in s.values()]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def watched(training, step, meter):
    before = state(training)
    try:
        right(training, step, meter)
    finally:
        changed.append(state(training) != before)


loop.optimiser_step = watched
found = {}
for name in sys.argv[3:]:
    changed.clear()
    try:
        loop.train(load_config(f"{folder}/{name}.yaml"))
        error = None
    except NonFiniteError as caught:
        error = str(caught)
    found[name] = {"changed": list(changed), "error": error}
with open(f"{folder}/rank{rank}.json", "w") as handle:
    json.dump(found, handle)
"""


@pytest.mark.distributed
def test_one_rank_stops_or_skips_for_all(tmp_path: Path, root: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "import os, torch\n"
        "def bad(logp, progress):\n"
        "    here = os.environ['RANK'] == '1' and round(float(progress) * 4) == 2\n"
        "    return torch.full_like(logp, float('nan')) if here else torch.ones_like(logp)\n"
    )
    (tmp_path / "alone.py").write_text(LOSS_ALONE)
    for name in ("abort", "skip"):
        more = ("train.batch_size=4", "train.accumulate=2", f"train.on_nonfinite={name}")
        config = tiny(tmp_path, *more, objective=f"{tmp_path}/bad.py:bad", name=name)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    alone = replace(config, objective="sft", output=str(tmp_path / "alone"))
    alone = replace(alone, train=replace(alone.train, on_nonfinite="abort", steps=12))
    alone = replace(alone, regularize=[{"name": f"{tmp_path}/alone.py:bad", "coef": 1.0}])
    (tmp_path / "alone.yaml").write_text(to_yaml(alone))
    torchrun(2, tmp_path, ["abort", "skip", "alone"], root, script=ONE_RANK)
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert one["abort"]["changed"] == [True, True, False]
    assert one["alone"]["changed"][-2:] == [True, False]
    assert "the loss is not finite, though its gradient is" in one["alone"]["error"]
    assert "step 2: objective 'bad' gave a weight that is not finite for row" in one["abort"]["error"]
    assert one["skip"] == {"changed": [True, True, False, True], "error": None}
    dump = json.loads((tmp_path / "abort" / "nonfinite.json").read_text())
    assert len(dump["rows"]) == 16  # 26 rows in steps of 16: this is the first of the second epoch, 8 rows a rank
    assert sum(not row["weights_finite"] for row in dump["rows"]) == 8
