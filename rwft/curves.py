"""Weight curves: how a weight moves with the policy's probability, with a ratio, or with the reward."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwft.signals import SIGNALS
from rwft.weighting import Objective, build_objective

POINTS = 241
TALLEST = 3.0  # weights above are cut off, so that the rest can be seen
SECOND = ("r = -1", "rejected")
REWARDS = ("advantage", "reward")
FROZEN = ("ref_logp", "behavior_logp", "aux_logp")
QUANTITIES = ("entropy", "topk_entropy", "concentration", "group_above", "reward_above", "token_weight")


@dataclass(frozen=True)
class Curve:
    """Weights `w` against `x`: the axis, the objective, and which side of it (`r = 1`, `rejected`), if it has two."""

    axis: str
    name: str
    side: str
    x: Tensor
    w: Tensor


def curves(objective: Objective) -> list[Curve]:
    """How its weight moves with the one quantity that says most, all else at rest; one curve per sign of the reward.

    A ratio moves with the policy (one token, other models at rest); a pair with its lead; a
    probability, an entropy or a rank with itself; a weight of the data alone with the reward.
    """
    reads = objective.reads
    if "group" in reads and "logp" in reads:
        return _of_pairs(objective)
    if reads & {"logp", "old_logp"}:
        return _of_policy(objective)
    for name in (*REWARDS, *QUANTITIES):
        if name in reads:
            x = torch.linspace(-2, 2, POINTS) if name in REWARDS else torch.linspace(0, _end(name), POINTS)
            return [Curve(_axis(name), str(objective), "", x, _weigh(objective, {name: x[:, None]}))]
    if "aux_logp" in reads:
        x = torch.linspace(0.01, 3, POINTS)
        axis = "ratio of the auxiliary model to the reference"
        return [Curve(axis, str(objective), "", x, _weigh(objective, {"aux_logp": x.log()[:, None]}))]
    return [Curve("p", str(objective), "", torch.linspace(0, 1, POINTS), _weigh(objective, {}))]


def _axis(name: str) -> str:
    words = {
        "topk_entropy": "entropy of the top 20 (nats)",
        "entropy": "entropy (nats)",
        "group_above": "share with a greater reward",
        "reward_above": "share with a greater reward",
    }
    return words.get(name, name.replace("_", " "))


def _end(name: str) -> float:
    return 3.0 if "entropy" in name else 1.0


def _rest(n: int) -> dict[str, Tensor]:
    """Signals of `n` lone one-token sequences, at rest: zero, one policy, a half where zero says nothing."""
    zero = torch.zeros(n, 1)
    signals = {name: zero if s.axes.startswith("b") else torch.zeros(()) for name, s in SIGNALS.items()}
    one = {name: torch.ones(n, 1) for name in ("mask", "group_std", "token_weight")}
    half = dict.fromkeys(("group_mean", "concentration", "entropy", "topk_entropy"), zero + 0.5)
    numbers = {"ref_nll_median": torch.tensor(0.7), "log_vocab": torch.tensor(3.0), "reward_max": torch.tensor(2.0)}
    return {**signals, **one, **half, **numbers, "group": torch.zeros(n, dtype=torch.long)}


def _weigh(objective: Objective, moved: dict[str, Tensor]) -> Tensor:
    signals = {**_rest(POINTS), **moved}
    return objective(signals).expand(POINTS, 1).squeeze(1)


def _of_policy(objective: Objective) -> list[Curve]:
    ratios = objective.reads & {*FROZEN} or {"logp", "old_logp"} <= objective.reads
    x = torch.linspace(0.01, 3, POINTS) if ratios else torch.linspace(0.001, 1, POINTS)
    moved = {"logp": x.log()[:, None]}
    if "old_logp" in objective.reads and "logp" not in objective.reads:  # the snapshot is the policy
        moved, x = {"old_logp": torch.linspace(0.001, 1, POINTS).log()[:, None]}, torch.linspace(0.001, 1, POINTS)
    axis = "ratio to the other policy" if "logp" in moved and ratios else "p"
    signed = [name for name in REWARDS if name in objective.reads]
    if not signed:
        return [Curve(axis, str(objective), "", x, _weigh(objective, moved))]
    both = []
    for value, label in ((1.0, "r = 1"), (-1.0, "r = -1")):
        scores = {name: torch.full((POINTS, 1), value) for name in signed}
        both.append(Curve(axis, str(objective), label, x, _weigh(objective, moved | scores)))
    return both


def _of_pairs(objective: Objective) -> list[Curve]:
    x = torch.linspace(-40, 40, POINTS)
    signals = _rest(2 * POINTS)
    chosen = torch.arange(2 * POINTS)[:, None] % 2 == 0
    signals |= {
        "logp": torch.where(chosen, x.repeat_interleave(2)[:, None], 0.0),
        "reward": chosen.float(),
        "group": torch.arange(2 * POINTS) // 2,
    }
    w = objective(signals).expand(2 * POINTS, 1).squeeze(1)
    axis = "lead of the chosen completion (nats)"
    return [Curve(axis, str(objective), side, x, w[n::2]) for n, side in enumerate(("chosen", "rejected"))]


def beside(own: Objective) -> list[Objective]:
    """An objective, and those to hold it against: SFT and DFT, where its weight moves with the probability too."""
    known = [build_objective(name) for name in ("sft", "dft")] if curves(own)[0].axis == "p" else []
    return [own, *(other for other in known if str(other) != str(own))]


def draw_curves(objectives: Sequence[Objective], path: Path) -> None:
    """One panel for each axis that the objectives have, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [curve for objective in objectives for curve in curves(objective)]
    axes = list(dict.fromkeys(curve.axis for curve in found))
    figure = Figure(figsize=(5.4 * max(1, len(axes)), 3.2), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    for panel, axis in zip(figure.subplots(1, max(1, len(axes)), squeeze=False)[0], axes, strict=False):
        _panel(panel, axis, [curve for curve in found if curve.axis == axis])
    partial = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(partial, metadata={"Software": None})
    os.replace(partial, path)


def _panel(panel: Any, axis: str, found: list[Curve]) -> None:
    """One colour for each objective; dashed for a negative reward or the rejected completion."""
    names = list(dict.fromkeys(curve.name for curve in found))
    scales = {name: max(_scale(curve.w) for curve in found if curve.name == name) for name in names}  # for both sides
    for curve in found:
        scale, second = scales[curve.name], curve.side in SECOND
        label = curve.name if scale == 1 else f"{curve.name} over {scale:g}"
        style = {"color": f"C{names.index(curve.name) % 10}", "linestyle": "--" if second else "-", "linewidth": 1.4}
        style["zorder"] = 3 - names.index(curve.name) / len(names)  # the first on top of what it is held against
        panel.plot(curve.x, curve.w / scale, label=None if second else label, **style)
    panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    high = min(TALLEST, max(float((curve.w / scales[curve.name]).abs().max()) for curve in found))
    panel.set_ylim(-1.15 * high if any((curve.w < 0).any() for curve in found) else -0.05 * high, 1.15 * high)
    sides = [curve.side for curve in found if curve.side]
    panel.set(xlabel=axis, ylabel="weight", title=f"solid {sides[0]}, dashed {sides[1]}" if sides else "")
    panel.title.set_fontsize(9)
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _scale(w: Tensor) -> float:
    """1, or for weights that are large throughout a round number that brings them to order 1."""
    typical = 2 * float(w.abs().median())
    return 1.0 if typical < TALLEST else float(f"{typical:.1g}")
