"""The figures of docs/evidence.md. Colours are Okabe and Ito's, which colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence.statistics import over_seeds, share

GREY, BLUE, RED, GREEN, PINK, ORANGE, SKY = (
    "#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
)  # fmt: skip
COLOURS = {
    "start": "#000000",
    "sft": GREY,
    "dft": RED,
    "rwr": SKY,
    "awr": SKY,
    "filtered_bc": BLUE,
    "dft * filtered_bc": ORANGE,
    "iw_sft * filtered_bc": GREEN,
    "topr": PINK,
    "reinforce (GRPO)": "#7A5C00",
    "topr (rewards 1, -1)": PINK,
}
CURVES = ("sft", "rwr", "dft", "filtered_bc", "dft * filtered_bc", "iw_sft * filtered_bc", "topr (rewards 1, -1)")
MARKERS = {"filtered_bc": "o", "dft * filtered_bc": "s", "iw_sft * filtered_bc": "^", "topr": "D"}
SHAPES = dict(zip(COLOURS, "osD^>vP*hdX", strict=True))
POSITIVE = ("sft", "dft", "rwr", "awr", "filtered_bc", "dft * filtered_bc", "iw_sft * filtered_bc")


def canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def tidy(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw_bandit(content: Mapping[str, Any]) -> Any:
    """Reward along training with the predicted ends, and times to 99%, measured over predicted."""
    figure = canvas(9, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for case in content["cases"]:
        if case["name"] in CURVES:
            style = {"color": COLOURS[case["name"]], "linestyle": "--" if "*" in case["name"] else "-"}
            left.plot(*zip(*[(max(s, 0.5), r) for s, r in case["curve"]], strict=True), label=case["name"], **style)
            if case["predicted_reward"] is not None:
                left.plot(
                    [content["steps"] * 1.25], [case["predicted_reward"]], "<", color=style["color"], markersize=6
                )
    left.set_xscale("log")
    left.legend(frameon=False, fontsize=7)
    tidy(
        left,
        "Expected reward, enumerated (triangles: predicted limits)",
        "full-batch steps (leftmost: the start)",
        "reward",
    )
    for name, marker in MARKERS.items():
        rates = [r for r in content["rates"] if r["objective"] == name]
        right.plot([r["predicted"] for r in rates], [r["measured"] for r in rates], marker, color=COLOURS[name],
                   label=name, markersize=6, fillstyle="none")  # fmt: skip
    ends = [5, 2000]
    right.plot(ends, ends, color="#b0b0b0", linewidth=0.8, zorder=0)
    right.set_xscale("log")
    right.set_yscale("log")
    right.legend(frameon=False, fontsize=7)
    tidy(right, "Time until 99% success", "predicted [steps x rate]", "measured [steps x rate]")
    return figure


def draw_task(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Any:
    """Success of each objective in each scenario, with 95% intervals over seeds."""
    labels = [label for label in next(iter(found.values())) if label not in ("logs", "start, greedy")]
    labels = [label for label in labels if "lr" not in label and "start for" not in label]
    figure = canvas(12.5, 3.9)
    for axis, (scenario, named) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for place, label in ((p, name) for p, name in enumerate(reversed(labels)) if name in named):
            values = list(named[label].values())
            mean, low, high = share(values)
            colour = "#000000" if label == "start" else BLUE if label in POSITIVE else RED
            axis.errorbar(100 * mean, place, xerr=[[100 * (mean - low)], [100 * (high - mean)]], fmt="o",
                          color=colour, markersize=4, elinewidth=1)  # fmt: skip
            axis.plot([100 * v for v in values], [place] * len(values), "|", color=colour, markersize=6, alpha=0.5)
        logs, greedy = (100 * over_seeds(list(named[name].values()))[0] for name in ("logs", "start, greedy"))
        axis.axvline(logs, color="#888888", linestyle="--", linewidth=1)
        axis.axvline(greedy, color="#888888", linestyle=":", linewidth=1)
        axis.set_xlim(-3, 103)
        axis.set_yticks(range(len(labels)), list(reversed(labels)))
        tidy(axis, scenario.replace(", ", ",\n").replace(" systematic ", " systematic\n"), "success [%]", "")
    figure.suptitle(
        "Sampled success on held-out prompts, 3 seeds, 95% intervals. Blue: no negative weights; red: signed. "
        "Dashed: the logs; dotted: the start, greedy",
        fontsize=8.5, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def draw_model(rewards: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], titles: Mapping[str, str]) -> Any:
    """Success against KL at temperature 1, and success by temperature; a row for each reward."""
    figure = canvas(9.5, 6.2)
    for (left, right), (name, found) in zip(figure.subplots(2, 2), rewards.items(), strict=True):
        for label, values in found.items():
            mean, low, high = share(values["1"])
            colour, marker = COLOURS[label], SHAPES[label]
            error = [[100 * (mean - low)], [100 * (high - mean)]]
            left.errorbar(over_seeds(values["kl"])[0], 100 * mean, yerr=error, fmt=marker, color=colour, label=label)
            steps = [t for t in ("1", "0.7", "0.5", "0") if t in values]
            rates = [100 * over_seeds(values[t])[0] for t in steps]
            right.plot([float(t) for t in steps], rates, marker=marker, color=colour, label=label,
                       linestyle="--" if "*" in label else "-")  # fmt: skip
        left.set_xscale("symlog", linthresh=10)
        right.invert_xaxis()
        right.set_xticks([1, 0.7, 0.5, 0], ["1", "0.7", "0.5", "greedy"])
        right.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        tidy(left, f"{titles[name]}: temperature 1", "KL to the start [nats a completion]", "success [%]")
        tidy(right, f"{titles[name]}: by temperature", "sampling temperature", "success [%]")
        for axis in (left, right):
            axis.set_ylim(-3, 103)
    return figure


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Every figure of which there are results."""
    from benchmarks.evidence.page import by_scenario, of_model

    drawn: dict[str, Any] = {}
    if "bandit" in results:
        drawn["bandit"] = draw_bandit(results["bandit"])
    if "task" in results:
        drawn["task"] = draw_task(by_scenario(results["task"]))
    if "model" in results:
        content = results["model"]
        titles = {"word": f"says '{content['word']}'", "spelling": "every word is known"}
        drawn["model"] = draw_model({name: of_model(content, name) for name in titles}, titles)
    for name, figure in drawn.items():
        figure.savefig(folder / f"evidence_{name}.png", metadata={"Software": None})
