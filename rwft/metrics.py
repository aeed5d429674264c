"""What a step says about itself. The suffix of a metric is its reduction; sums stay on the device until logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwft.durable import write_atomic

SUMS = (
    "tokens",
    "forwarded",
    "sequences",
    "nll",
    "loss",
    "w_sum",
    "w_abs",
    "w_square",
    "w_negative",
    "w_negative_improbable",
    "reward",
    "rewarded",
    "entropy",
    "ref_gap",
)


class Meter:
    """Sums over the micro-batches since the last log, in float64, reduced over ranks only when read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in SUMS}
        self.largest = torch.full((), -math.inf, dtype=torch.float64, device=self.device)
        self.smallest = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        self.penalties: dict[str, Tensor] = {}
        self.steps, self.rate, self.norm, self.loss = 0, 0.0, 0.0, math.nan  # of the last step; loss: this rank's part

    def add(self, sums: Mapping[str, Tensor], weights: Tensor | None = None) -> None:
        """Add sums by name; `weights (n)` of trained tokens for the extremes."""
        for name, value in sums.items():
            self.sums[name] += value.detach().to(torch.float64)
        if weights is not None and weights.numel():
            self.largest = torch.maximum(self.largest, weights.max().double())
            self.smallest = torch.minimum(self.smallest, weights.min().double())

    def add_zero_weights(self, tokens: float, sequences: float, reward: float) -> None:
        """Add rows of weight zero that were not forwarded: all about them is known but their likelihood."""
        for name, value in {"tokens": tokens, "sequences": sequences, "reward": reward, "rewarded": sequences}.items():
            self.sums[name] += value
        self.smallest = self.smallest.clamp(max=0.0)
        self.largest = self.largest.clamp(min=0.0)

    def add_penalties(self, sums: Mapping[str, Tensor]) -> None:
        """Add summed penalties by the regulariser's name."""
        for name, value in sums.items():
            self.penalties[name] = self.penalties.get(name, torch.zeros_like(self.largest)) + value.double()

    def read(self, reduce: Any, gather: Any) -> dict[str, float]:
        """Metrics since the last reset, over ranks: `reduce(tensor, "sum")` and `gather(tensor)` are collectives."""
        packed = reduce(torch.stack([self.sums[name] for name in SUMS]), "sum").tolist()
        extremes = gather(torch.stack([self.largest, -self.smallest])[None]).amax(dim=0).tolist()
        total = dict(zip(SUMS, packed, strict=True))
        tokens, sequences, forwarded = (max(total[name], 1.0) for name in ("tokens", "sequences", "forwarded"))
        out = {
            "loss/mean": total["loss"] / max(self.steps, 1),
            "nll/mean": total["nll"] / forwarded,
            "weight/mean": total["w_sum"] / tokens,
            "weight/max": extremes[0],
            "weight/min": -extremes[1],
            "weight/ess": total["w_sum"] ** 2 / total["w_square"] / tokens if total["w_square"] > 0 else 0.0,
            "weight/negative_share": total["w_negative"] / total["w_abs"] if total["w_abs"] > 0 else 0.0,
            "tokens/sum": total["tokens"],
            "forwarded_tokens/sum": total["forwarded"],
            "sequences/sum": total["sequences"],
        }
        if total["w_negative"] > 0:
            out["weight/negative_improbable_share"] = total["w_negative_improbable"] / total["w_negative"]
        if total["rewarded"] > 0:
            out["reward/mean"] = total["reward"] / sequences
        if total["entropy"] > 0:
            out["entropy/mean"] = total["entropy"] / forwarded
        if total["ref_gap"] != 0:
            out["log_ratio_to_reference/mean"] = total["ref_gap"] / forwarded
        for name, value in self.penalties.items():
            out[f"penalty/{name}/mean"] = float(reduce(value.reshape(1), "sum")) / tokens
        return {name: value for name, value in out.items() if math.isfinite(value)}


class MetricsLog:
    """One JSON object a line, appended; a resumed run drops the lines past the step that it resumes at."""

    def __init__(self, path: Path, resume_at: int, main: bool) -> None:
        self.path = path
        if main and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= resume_at]
            write_atomic(path, "".join(f"{line}\n" for line in kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, allow_nan=False) + "\n")


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
