"""All evidence into results/, docs/evidence.md and docs/figures/: python -m benchmarks.evidence --model FOLDER.

`--model` is a small causal language model on disk; without it that part is left as it is. `--only` takes some parts,
`--only page` redraws from the stored results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.evidence import page
from benchmarks.evidence.jobs import bandit_job, model_job, task_job

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PARTS = ("bandit", "task", "model")
SEEDS = range(3)


def start(pool: ProcessPoolExecutor, given: argparse.Namespace, scratch: str) -> dict[Future[Any], str]:
    """Everything that is to be measured, seed by seed."""
    from benchmarks.evidence.task import SCENARIOS

    jobs: dict[Future[Any], str] = {}
    if "bandit" in given.only:
        jobs[pool.submit(bandit_job)] = "bandit"
    for seed in SEEDS:
        if "model" in given.only and given.model:
            jobs[pool.submit(model_job, str(Path(given.model).resolve()), given.word, seed, scratch)] = "model"
        if "task" in given.only:
            jobs |= {pool.submit(task_job, index, seed, scratch): "task" for index in range(len(SCENARIOS))}
    return jobs


def store(part: str, found: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Keep what a part has found so far."""
    content: dict[str, Any] = {"cpu": sum(item.pop("cpu", 0.0) for item in map(dict, found))}
    if part == "bandit":
        content |= found[0]
    else:
        content["runs"] = [{k: v for k, v in item.items() if k != "cpu"} for item in found]
    if part == "model":
        content |= {"model": given.model_name or Path(given.model).name, "word": given.word}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{part}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(given: argparse.Namespace) -> None:
    """Run every job, and store each part as it grows."""
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        for done in completed(start(pool, given, scratch)):
            part, result = done
            found[part].append(result)
            store(part, found[part], given)
            print(f"{part}: {len(found[part])} done, {result['cpu']:.0f} s of CPU", flush=True)


def completed(jobs: dict[Future[Any], str]) -> Iterable[tuple[str, dict[str, Any]]]:
    for future in as_completed(jobs):
        yield jobs[future], future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a small causal language model")
    parser.add_argument("--model-name", help="what the page calls it")
    parser.add_argument("--word", default="park", help="the word that the first reward asks for")
    parser.add_argument("--only", nargs="*", choices=(*PARTS, "page"), default=list(PARTS))
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    given = parser.parse_args()
    if set(given.only) & set(PARTS):
        measure(given)
    page.write(RESULTS)


if __name__ == "__main__":
    main()
