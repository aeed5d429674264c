"""The pieces of work that processes share: each ends in plain values and the CPU seconds that it took."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, with the CPU seconds of this process that it took."""
    import torch

    torch.set_num_threads(1)
    before = cpu()
    return {**measure(), "cpu": cpu() - before}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bandit_job() -> dict[str, Any]:
    from benchmarks.evidence import bandit

    return timed(bandit.measure)


def task_job(index: int, seed: int, scratch: str) -> dict[str, Any]:
    from benchmarks.evidence import task

    return timed(lambda: task.measure(task.SCENARIOS[index], seed, Path(scratch) / f"task-{index}-{seed}"))


def model_job(path: str, word: str, seed: int, scratch: str) -> dict[str, Any]:
    from benchmarks.evidence import story

    return timed(lambda: story.measure(Path(path), word, seed, Path(scratch) / f"model-{seed}"))
