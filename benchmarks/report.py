"""All benchmarks into docs/performance.md and docs/figures/performance.png: python benchmarks/report.py.

Each benchmark's Markdown goes between its markers in the page, with the machine and the versions. --only takes some.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, FIGURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "figures" / "performance.png"
BENCHMARKS = ("head", "step", "packing", "shared_prompts")
PACKAGES = ("torch", "transformers", "accelerate", "trl", "cut-cross-entropy")


def machine(peers: str) -> str:
    """One line: processor, threads, versions."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    versions = [f"{name} {version(name, peers)}" for name in PACKAGES]
    name, threads = cpu[1] if cpu else platform.processor(), os.environ["OMP_NUM_THREADS"]
    python = f"Python {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, {threads} thread(s); {python}, {', '.join(versions)}"


def version(package: str, peers: str) -> str:
    """The installed version, or of a peer the one in the environment of the peers."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        code = f"import importlib.metadata as m; print(m.version('{package}'))"
        done = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=False)
        return done.stdout.strip() or "not installed"


def run(name: str, peers: str) -> str:
    """The Markdown that a benchmark prints."""
    command = [peers if name == "head" else sys.executable, str(ROOT / "benchmarks" / f"{name}.py")]
    command += ["--peers", peers] if name == "step" else []
    hidden = {} if name in ("head", "step") else {"CUDA_VISIBLE_DEVICES": ""}  # the others are of a CPU
    environment = {**os.environ, **hidden}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def put(page: str, name: str, content: str) -> str:
    """The page with other content between the markers of a benchmark."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def between(page: str, name: str) -> str:
    return page.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->", maxsplit=1)[0]


def steps(markdown: str) -> dict[str, dict[str, tuple[float, float]]]:
    """{vocabulary: {trainer: (CPU seconds, MiB)}} from the tables of the step benchmark."""
    out: dict[str, dict[str, tuple[float, float]]] = {}
    vocabulary = ""
    for line in markdown.splitlines():
        heading = re.match(r"Vocabulary (\d+)", line)
        vocabulary = heading[1] if heading else vocabulary
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and re.fullmatch(r"[\d.]+", cells[1]):
            out.setdefault(vocabulary, {})[cells[0]] = (float(cells[1]), float(cells[4]))
    return out


def draw(figures: dict[str, dict[str, tuple[float, float]]]) -> None:
    """CPU seconds and memory of a step, a bar for each trainer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(figures), figsize=(9, 4.6), squeeze=False, constrained_layout=True)
    for column, (vocabulary, trainers) in enumerate(figures.items()):
        for row, (what, unit) in enumerate((("CPU time of a step", "s"), ("peak memory", "MiB"))):
            axis = axes[row][column]
            names, values = list(trainers)[::-1], [trainers[name][row] for name in trainers][::-1]
            colours = ["#1f77b4" if name.startswith("rwft") else "#b0b0b0" for name in names]
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, fmt="{:,.0f}" if unit == "MiB" else "{:.1f}", padding=3)
            axis.set_title(f"{what} [{unit}], V = {int(vocabulary):,}", fontsize=10, loc="left")
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, nargs="*", default=list(BENCHMARKS))
    parser.add_argument("--peers", default=sys.executable, help="the Python of the environment that has the peers")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    page = PAGE.read_text(encoding="utf-8")
    for name in given.only:
        tables = run(name, given.peers)
        print(f"{tables}\n", flush=True)
        page = put(page, name, f"\n{machine(given.peers)}\n\n{tables}\n")
        PAGE.write_text(page, encoding="utf-8")
    draw(steps(between(page, "step")))


if __name__ == "__main__":
    main()
