"""What a step says about itself. The suffix of a metric is its reduction; sums stay on the device until logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwft.durable import write_atomic, writing

OTHERS = ("reference", "behavior")
"""Policies that the policy is compared with."""
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
    "w_zero",
    "reward",
    "rewarded",
    "entropy",
    "entropy_tokens",
    *(f"nll_{kind}" for kind in ("good", "bad", "negative")),
    *(f"{kind}_tokens" for kind in ("good", "bad", "negative")),
    *(f"{other}_{what}" for other in OTHERS for what in ("tokens", "gap", "ratio", "ratio_square")),
)
TIE = 1e-4  # of its size: weights this near to the greatest count as the greatest
LOWEST = -1e300


class Meter:
    """Sums over the micro-batches since the last log, in float64, reduced over ranks only when read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.vector = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.known = dict.fromkeys(SUMS, 0.0)  # the part that needs no device
        self.unforwarded = 0.0  # tokens of weight zero
        self.largest = torch.full((), -math.inf, dtype=torch.float64, device=self.device)
        self.smallest = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        self.top = torch.full((), LOWEST, dtype=torch.float64, device=self.device)
        self.at_top = torch.zeros((), dtype=torch.float64, device=self.device)
        self.penalties: dict[str, Tensor] = {}
        self.steps, self.rate, self.norm, self.loss = 0, 0.0, 0.0, math.nan  # of the last step; loss: this rank's part
        self.clipped = 0  # steps whose gradient was longer than train.clip

    @property
    def sums(self) -> dict[str, Tensor]:
        """`{name: ()}`: the sums of this rank."""
        return dict(zip(SUMS, self._all(), strict=True))

    def _all(self) -> Tensor:
        return self.vector + self.vector.new_tensor(list(self.known.values()))

    @torch.no_grad()
    def add(self, sums: Mapping[str, Tensor | float], weights: Tensor | None = None) -> None:
        """Add sums by name; `weights (n)` of trained tokens for the extremes and what stands at them."""
        given, nothing = dict(sums), self.vector.new_zeros(())
        if not given.keys() <= self.known.keys():
            raise KeyError(f"no such sums: {sorted(given.keys() - self.known.keys())}")
        if weights is not None and weights.numel():
            given["w_zero"] = (weights == 0).sum()
            self._add_extremes(weights)
        for name, value in given.items():
            if not isinstance(value, Tensor):
                self.known[name] += value
        on_device = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if on_device:
            self.vector += torch.stack([on_device.get(name, nothing) for name in SUMS])

    def _add_extremes(self, weights: Tensor) -> None:
        """The extremes, and how many tokens are at the greatest: of less than the greatest so far nothing is kept."""
        smallest, largest = (value.double() for value in torch.aminmax(weights))
        number = (weights >= largest - TIE * largest.abs()).sum()
        self.largest, self.smallest = torch.maximum(self.largest, largest), torch.minimum(self.smallest, smallest)
        slack = TIE * self.top.abs()
        kept = self.at_top + number * (largest >= self.top - slack)
        higher = largest > self.top + slack
        self.top, self.at_top = torch.where(higher, largest, self.top), torch.where(higher, number, kept)

    def add_zero_weights(self, tokens: float, sequences: float, reward: float) -> None:
        """Add rows of weight zero that were not forwarded: all about them is known but their likelihood."""
        given = {"tokens": tokens, "w_zero": tokens, "sequences": sequences, "reward": reward, "rewarded": sequences}
        self.add(given)
        self.unforwarded += tokens

    def add_penalties(self, sums: Mapping[str, Tensor]) -> None:
        """Add summed penalties by the regulariser's name."""
        for name, value in sums.items():
            self.penalties[name] = self.penalties.get(name, torch.zeros_like(self.largest)) + value.double()

    def read(self, gather: Any) -> dict[str, float]:
        """Metrics since the last reset, over ranks: `gather(tensor)`, of `(1 k)` from each, is the one collective."""
        extremes = torch.stack([self.largest, -self.smallest, self.top, self.at_top])
        unforwarded = self.vector.new_tensor([self.unforwarded])
        here = torch.cat([extremes, unforwarded, self._all(), *(v.reshape(1) for v in self.penalties.values())])
        ranks = gather(here[None]).cpu()
        largest, lowest = ranks[:, :2].amax(dim=0).tolist()
        unseen, *summed = ranks[:, 4:].sum(dim=0).tolist()
        if unseen:  # rows of weight zero that were not forwarded
            largest, lowest = max(largest, 0.0), max(lowest, 0.0)
        total = dict(zip(SUMS, summed, strict=False))
        tokens = max(total["tokens"], 1.0)
        out = {"loss/mean": total["loss"] / max(self.steps, 1), "nll/mean": total["nll"] / max(total["forwarded"], 1.0)}
        out |= {"weight/max": largest, "weight/min": -lowest} | _of_weights(total)
        out["weight/at_max_share"] = _number_at_top([*ranks[:, 2:4].tolist(), [0.0, unseen]]) / tokens
        for name in ("tokens", "sequences"):
            out[f"{name}/sum"] = total[name]
        out["forwarded_tokens/sum"] = total["forwarded"]
        out |= _where_counted(total)
        for other in OTHERS:
            out |= _of_other(total, other)
        out |= {f"penalty/{k}/mean": v / tokens for k, v in zip(self.penalties, summed[len(SUMS) :], strict=True)}
        return {name: value for name, value in out.items() if math.isfinite(value)}


