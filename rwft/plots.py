"""The figure of a comparison: where each objective ends, and how it came there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwft.comparison import PRIOR

if TYPE_CHECKING:
    from rwft.comparison import Comparison, Outcome

COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = ("-", "--", ":", "-.")
FIGURES = {"nll_good/mean": "NLL of good rows", "nll_bad/mean": "NLL of bad rows", "nll/mean": "NLL"}


def plot_comparison(result: Comparison, path: Path) -> None:
    """Draw success with 95% intervals and the behaviour policy's rate, beside held-out NLL (nats a token) by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = any(s.success is not None for s in result.summaries)
    names = _figures(result)
    widths = ([1.5] if scored else []) + [1.0] * len(names)
    size = 3.1 * sum(widths), 1.1 + 0.32 * max(6, len(result.summaries))
    figure = Figure(figsize=size, layout="constrained", dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    if scored:
        _draw_success(axes[0], result)
    for axis, name in zip(axes[int(scored) :], names, strict=True):
        _draw_curves(axis, result, name)
    if not scored:
        axes[-1].legend(frameon=False, fontsize=7)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(partial)
    os.replace(partial, path)


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the objective at this place: the same in every panel."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _figures(result: Comparison) -> list[str]:
    """Good and bad rows apart where rewards tell them apart, else all."""
    shared = set.intersection(*(set(s.held_out) for s in result.summaries))
    split = [name for name in ("nll_good/mean", "nll_bad/mean") if name in shared]
    return split if len(split) == 2 else ["nll/mean"]


def _draw_success(axis: Any, result: Comparison) -> None:
    labels = [s.label for s in result.summaries]
    for index, s in enumerate(result.summaries):
        seeds = [o.success for o in result.outcomes if o.label == s.label]
        colour = look(index)["color"]
        axis.hlines(index, s.low, s.high, color=colour, linewidth=2.2, alpha=0.55)
        axis.plot(seeds, [index] * len(seeds), ".", color=colour, markersize=4, alpha=0.6)
        axis.plot([s.success], [index], "o", color=colour, markersize=5.5)
    if result.level is not None:
        axis.axvline(result.level, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        place = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 7, "va": "bottom"}
        what = "behaviour policy" if result.behavior_exact else "mean logged reward"
        axis.annotate(what, (result.level, 1), xycoords=("data", "axes fraction"), **place)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    for index, tick in enumerate(axis.get_yticklabels()):
        tick.set_color(look(index)["color"])
    axis.invert_yaxis()
    axis.set_xlabel("score on held-out prompts (mean and 95% interval over seeds)", fontsize=8)
    _plain(axis)


def _draw_curves(axis: Any, result: Comparison, name: str) -> None:
    """The course of each objective; where there is a prior, from its end on, at step 0."""
    start = next((s.held_out[name] for s in result.summaries if s.label == PRIOR), None)
    for index, s in enumerate(result.summaries):
        steps, mean = mean_curve([o for o in result.outcomes if o.label == s.label], name)
        if s.label != PRIOR and steps:
            points = (steps, mean) if start is None else ([0, *steps], [start, *mean])
            axis.plot(*points, marker="o", markersize=2.5, linewidth=1.3, label=s.label, **look(index))
    axis.set_xlabel("step", fontsize=8)
    axis.set_title(f"{FIGURES[name]}, nats a token", fontsize=8, loc="left")
    _plain(axis)


def mean_curve(runs: Sequence[Outcome], name: str) -> tuple[list[int], list[float]]:
    """Steps that all runs evaluated at, and the mean over runs there."""
    courses = [{step: figures[name] for step, figures in run.curve if name in figures} for run in runs]
    steps = sorted(set.intersection(*map(set, courses)))
    return steps, [float(np.mean([course[step] for course in courses])) for step in steps]


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
