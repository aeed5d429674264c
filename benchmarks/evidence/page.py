"""The tables of docs/evidence.md, and its figures, from the stored results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.evidence import figures
from benchmarks.evidence.statistics import difference, over_seeds, percent, points, share

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMITS = {
    "sft": "$\\mu$",
    "rwr": "$\\mu e^{r/\\tau}$",
    "awr": "$\\mu e^{r/\\tau}$: the baseline drops out",
    "filtered_bc": "$\\mu$ on good arms",
    "dft": "the arm with the greatest $\\mu$",
    "dft * filtered_bc": "the most frequent good arm",
    "iw_sft": "$\\mu$: no force at all",
    "iw_sft * filtered_bc": "some good arm: policy gradient of success",
    "topr (rewards 1, -1)": "$\\mu$ on good arms",
    "reinforce, baseline the mean (GRPO)": "the arm with the greatest $\\mu A$",
    "asymre, shift -0.2": "$(\\mu (r - V) - \\tau)_+$",
    "dft * reinforce": "the arm with the greatest $\\mu A$",
    "tis * reinforce, no clip": "the best arm",
    "dro, data by another policy": "$\\mu e^{r/\\tau}$, $\\mu$ the reference",
    "dpo, noisy preferences": "$\\mu e^{r/\\beta}$",
    "dpo, the better one always preferred": "the best arm",
}
PAIRS = (
    ("sft", "start"),
    ("dft", "sft"),
    ("start, greedy", "dft"),
    ("filtered_bc", "dft"),
    ("rwr", "sft"),
    ("awr", "rwr"),
    ("filtered_bc", "rwr"),
    ("dft * filtered_bc", "filtered_bc"),
    ("iw_sft * filtered_bc", "filtered_bc"),
    ("topr", "filtered_bc"),
    ("reinforce (GRPO)", "filtered_bc"),
    ("reinforce (GRPO)", "start"),
    ("reinforce (GRPO), lr / 3", "start"),
    ("topr", "start"),
    ("dft * reinforce", "reinforce (GRPO)"),
    ("topr", "reinforce (GRPO)"),
    ("dpo", "filtered_bc"),
    ("dro", "reinforce (GRPO)"),
    ("topr (start for mu)", "topr"),
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bandit_table(content: Mapping[str, Any]) -> str:
    """Predicted and measured ends."""
    head = ["objective", "predicted limit", "largest gap", "reward, predicted", "reward, measured", "success"]
    rows = [
        [f"`{c['name']}`", LIMITS[c["name"]], f"{c['gap']:.0e}", number(c["predicted_reward"]), number(c["reward"]),
         f"{100 * c['success']:.1f}%"]
        for c in content["cases"]
    ]  # fmt: skip
    near, far = (f"{100 * value:.1f}%" for value in content["above_the_mean"].values())
    notes = (
        f"The logging policy earns {content['logs']:.3f} and succeeds {100 * content['logs_success']:.1f}% of the "
        f"time; the best arm everywhere would earn {content['best']:.3f}. {content['steps']} steps. With a baseline "
        f"0.2 above the mean reward, `reinforce` ends at a success of {near} from the data's policy and of {far} from "
        f"one that prefers bad arms. The gradient of `[iw_sft, filtered_bc]` differs from the policy gradient of "
        f"success by at most {content['iw_gradient_error']:.0e}."
    )
    return f"{table(head, rows)}\n\n{notes}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def rate_table(content: Mapping[str, Any]) -> str:
    """Times to 99%: measured, and predicted in brackets."""
    names = list(dict.fromkeys(r["objective"] for r in content["rates"]))
    found = {(r["good"], r["start"], r["objective"]): r for r in content["rates"]}
    settings = list(dict.fromkeys((r["good"], r["start"]) for r in content["rates"]))
    rows = [
        [f"{100 * good:g}%", f"{100 * start:g}%", *(time(found[good, start, name]) for name in names)]
        for good, start in settings
    ]
    return table(["good rows", "good at the start", *(f"`{name}`" for name in names)], rows)


def time(rate: Mapping[str, float]) -> str:
    return f"{rate['measured']:.0f} ({rate['predicted']:.0f})"


def by_scenario(content: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """{scenario: {objective: {seed: success}}}, in the order of the scenarios; `logs` among the objectives."""
    out: dict[str, dict[str, dict[int, float]]] = {}
    for run in sorted(content["runs"], key=lambda run: (order(run["scenario"]), run["seed"])):
        named = out.setdefault(run["scenario"], {})
        for label, value in {"logs": run["logs"], **run["success"]}.items():
            named.setdefault(label, {})[run["seed"]] = value
    return out


def order(scenario: str) -> int:
    from benchmarks.evidence.task import SCENARIOS

    return [s.name for s in SCENARIOS].index(scenario)


def task_table(content: Mapping[str, Any]) -> str:
    """Success in per cent over seeds."""
    found = by_scenario(content)
    labels = list(dict.fromkeys(label for named in found.values() for label in named))
    rows = [[f"`{label}`" if label not in ("logs", "start", "start, greedy") else label,
             *(percent(share(list(named[label].values()))) if label in named else "" for named in found.values())]
            for label in labels]  # fmt: skip
    return table(["", *found], rows)


def pair_table(content: Mapping[str, Any]) -> str:
    """Differences in percentage points, seed by seed."""
    found = by_scenario(content)
    rows = [
        [f"`{a}` less `{b}`",
         *(points(difference(named[a], named[b])) if a in named and b in named else "" for named in found.values())]
        for a, b in PAIRS
    ]  # fmt: skip
    return table(["", *found], rows)


def of_model(content: Mapping[str, Any], reward: str) -> dict[str, dict[str, list[float]]]:
    """{objective: {figure: values by seed}} for one reward."""
    runs = sorted(content["runs"], key=lambda run: run["seed"])
    labels = runs[0]["rewards"][reward]["runs"]
    return {
        label: {name: [run["rewards"][reward]["runs"][label][name] for run in runs] for name in figures_of}
        for label, figures_of in labels.items()
    }


def model_table(content: Mapping[str, Any], reward: str) -> str:
    """Success by temperature, and how far the model has gone."""
    temperatures = ("1", "0.7", "0.5", "0")
    head = [
        "",
        *(f"T = {t}" if t != "0" else "greedy" for t in temperatures),
        "KL to the start [nats]",
        "entropy [nats]",
    ]
    rows = [
        [f"`{label}`" if label != "start" else label,
         *(percent(share(values[t])) if t in values else "" for t in temperatures),
         plain(values["kl"]), plain(values["entropy"])]
        for label, values in of_model(content, reward).items()
    ]  # fmt: skip
    logs = percent(share([run["rewards"][reward]["logs"] for run in content["runs"]]))
    return f"{table(head, rows)}\n\nSuccesses in the logs: {logs}%."


def plain(values: Sequence[float]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*over_seeds(values))


def cost(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What it took, where."""
    took = ", ".join(f"{part} {content['cpu']:.0f} s" for part, content in results.items())
    total = sum(content["cpu"] for content in results.values()) / 60
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"CPU time: {took}; {total:.0f} minutes in all, {os.cpu_count()} cores that others used too. "
        f"Python {platform.python_version()}, {packages}."
    )


def sections(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{marker: Markdown}: what the page shows of the results that there are."""
    out = {"cost": cost(results)}
    if "bandit" in results:
        out |= {"bandit": bandit_table(results["bandit"]), "rates": rate_table(results["bandit"])}
    if "task" in results:
        out |= {"task": task_table(results["task"]), "pairs": pair_table(results["task"])}
    if "model" in results:
        out |= {name: model_table(results["model"], name) for name in ("word", "spelling")}
    return out


def put(page: str, name: str, content: str) -> str:
    """The page with other content between the markers of a section."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The stored results, by part."""
    files = [folder / f"{part}.json" for part in ("bandit", "task", "model")]
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()}


def write(folder: Path, docs: Path = DOCS) -> None:
    """Tables between their markers, and the figures."""
    results = load(folder)
    page = (docs / "evidence.md").read_text(encoding="utf-8")
    for name, content in sections(results).items():
        page = put(page, name, content)
    (docs / "evidence.md").write_text(page, encoding="utf-8")
    figures.draw(results, docs / "figures")