def _of_weights(total: Mapping[str, float]) -> dict[str, float]:
    """What the weights are like, as shares of tokens or of their sizes."""
    tokens = max(total["tokens"], 1.0)
    out = {
        "weight/mean": total["w_sum"] / tokens,
        "weight/ess": total["w_abs"] ** 2 / total["w_square"] / tokens if total["w_square"] > 0 else 0.0,
        "weight/zero_share": total["w_zero"] / tokens,
        "weight/negative_share": total["w_negative"] / total["w_abs"] if total["w_abs"] > 0 else 0.0,
    }
    if total["w_negative"] > 0:
        out["weight/negative_improbable_share"] = total["w_negative_improbable"] / total["w_negative"]
    return out


def _number_at_top(pairs: list[list[float]]) -> float:
    """Tokens at the greatest weight, from the greatest of each part and the number there."""
    top = max(largest for largest, number in pairs if number) if any(number for _, number in pairs) else 0.0
    return sum(number for largest, number in pairs if largest >= top - TIE * abs(top))


def _where_counted(total: Mapping[str, float]) -> dict[str, float]:
    """Means over a part of the tokens or rows, where there are any."""
    parts = {
        "reward/mean": ("reward", "rewarded"),
        "entropy/mean": ("entropy", "entropy_tokens"),
        "nll_good/mean": ("nll_good", "good_tokens"),
        "nll_bad/mean": ("nll_bad", "bad_tokens"),
        "nll_negative/mean": ("nll_negative", "negative_tokens"),
    }
    return {name: total[value] / total[count] for name, (value, count) in parts.items() if total[count] > 0}


def _of_other(total: Mapping[str, float], other: str) -> dict[str, float]:
    """How the policy stands to another one on the logged tokens, where that was known."""
    tokens, gap, ratio, square = (total[f"{other}_{what}"] for what in ("tokens", "gap", "ratio", "ratio_square"))
    if tokens == 0:
        return {}
    gap, ratio = gap / tokens, ratio / tokens
    return {
        f"log_ratio_to_{other}/mean": gap,
        f"ratio_to_{other}/mean": ratio,
        f"ratio_to_{other}/ess": ratio**2 * tokens / square if square > 0 else 0.0,
        f"logged_kl_from_{other}/mean": ratio - 1 - gap,
    }


class MetricsLog:
    """One JSON object a line, appended; a resumed run drops the lines past the step that it resumes at."""

    def __init__(self, path: Path, resume_at: int, main: bool) -> None:
        self.path = path
        self.last: dict[str, float] = {}  # the newest training metrics
        self.evaluated = -1  # the step of the newest evaluation
        if main and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) is not None and (_step(line) or 0) <= resume_at]
            write_atomic(path, "".join(f"{line}\n" for line in kept))
            for record in map(json.loads, kept):
                if any(name.startswith("eval/") for name in record):
                    self.evaluated = int(record["step"])
                else:
                    self.last = {name: value for name, value in record.items() if name != "step"}

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, allow_nan=False) + "\n")


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
