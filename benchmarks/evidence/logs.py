"""Logs of the embedded task with rewards 1 and -1, exact log-probabilities, and a success rate in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwft.data.tasks import answer, caesar, write_task

LENGTH = 4


@dataclass(frozen=True)
class Logs:
    """Files of a scenario, and how often its behaviour policy is right on the held-out prompts (exact)."""

    train: Path
    heldout: Path
    success: float


def write_slips(folder: Path, *, skill: float, rows: int, heldout: int, completions: int, seed: int) -> Logs:
    """The embedded task `caesar`: the right answer is the likeliest, and slips are single letters."""
    files = write_task(
        "caesar", folder, rows=rows, heldout=heldout, completions=completions, length=LENGTH, skill=skill, seed=seed
    )
    for file in (files.train, files.heldout):
        rewrite(file, signed)
    return Logs(files.train, files.heldout, files.success)


def write_mistaken(folder: Path, *, right: float, rows: int, heldout: int, completions: int, seed: int) -> Logs:
    """A systematic mistake: with chance `1 - right` the whole answer is shifted by two letters instead of one.

    Below `right` = 0.5 the likeliest answer is wrong. The first letter decides; the others follow from it.
    """
    files = write_task("caesar", folder, rows=rows, heldout=heldout, completions=completions, length=LENGTH, seed=seed)
    rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
    for file in (files.train, files.heldout):
        rewrite(file, lambda row: mistaken(row, right, rng))
    return Logs(files.train, files.heldout, right)


def signed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rewards 1 and 0 become 1 and -1: the same to most objectives, and what TOPR expects."""
    return {**row, "rewards": [2 * reward - 1 for reward in row["rewards"]]}


def mistaken(row: Mapping[str, Any], right: float, rng: np.random.Generator) -> dict[str, Any]:
    """The same prompt with answers that are right, or wrong in one way."""
    good = answer("caesar", row["prompt"])
    hits = (rng.random(len(row["completions"])) < right).tolist()
    tail = [0.0] * LENGTH
    return {
        **row,
        "completions": [good if hit else caesar(good) for hit in hits],
        "rewards": [1.0 if hit else -1.0 for hit in hits],
        "logprobs": [[math.log(right if hit else 1 - right), *tail] for hit in hits],
    }


def rewrite(file: Path, change: Any) -> None:
    """Replace every row of a JSONL file."""
    rows = [change(row) for row in read(file)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
