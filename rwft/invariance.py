"""Does the layout change the gradient? `rwft check CONFIG` asks it of the user's own objective, data and model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from rwft.config import Config, load_config
from rwft.data.batching import Batch, Plan
from rwft.errors import ObjectiveError
from rwft.progress import Display
from rwft.run import RunFolder
from rwft.setup import prepare_training, start_accelerator
from rwft.step import gradient
from rwft.testing import check_objective
from rwft.training import Training

TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2e-2}
"""Largest relative difference of one gradient that rounding explains, by `model.dtype`."""


@dataclass(frozen=True)
class Gap:
    """How far a layout's gradient is from the same step's in one micro-batch: max |difference| / max |gradient|."""

    layout: str
    gap: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.gap <= self.tolerance


def layout_gaps(training: Training, step: int = 0) -> Iterator[Gap]:
    """The gradient of one step, cut and padded in several ways, against the step in one micro-batch. Dropout is off."""
    rows = len(training.plan.window(step))
    tolerance = TOLERANCE[training.config.model.dtype]
    training.model.eval()
    training.snapshot(step)
    whole = step_gradient(recut(training, rows), step)
    for size in sorted({1, 2, 3, max(rows // 2, 1)}):
        if training.plan.units is None:
            yield Gap(
                f"micro-batches of {size}", distance(step_gradient(recut(training, size), step), whole), tolerance
            )
    padded = replace(training, collate=Padded(training.collate, 13))
    yield Gap("13 more columns of padding", distance(step_gradient(recut(padded, rows), step), whole), tolerance)
    shuffled = replace(training, collate=Reversed(training.collate))
    yield Gap("rows in reverse order", distance(step_gradient(recut(shuffled, rows), step), whole), tolerance)
    training.model.train()


def recut(training: Training, size: int) -> Training:
    """The same steps in micro-batches of `size` rows."""
    old = training.plan
    most = size if old.units is None else max(size, old.units.largest)
    plan = Plan(old.length, batch_size=most, accumulate=1, world=1, seed=old.seed, alive=old.alive)
    plan.window_size, plan.steps_per_epoch, plan.units = old.window_size, old.steps_per_epoch, old.units
    return replace(training, plan=plan)


def step_gradient(training: Training, step: int) -> dict[str, Tensor]:
    """The finished gradient of a step by parameter name; the parameters' own are cleared."""
    training.optimizer.zero_grad(set_to_none=True)
    _, z = gradient(training, step)
    named = training.policy.trained_parameters()
    out = {name: p.grad.detach().clone() / z for name, p in named.items() if p.grad is not None}
    training.optimizer.zero_grad(set_to_none=True)
    return out


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """max |one - other| / max |other| over all parameters; infinite if they do not cover the same ones."""
    if one.keys() != other.keys():
        return float("inf")
    largest = max(float(value.abs().max()) for value in other.values())
    difference = max(float((one[name] - other[name]).abs().max()) for name in other)
    return difference / largest if largest > 0 else difference


@dataclass(frozen=True)
class Padded:
    """Batches with more padding than they need."""

    collate: Any
    columns: int

    def __call__(self, indices: NDArray[np.int64]) -> Batch:
        batch = self.collate(indices)
        signals = {
            k: self._pad(v) if v.ndim == 2 and v.shape[1] == batch.mask.shape[1] > 1 else v
            for k, v in batch.signals.items()
        }
        return replace(batch, ids=self._pad(batch.ids), mask=self._pad(batch.mask), signals=signals)

    def _pad(self, value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, (0, self.columns))


@dataclass(frozen=True)
class Reversed:
    """Batches with their rows in the opposite order."""

    collate: Any

    def __call__(self, indices: NDArray[np.int64]) -> Batch:
        return self.collate(indices[::-1].copy())


@contextmanager
def rehearsal(config: Config, display: Display) -> Iterator[Training]:
    """A run made ready to step, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = start_accelerator(replace(config, trackers=[]))
        yield prepare_training(config, accelerator, RunFolder(Path(folder), main=True), display)


def check_config_command(path: str, overrides: Sequence[str]) -> None:
    """`rwft check CONFIG`: each objective's laws, then every layout. Raises ObjectiveError if one fails."""
    config = load_config(path, overrides)
    if config.train.head == "sampled":  # which layouts would draw differently
        config = replace(config, train=replace(config.train, head="auto"))
    with Display(Console(), main=True) as display, rehearsal(config, display) as training:
        for factor in training.objective.factors:
            check_objective(factor.entry.function)
            display.say(f"ok   objective '{factor.entry.name}' keeps the laws")
        gaps = []
        for gap in layout_gaps(training):
            verdict = "ok  " if gap.passed else "FAIL"
            display.say(f"{verdict} {gap.layout}: gradient differs by {gap.gap:.1e} (at most {gap.tolerance:.0e})")
            gaps.append(gap)
    if not all(gap.passed for gap in gaps):
        raise ObjectiveError(
            f"{path}: the gradient depends on the layout: {', '.join(g.layout for g in gaps if not g.passed)}"
        )
