"""`train.head: sampled` in a whole run: what stays exact, what is drawn anew, and that the mean of its steps is exact.

The model has 2000 tokens, far more than are drawn, so that a step's gradient has noise to be measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from rwft import step as steps
from rwft.config import Config
from rwft.errors import ConfigError
from rwft.head import Draws
from rwft.invariance import check_config_command, rehearsal
from rwft.loop import train
from rwft.progress import Display
from rwft.step import draws_of, gradient
from rwft.training import Training
from tests.test_resume import STEPS, cut, losses, states
from tests.tiny import tiny

SHORT = ("train.batch_size=4", "train.accumulate=2", f"train.steps={STEPS}", "train.save_every=1", "train.keep=20")
LARGE = ("model.config.vocab_size=2000", "model.config.attention_dropout=0.2", *SHORT)
RUNS = 150


def config(folder: Path, head: str = "sampled", *overrides: str, objective: Any = "dft", name: str = "run") -> Config:
    return tiny(folder, *LARGE, f"train.head={head}", *overrides, objective=objective, name=name)


@contextmanager
def ready(folder: Path, head: str, *overrides: str, objective: Any = "dft") -> Iterator[Training]:
    display = Display(Console(quiet=True), main=False)
    with rehearsal(config(folder, head, *overrides, objective=objective), display) as training:
        yield training


def one_gradient(training: Training) -> Tensor:
    """The gradient of the first step, all parameters in a row."""
    gradient(training, 0)
    found = torch.cat([p.grad.flatten() for p in training.policy.parameters() if p.grad is not None])
    training.optimizer.zero_grad(set_to_none=True)
    return found


def gradients_of_draws(training: Training, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """`(RUNS p)`: the gradient of the same step, dropout included, under draws of other seeds."""
    right, found = steps.draws_of, []
    for seed in range(RUNS):
        monkeypatch.setattr(steps, "draws_of", lambda _, *place, seed=seed: right(seed, *place))
        found.append(one_gradient(training))
    return torch.stack(found)


@pytest.mark.parametrize("objective", ["sft", "awr"])
def test_the_mean_of_a_step_is_the_exact_step(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squared distance of a mean of n from the truth is, on average, the variance of one over n.

    Its spread is small beside it, since it sums over thousands of parameters: 1.5 times it is allowed.
    """
    with ready(tmp_path, "auto", objective=objective) as training:
        exact = one_gradient(training)
    with ready(tmp_path, "sampled", objective=objective) as training:
        runs = gradients_of_draws(training, monkeypatch)
    variance = runs.var(dim=0).sum()
    assert variance.sqrt() > 0.01 * exact.norm(), "without noise the mean would prove nothing"
    assert (runs.mean(dim=0) - exact).square().sum() < 1.5 * variance / RUNS


def test_the_first_step_measures_what_the_exact_head_does(tmp_path: Path) -> None:
    """Losses, weights and metrics are made of log-probabilities, which no draw touches; the gradient alone differs."""
    for head in ("auto", "sampled"):
        train(config(tmp_path, head, "train.steps=1", "train.watch=[entropy]", name=head))
    logged = [
        json.loads((tmp_path / head / "metrics.jsonl").read_text().splitlines()[0]) for head in ("auto", "sampled")
    ]
    exact, drawn = ({k: v for k, v in line.items() if k.startswith(("loss", "nll", "weight"))} for line in logged)
    assert {"loss/mean", "nll/mean"} <= exact.keys()
    assert drawn == pytest.approx(exact, rel=1e-12)
    assert logged[1]["grad_norm"] != logged[0]["grad_norm"]


def test_it_learns_what_the_exact_head_learns(tmp_path: Path) -> None:
    """The same steps down: after 6 steps the loss has fallen as far, to a tenth."""
    fallen = {}
    for head in ("auto", "sampled"):
        train(config(tmp_path, head, "train.batch_size=16", objective="sft", name=head))
        found = [float.fromhex(values[0]) for _, values in sorted(losses(tmp_path / head).items())]
        fallen[head] = found[0] - found[-1]
    assert fallen["auto"] > 0.5
    assert fallen["sampled"] == pytest.approx(fallen["auto"], rel=0.1)


def resumed_gaps(folder: Path) -> list[int]:
    """Steps from which a resumed run came out otherwise than the whole one, in any bit of any later state or loss."""
    train(config(folder, "sampled", "model.dtype=float32", name="whole"))
    whole, wrong = folder / "whole", []
    assert sorted(states(whole)) == list(range(1, STEPS + 1))
    for step in range(1, STEPS):
        copy = cut(whole, step, "resumed")
        train(config(folder, "sampled", "model.dtype=float32", name="resumed"))
        if states(copy) != states(whole) or losses(copy) != losses(whole):
            wrong.append(step)
    return wrong


def test_a_run_resumed_at_any_step_is_the_uninterrupted_run(tmp_path: Path) -> None:
    assert resumed_gaps(tmp_path) == []


def test_draws_that_are_not_seeded_by_their_place_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = torch.Generator().manual_seed(0)
    monkeypatch.setattr(steps, "draws_of", lambda *_: Draws(once))
    assert resumed_gaps(tmp_path) == list(range(1, STEPS))


def numbers(seed: int = 0, step: int = 0, micro: int = 0, rank: int = 0) -> Tensor:
    return torch.rand(8, generator=draws_of(seed, step, micro, rank, torch.device("cpu")).generator)


def test_every_place_draws_numbers_of_its_own() -> None:
    """Another seed, step, micro-batch or rank; and not dropout's, with which the draws would be correlated."""
    assert torch.equal(numbers(), numbers())
    steps.seed_micro_batch(0, 0, 0, 0)
    others = [torch.rand(8), numbers(seed=1), numbers(step=1), numbers(micro=1), numbers(rank=1)]
    assert not any(torch.equal(numbers(), other) for other in others)


def test_the_loop_draws_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch of every step once, with the run's seed."""
    right, places = steps.draws_of, []

    def note(*place: Any) -> Draws:
        places.append(place[:4])
        return right(*place)

    monkeypatch.setattr(steps, "draws_of", note)
    train(config(tmp_path, "sampled", "train.seed=5", "train.steps=2"))
    assert len(set(places)) == len(places) >= 4
    assert {(seed, rank) for seed, _, _, rank in places} == {(5, 0)}
    for step in (0, 1):
        micro = [m for _, s, m, _ in places if s == step]
        assert len(micro) >= 2
        assert micro == list(range(len(micro)))


def test_the_exact_heads_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "draws_of", lambda *_: pytest.fail("drawn"))
    for head in ("auto", "two_pass"):
        train(config(tmp_path, head, "train.steps=1", name=head))


def test_adapters_train_below_a_frozen_head(tmp_path: Path) -> None:
    train(config(tmp_path, "sampled", "model.lora.rank=4", "train.steps=2"))
    assert len(losses(tmp_path / "run")) == 2


def test_the_layout_check_compares_exact_gradients(tmp_path: Path) -> None:
    """Draws differ between layouts, which says nothing about the objective."""
    from rwft.config import to_yaml

    (tmp_path / "run.yaml").write_text(to_yaml(config(tmp_path)))
    check_config_command(str(tmp_path / "run.yaml"), [])


def test_regularizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^train\.head: found 'sampled', but a regularizer's gradient reads the whole"
    ):
        config(tmp_path, "sampled", "regularize=[{name: entropy, coef: 0.1}]")
    assert config(tmp_path, "auto", "regularize=[{name: entropy, coef: 0.1}]").regularize
