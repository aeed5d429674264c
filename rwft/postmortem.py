"""What a step that was not finite leaves behind: which rows, what they weighed, and nothing of their text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rwft.errors import NonFiniteError

if TYPE_CHECKING:
    from rwft.step import MicroResult
    from rwft.training import Training

DUMP = "nonfinite.json"
IN_A_ROW, IN_TOTAL = 3, 10
"""Steps that `train.on_nonfinite: skip` leaves out before it gives up: one after another, and over the run."""


@dataclass
class Skipped:
    """How many steps were left out: over the run, and since the last one that was finite. Part of a checkpoint."""

    total: int = 0
    in_a_row: int = 0

    def too_many(self) -> str | None:
        """Why no more may be left out; None while some may."""
        if self.in_a_row >= IN_A_ROW:
            return f"it is the {IN_A_ROW}rd step in a row that is not finite"
        return f"it is the {IN_TOTAL}th step that is not finite" if self.total >= IN_TOTAL else None


def discard(training: Training, step: int, norm: float, loss: float, results: list[MicroResult]) -> None:
    """Drop the gradient of a step that was not finite and write `nonfinite.json` into the run's folder.

    All ranks call it together. Raises NonFiniteError, unless the config says to skip such steps
    and few enough have been skipped.
    """
    training.optimizer.zero_grad(set_to_none=True)
    report = post_mortem(training, step, norm, loss, results)
    training.folder.write(DUMP, report)
    sentence = f"step {step}: {report['cause']}; nothing was updated"
    if training.config.train.on_nonfinite == "abort":
        raise NonFiniteError(f"{sentence}; see {training.folder.path / DUMP}, or set train.on_nonfinite=skip")
    training.skipped.total += 1
    training.skipped.in_a_row += 1
    reason = training.skipped.too_many()
    if reason is not None:
        raise NonFiniteError(f"{sentence}; {reason}, see {training.folder.path / DUMP}")
    training.display.say(f"{sentence}; skipped ({training.skipped.total} so far)")


def post_mortem(training: Training, step: int, norm: float, loss: float, results: list[MicroResult]) -> dict[str, Any]:
    """Every row of the step, over all ranks, those that are not finite first. Collective."""
    from accelerate.utils import gather_object

    rows = gather_object([row for result in results for row in _rows(training, result)])
    losses = gather_object([number(loss)])
    rows.sort(key=lambda row: row["weights_finite"] and row["logp_finite"])
    return {
        "step": step,
        "objective": str(training.objective),
        "cause": _cause(training, rows, norm),
        "gradient_norm": number(norm),
        "loss_by_rank": losses,
        "rows": rows,
    }


def _rows(training: Training, result: MicroResult) -> Iterator[dict[str, Any]]:
    """One object a row that has trained tokens: where it is from and what the step made of it."""
    lengths = result.batch.sequence_lengths
    parts = zip(result.batch.rows, result.weights.split(lengths), result.head.logp.split(lengths), strict=True)
    for index, weights, logp in parts:
        if len(logp) == 0:
            continue
        reward = float(training.data.train.reward[int(index)])
        yield {
            "row": int(index),
            "source": str(training.data.train.source(int(index))),
            "tokens": len(logp),
            "reward": None if math.isnan(reward) else reward,
            "weight_min": number(weights.min()),
            "weight_max": number(weights.max()),
            "nll": number(-logp.double().mean()),
            "weights_finite": bool(weights.isfinite().all()),
            "logp_finite": bool(logp.isfinite().all()),
        }


def _cause(training: Training, rows: list[dict[str, Any]], norm: float) -> str:
    """The first thing to look at, in words."""
    for row in rows:
        if not row["logp_finite"]:
            return f"a log-probability of row {row['source']} is not finite (model or data)"
        if not row["weights_finite"]:
            return f"objective '{training.objective}' gave a weight that is not finite for row {row['source']}"
    if math.isfinite(norm):
        return f"the loss is not finite, though its gradient is (penalties: {len(training.penalties)})"
    return f"the gradient is not finite (norm {norm}); a lower train.lr may help"


def number(value: Any) -> float | str:
    """A number for JSON, which has none for nan and inf: those as text."""
    value = float(value)
    return value if math.isfinite(value) else str(value)
