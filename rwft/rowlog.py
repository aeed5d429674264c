"""What each row had in a step: `rows/step_XXXXXXXX.parquet` in the run's folder, one line a row.

step, row       the optimiser step (from 1), and the row's index among the training rows
place           where the row came from: `file:line`
group           a number that all rows of a prompt share
reward          null where the data give none
advantage       null without rewards, and where it differs from token to token
tokens          trained tokens
nll             mean NLL of these, in nats, before the update; null for a row that was not forwarded
weight          mean weight of these
share           the row's share of the loss's gradient by the logits, by size; the shares of a step sum to 1

The gradient of `-c log p_y` by the logits is `c (p - onehot_y)`, whose absolute values sum to
`2 |c| (1 - p_y)`. So `share` is the sum over the row's tokens of `|w / Z| (1 - p)`, divided by the
same over all rows of the step. It is a size, not a direction: gradients of two rows may cancel in
the parameters, where AdamW scales them besides; penalties (`regularize`) are left out.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rwft.durable import TMP, make_folder, remove, write_atomic

if TYPE_CHECKING:
    from rwft.step import MicroResult
    from rwft.training import Training

FOLDER = "rows"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("row", pa.int64()),
        ("place", pa.string()),
        ("group", pa.int64()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("tokens", pa.int64()),
        ("nll", pa.float64()),
        ("weight", pa.float64()),
        ("share", pa.float64()),
    ]
)


def read_rows(run: Path) -> pa.Table:
    """Every line that a run has written, by step and row; an empty table with the same columns if there is none."""
    tables = [pq.read_table(file, schema=SCHEMA) for file in sorted((run / FOLDER).glob("step_*.parquet"))]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def forget_rows(run: Path, past: int) -> None:
    """Delete the files of steps past `past`, which a resumed run will write again, and what a dead run left half."""
    for file in (run / FOLDER).glob("step_*.parquet"):
        if int(file.stem.removeprefix("step_")) > past:
            remove(file)
    for file in (run / FOLDER).glob(f"{TMP}*"):
        remove(file)


def write_step(training: Training, step: int, results: list[MicroResult]) -> None:
    """Write the file of the step that starts from `step` steps done; all ranks call it together."""
    from accelerate.utils import gather_object

    measured: dict[int, tuple[float, float, float]] = {}
    for part in gather_object([_measure(results)]):
        measured |= part
    if training.accelerator.is_main_process:
        folder = training.folder.path / FOLDER
        make_folder(folder)
        write_atomic(folder / f"step_{step + 1:08d}.parquet", _parquet(_lines(training, step, measured)))


def _measure(results: list[MicroResult]) -> dict[int, tuple[float, float, float]]:
    """Row -> its mean NLL, its mean weight, and the size of its part of the gradient by the logits."""
    out: dict[int, tuple[float, float, float]] = {}
    for result in results:
        logp, size = result.head.logp.double(), result.head.coefficients.double().abs()
        values = torch.stack([-logp, result.weights.double(), -size * torch.expm1(logp.clamp(max=0))]).cpu()
        for row, (nll, weight, part) in zip(
            result.batch.rows.tolist(), values.split(result.batch.sequence_lengths, dim=1), strict=True
        ):
            if len(nll):
                out[row] = (float(nll.mean()), float(weight.mean()), float(part.sum()))
    return out


def _lines(training: Training, step: int, measured: dict[int, tuple[float, float, float]]) -> list[dict[str, Any]]:
    """One object a row of the step, in the order of rows; those that were not forwarded have weight zero."""
    rows, credit = training.data.train, training.data.credit
    by_row = credit is not None and credit.config.steps == "none"
    advantage = training.collate.known.get("advantage") if by_row else None
    whole = math.fsum(part for _, _, part in measured.values()) or 1.0
    out: list[dict[str, Any]] = []
    for row in np.sort(training.plan.window(step)).tolist():
        nll, weight, part = measured.get(row, (None, 0.0, 0.0))
        reward = float(rows.reward[row])
        out.append(
            {
                "step": step + 1,
                "row": row,
                "place": str(rows.source(row)),
                "group": int(rows.group[row]),
                "reward": None if math.isnan(reward) else reward,
                "advantage": None if advantage is None else float(advantage[row]),
                "tokens": int(rows.trained[row]),
                "nll": nll,
                "weight": weight,
                "share": part / whole,
            }
        )
    return out


def _parquet(lines: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), buffer)
    return buffer.getvalue()
